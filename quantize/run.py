"""Whole runs on one model, as functions: measure it, or quantize it to one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.equalized.view import original_of
from ..checkpoint.files.disk_errors import require_rooms
from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import ResumeStore
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.original import Original
from ..convert.conversion import Conversion, Target
from ..convert.export.hessians import HessianFiles
from ..convert.format import Format
from ..convert.options import FormatOptions
from ..convert.registry import format_asking
from ..convert.registry import formats as all_formats
from ..errors import BpwiseError, ConfigError
from ..eval.cache import OriginalCache, default_cache_directory
from ..eval.config import EvalConfig
from ..measure.calibrated import CALIBRATION_FILE, require_text
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.run import CALIBRATED, MeasureConfig, calibrated_identity, measure_to_file
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, default_progress
from .checks import (
    check_output,
    check_places,
    files_beside,
    forecast_outputs,
    require_convertible,
    require_together,
)
from .config import Job, QuantizeConfig, chosen_evaluation, chosen_target, original_for
from .judge import Judge
from .measuring import GivenMeasurement
from .output import make_output
from .result import QuantizeResult
from .times import announce, announce_measuring

__all__ = ["begin_jobs", "measure_model", "original_cache", "quantize_model"]


def measure_model(
    model: Original,
    output: str | Path,
    *,
    formats: Sequence[str] | None = None,
    options: Sequence[FormatOptions] = (),
    measure: MeasureConfig | None = None,
    calibration: CalibrationSet | None = None,
    hessians: str | Path | None = None,
    work: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """Measure a model once, for every size and format, and keep the measurement in a file.

    Interrupted? Call it again: it resumes.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: The file to write (``.safetensors``); an older measurement is replaced.
        formats: Names of the formats to measure for, as ``["gguf"]``. None for all whose extras are installed and that
            hold the model, with a warning about the others.
        options: Options of formats, where they are not the defaults.
        measure: Calibration text, device and other options of measuring.
        calibration: Rows to use instead of those that ``measure.calibration`` describes.
        hessians: Directory to keep the Hessian of every linear in, and the calibration rows, for exllamav3.
        work: Work directory; default ``OUTPUT.work``. Finished blocks are kept in it until the measurement is complete.
        force: Whether a file that is not a measurement is replaced too.
        progress: Shows how far the run is; None for bars in a notebook, and nothing elsewhere.

    Returns:
        The measurement.

    Raises:
        ConfigError: A format is unknown.
        BpwiseError: What is wrong with the model, the options, the text, the tools or the disk.

    Example:
        >>> from bpwise import measure_model
        >>> measurement = measure_model("llama", "new.safetensors", formats=["exl2"])
        >>> list(measurement.curves)
        ['exl2']
    """
    output, config = Path(output), measure or MeasureConfig()
    checkpoint = original_for(model, config, options=options)
    work = work_beside(output) if work is None else Path(work)
    shown = progress or default_progress()
    given = {format_asking(each).name: each for each in options}
    conversions = {
        name: known.conversion(checkpoint, given.get(name) or known.Options())
        for name, known in _known_formats(formats).items()
    }

    keeper = None if hessians is None else HessianFiles(Path(hessians), checkpoint)

    def begin() -> None:
        _check_measuring(
            checkpoint, conversions, config, output, work, every_format=formats is not None, rows=calibration
        )
        if keeper is not None:
            require_rooms({keeper.folder: keeper.missing_bytes})
        announce_measuring(shown, conversions, config, output, work, rows=calibration)

    return measure_to_file(
        checkpoint,
        output,
        config,
        formats=conversions,
        work=work,
        every_format=formats is not None,
        calibration=calibration,
        force=force,
        keeper=keeper,
        begin=begin,
        progress=shown,
    )


def quantize_model(
    model: Original,
    output: str | Path,
    *,
    bpw: float | None = None,
    max_bytes: int | None = None,
    vram_bytes: int | None = None,
    context_tokens: int | None = None,
    size_of: str | None = None,
    measurement: Measurement | str | Path | None = None,
    calibration: CalibrationSet | None = None,
    options: FormatOptions | None = None,
    measure: MeasureConfig | None = None,
    evaluate: EvalConfig | bool = True,
    cache: bool = True,
    base_model: str | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a model, and compare the result with the original.

    Give one of ``bpw``, ``max_bytes``, ``vram_bytes`` and ``size_of``; without, the output is as the command line's:
    GGUF at 4.5 bits per weight, EXL2 at 8.0 with an 8-bit head. Interrupted? Call it again: it resumes.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: The GGUF file (``.gguf``) or EXL2 directory to make. It must not exist, or be the finished output of
            this very run.
        bpw: Bits per weight, as the format counts them; met from below, never exceeded.
        max_bytes: Largest size of all files with tensors together.
        vram_bytes: Memory of a GPU that weights, cache and what the reader needs beside them should fit into.
        context_tokens: With ``vram_bytes``: length of the context whose cache should fit; None for the model's own.
        size_of: As large as llama.cpp's file of that name, such as ``Q4_K_M``; for GGUF.
        measurement: A measurement of this model, or its file; None measures first, and keeps the measurement in the
            work directory. It brings its calibration rows along. With a mixture of llama.cpp: the file whose
            importances it takes.
        calibration: Rows to use instead of those that ``measure.calibration`` describes; not with a measurement.
        options: The format's options, which choose the format too: ``GgufOptions``, ``Exl2Options`` or ``MlxOptions``.
            None for the defaults of the format that ``output`` is named as.
        measure: Calibration text, device and other options of measuring; rounding runs on the same device.
        evaluate: Options of the comparison at the end; True for the defaults, False leaves it out.
        cache: Whether what the original gives is taken from, and kept in, the user's cache; otherwise it runs again.
        base_model: Hub id of the original, for the model card; None takes it from where the original came from.
        work: Work directory; default ``OUTPUT.work``.
        progress: Shows how far the run is; None for bars in a notebook, and nothing elsewhere.

    Returns:
        The result; ``kl`` and ``verdict`` say what quantization cost.

    Raises:
        BrokenModelError: The output's predictions are useless; it is marked, and the measurement kept.
        BpwiseError: What is wrong with the model, the options, the text, the tools or the disk.

    Example:
        >>> from bpwise import quantize_model
        >>> result = quantize_model("llama", "llama-4bpw", bpw=4.0, measurement="m.safetensors")
        >>> 3.9 < result.bpw <= 4.0
        True
    """
    output = named(Path(output))
    if options is not None and not options.measures and isinstance(measurement, str | Path):
        options, measurement = options.weighted_by(Path(measurement)), None
    if options is not None and not options.measures and measurement is not None:
        raise ConfigError(
            "measurement: a mixture takes its importances from a file. Got a Measurement. Expected a path. Save it, "
            "and give the file."
        )
    sizes = {"bpw": bpw, "max_bytes": max_bytes, "vram_bytes": vram_bytes, "size_of": size_of}
    config = QuantizeConfig(
        **chosen_target(output, options, {**sizes, "context_tokens": context_tokens}),
        measure=measure or MeasureConfig(),
        evaluate=chosen_evaluation(evaluate),
        base_model=base_model,
    )
    shown = progress or default_progress()
    checkpoint = original_for(model, config.measure, measurement, options=[config.options])
    work = work_beside(output) if work is None else Path(work)
    conversion = config.conversion(checkpoint)
    require_convertible(conversion)
    path = None if measurement is None or isinstance(measurement, Measurement) else Path(measurement)
    check_places(conversion, config, output, work, path)
    with reserved(output, files_beside(output, conversion, config.format)):
        check_output(conversion, config, output, work, shown)
        given = GivenMeasurement.load(measurement, checkpoint, shown)
        (job,) = begin_jobs(
            [(conversion, config, {output: config.target})],
            work,
            given=given,
            calibration=calibration,
            cache=cache,
            progress=shown,
        )
        return make_output(job, output, config.target, work)


def begin_jobs(
    lines: Sequence[tuple[Conversion, QuantizeConfig, Mapping[Path, Target | None]]],
    work: Path,
    *,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    cache: bool,
    progress: Progress,
    series: bool = False,
) -> list[Job]:
    """Refuse what cannot be quantized, tell the progress what the run will take, and return what outputs share.

    Args:
        lines: For each format the original on its way into it, options, and how large each output may be.
        work: Work directory of the run.
        given: The measurement to work from; None measures first.
        calibration: Calibration rows that are given.
        cache: Whether the original's side of evaluations is kept for other runs.
        progress: Shows how far the steps are.
        series: Whether every output has a directory of its own in the work directory.

    Returns:
        One for each format.

    Raises:
        BpwiseError: As ``forecast_outputs``.
    """
    measured, path = (None, None) if given is None else (given.measurement, given.path)
    forecasts = [
        forecast_outputs(
            conversion,
            targets,
            config.measure,
            config.evaluate,
            work,
            measured=measured,
            measurement=path,
            rows=calibration,
        )
        for conversion, config, targets in lines
    ]
    conversions = [conversion for conversion, _, _ in lines]
    require_together(list(zip(conversions, forecasts, strict=True)), work, path)
    (first, shared, _), *_ = lines
    announce(
        progress,
        {output: each for together in forecasts for output, each in together.items()},
        {output: conversion for conversion, _, targets in lines for output in targets},
        shared,
        work,
        known=measured or calibration,
        measurement=path,
        series=series,
    )
    evaluate, kept = shared.evaluate, original_cache() if cache else None
    judge = None if evaluate is None else Judge(original_of(first.checkpoint), evaluate, progress, cache=kept)
    return [
        Job(
            conversion=conversion,
            config=config,
            given=given,
            calibration=calibration,
            measured_here=given is None,
            judge=judge,
            progress=progress,
        )
        for conversion, config, _ in lines
    ]


def original_cache() -> OriginalCache | None:
    """Return where the original's side of evaluations is kept; None where there is no home directory."""
    try:
        return OriginalCache(default_cache_directory())
    except ConfigError:
        return None


def _known_formats(names: Sequence[str] | None) -> dict[str, Format]:
    known = all_formats()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"formats: unknown name. Got {unknown}. Expected one of {', '.join(known)}. Choose another.")
    return {name: known[name] for name in names or [each for each in known if known[each].is_installed()]}


def _check_measuring(
    checkpoint: Checkpoint,
    conversions: Mapping[str, Conversion],
    measure: MeasureConfig,
    output: Path,
    work: Path,
    *,
    every_format: bool,
    rows: CalibrationSet | None,
) -> None:
    # Refuses what measuring would refuse after long work: missing tools, text and devices, families, and disks.
    resolve_device(measure.device)
    if rows is None:
        store = ResumeStore.existing(work, CALIBRATED, calibrated_identity(measure.calibration))
        kept = [] if store is None else [store.path / CALIBRATION_FILE]
        require_text(checkpoint, measure.calibration, kept, device=measure.device)
    usable, refused = [], []
    for each in conversions.values():
        try:
            require_convertible(each)
            usable.append(each)
        except BpwiseError as error:
            refused.append(error)
    if refused and (every_format or not usable):
        raise refused[0]
    require_rooms({path: size for each in usable for path, size in each.scratch(work, output).items()})
