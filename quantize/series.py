"""Several bitrates from one measurement: an output each, the original evaluated once, and one report over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.files.atomic import write_json, write_text
from ..checkpoint.files.paths import check_run, named, reserved, work_beside
from ..checkpoint.files.resume import discard_artifacts, locked_work
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.original import Original, open_model
from ..convert.gguf.base import base_path, base_to_make, discard_base, prepare_base
from ..convert.publishing.cards import output_name
from ..errors import BrokenModelError, ConfigError
from ..eval.comparison import Comparison
from ..eval.models import model_name
from ..eval.report.report import JSON_NAME, MARKDOWN_NAME, try_report
from ..eval.report.tables import models_table
from ..measure.measurement import Measurement
from ..measure.run import MEASURED
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from ..tables import Table, cell
from ..version import __version__
from .costs import StepClock
from .gguf_pipeline import GgufConfig, GgufResult, files_beside, make_gguf, refuse_others
from .judge import Judge
from .measuring import MEASUREMENT_FILE, GivenMeasurement, check_work, load_or_measure
from .pipeline import QuantizeConfig, QuantizeResult, is_finished, make_exl2
from .support import exists, require_exl2, require_gguf, require_gguf_tools

__all__ = ["SeriesOutput", "SeriesResult", "output_paths", "quantize_series"]

_SERIES_VERSION = 1

_Config = TypeVar("_Config", QuantizeConfig, GgufConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOutput:
    """One bitrate of a series.

    Attributes:
        path: EXL2 directory or GGUF file.
        asked_bpw: Bits per weight that were asked for.
        bpw: Bits per weight that it has; None if it is broken.
        file_bytes: Size of its weights, of a GGUF file all of it; None if it is broken.
        predicted_nats: Damage that the plan predicts, in nats per token; None if it is broken.
        comparison: The original against it; None if it was not evaluated, or is broken.
        broken: Why it is broken, or None if it is not.
    """

    path: Path
    asked_bpw: float
    bpw: float | None = None
    file_bytes: int | None = None
    predicted_nats: float | None = None
    comparison: Comparison | None = None
    broken: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "name": self.path.name,
            "asked_bpw": self.asked_bpw,
            "bpw": self.bpw,
            "file_bytes": self.file_bytes,
            "predicted_nats": self.predicted_nats,
            "broken": self.broken,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult:
    """What a series made.

    Attributes:
        outputs: One for each bitrate, in the order asked.
        report: The report over all, Markdown.
        measurement: The measurement file, which serves any other bitrate.
        warnings: What readers of the format compute otherwise than Transformers.
    """

    outputs: tuple[SeriesOutput, ...]
    report: Path
    measurement: Path
    warnings: tuple[str, ...]

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        lines = [f"warning     {warning}" for warning in self.warnings]
        for output in self.outputs:
            kl = "" if output.comparison is None else f", KL {output.comparison.summary.kl_nats.value:.3g} nats/token"
            assert output.bpw is not None
            assert output.file_bytes is not None
            lines.append(f"output      {output.path}: {output.bpw:.4f} bpw, {output.file_bytes / 2**20:.1f} MiB{kl}")
        return [*lines, f"measurement {self.measurement} serves any other bitrate", f"report      {self.report}"]


def output_paths(
    base_name: str, output: Path, config: QuantizeConfig | GgufConfig, rates: Sequence[float]
) -> dict[float, Path]:
    """Return where each bitrate goes: ``OUTPUT/NAME-8.0bpw-6hb-exl2``, or ``OUTPUT/NAME-8.0bpw.gguf``.

    Args:
        base_name: Name or Hub id of the original.
        output: The series' directory.
        config: Says which format, and how many bits the head gets.
        rates: Bits per weight.
    """
    if isinstance(config, GgufConfig):
        return {bpw: output / f"{output_name(base_name, bpw=bpw, exl2=False)}.gguf" for bpw in rates}
    head_bits = config.head_bits if isinstance(config.head_bits, int) else None
    return {bpw: output / output_name(base_name, bpw=bpw, head_bits=head_bits) for bpw in rates}


def quantize_series(
    model: Original,
    output: Path,
    config: QuantizeConfig | GgufConfig,
    rates: Sequence[float],
    *,
    measurement: Path | None = None,
    calibration: CalibrationSet | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> SeriesResult:
    """Quantize a model to several bitrates; finished ones are not made again when a run goes on.

    A broken output is marked and does not keep the others from being made.

    Args:
        model: A local directory, a hub id, or what ``open_model`` made of one.
        output: Directory that the outputs, ``report.md`` and ``report.json`` go into.
        config: Options of every output, of either format; its target is not read.
        rates: Bits per weight, each once.
        measurement: A measurement of this model; None measures first. It brings its calibration rows along.
        calibration: Rows to use instead of those that ``config.measure.calibration`` describes; not with a measurement.
        work: Work directory; default ``OUTPUT.work``.
        progress: Shows how far the stages are.

    Returns:
        What was made.

    Raises:
        BrokenModelError: At least one output is broken; all are made, and the report is written.
        BpwiseError: As ``quantize_model`` and ``quantize_to_gguf``.
    """
    if not rates or len(set(rates)) < len(rates):
        raise ConfigError(f"bitrates: got {list(rates)}, expected at least one, and each once.")
    checkpoint = open_model(model)
    warnings = config.reader_warnings(checkpoint)
    if isinstance(config, GgufConfig):
        require_gguf_tools(checkpoint, config)
    output = named(output)
    paths = output_paths(config.base_model or model_name(checkpoint), output, config, rates)
    work = work or work_beside(output)
    for path in paths.values():
        own = work / path.name
        check_run(path, own, directories=checkpoint.directories, files=(measurement,), offload=config.offload_dirs)
        check_work(own)
    check_work(work / "measure")
    try_report(output)
    given = GivenMeasurement.load(measurement, checkpoint, progress)
    _check(checkpoint, config, paths, work, None if given is None else given.measurement, calibration, progress)
    judge = None if config.evaluate is None else Judge(checkpoint, config.evaluate, progress)
    with reserved(output), locked_work(work):
        if isinstance(config, GgufConfig):
            checkpoint.prepare_fingerprint(progress)
            prepare_base(checkpoint, base_path(checkpoint, work, config.llama_cpp), config)
        if given is None:
            file = work / "measure" / MEASUREMENT_FILE
            measured, _ = load_or_measure(
                checkpoint,
                config.measure,
                file.parent,
                StepClock(),
                progress,
                given=None,
                calibration=calibration,
                check_rows=None if judge is None else judge.check_text,
            )
            discard_artifacts(file.parent, MEASURED, measured.provenance)
            given = GivenMeasurement(file, measured)
        outputs = tuple(
            _make(checkpoint, path, bpw, config, given, work, judge, progress) for bpw, path in paths.items()
        )
        if isinstance(config, GgufConfig):
            discard_base(checkpoint, work, config.llama_cpp)
        report = _write_report(model_name(checkpoint), outputs, output)
    broken = [each.path.name for each in outputs if each.broken is not None]
    if broken:
        raise BrokenModelError(
            f"{output}: {len(broken)} of {len(outputs)} outputs are broken and marked so: {', '.join(broken)}. "
            f"See {report}."
        )
    return SeriesResult(outputs=outputs, report=report, measurement=given.path, warnings=warnings)


def _with_rate(config: _Config, bpw: float) -> _Config:
    return replace(config, bpw=bpw, max_bytes=None, vram_bytes=None)


def _check(
    checkpoint: Checkpoint,
    config: QuantizeConfig | GgufConfig,
    paths: Mapping[float, Path],
    work: Path,
    measured: Measurement | None,
    rows: CalibrationSet | None,
    progress: Progress,
) -> None:
    # Whatever is in the way or impossible shows before the long work.
    if isinstance(config, GgufConfig):
        for path in paths.values():
            with reserved(path, files_beside(path)):
                refuse_others(path, config)
        files = {path: _with_rate(config, bpw) for bpw, path in paths.items()}
        require_gguf(checkpoint, files, base=base_to_make(work), measured=measured, rows=rows)
        return
    if any(map(exists, paths.values())):
        checkpoint.prepare_fingerprint(progress)
    for path in paths.values():
        with reserved(path):
            is_finished(path, model=lambda: checkpoint.fingerprint)
    directories = {path: _with_rate(config, bpw) for bpw, path in paths.items()}
    require_exl2(checkpoint, directories, measured=measured, rows=rows)


def _make(
    checkpoint: Checkpoint,
    path: Path,
    bpw: float,
    config: QuantizeConfig | GgufConfig,
    given: GivenMeasurement,
    work: Path,
    judge: Judge | None,
    progress: Progress,
) -> SeriesOutput:
    own = work / path.name
    try:
        if isinstance(config, GgufConfig):
            base = base_path(checkpoint, work, config.llama_cpp)  # one for all sizes
            with reserved(path, files_beside(path)):
                file = make_gguf(checkpoint, path, _with_rate(config, bpw), given, None, own, base, judge, progress)
            return _of_file(bpw, file)
        with reserved(path):
            made = make_exl2(checkpoint, path, _with_rate(config, bpw), given, None, own, judge, progress)
        return _of_directory(bpw, made)
    except BrokenModelError as cause:
        return SeriesOutput(path=path, asked_bpw=bpw, broken=str(cause))


def _of_directory(bpw: float, result: QuantizeResult) -> SeriesOutput:
    return SeriesOutput(
        path=result.output,
        asked_bpw=bpw,
        bpw=result.verification.decoder_bpw,
        file_bytes=result.verification.file_bytes,
        predicted_nats=result.plan.damage_nats,
        comparison=result.comparison,
    )


def _of_file(bpw: float, result: GgufResult) -> SeriesOutput:
    return SeriesOutput(
        path=result.output,
        asked_bpw=bpw,
        bpw=result.plan.bpw,
        file_bytes=result.file_bytes,
        predicted_nats=result.plan.damage_nats,
        comparison=result.comparison,
    )


def _write_report(original: str, outputs: Sequence[SeriesOutput], directory: Path) -> Path:
    content = {
        "bpwise_series": _SERIES_VERSION,
        "bpwise": __version__,
        "original": original,
        "outputs": [output.to_dict() for output in outputs],
    }
    write_json(directory / JSON_NAME, content)
    path = directory / MARKDOWN_NAME
    write_text(path, _markdown(original, outputs))
    return path


def _markdown(original: str, outputs: Sequence[SeriesOutput]) -> str:
    head = ("model", "asked, bpw", "bpw", "size of the weights", "predicted KL, nats per token", "measured")
    sections = [
        f"# {cell(original)} at {len(outputs)} bitrates, from one measurement",
        Table.of(head, map(_row, outputs)).to_markdown(),
        *(f"**{cell(output.path.name)} is broken:** {cell(output.broken)}" for output in outputs if output.broken),
    ]
    comparisons = [output.comparison for output in outputs if output.comparison is not None]
    if comparisons:
        first = comparisons[0]
        sections += [
            "## Against the original",
            models_table(comparisons).to_markdown(),
            f"Over {first.predicted_tokens} tokens ({cell(first.text)}), fingerprint {first.text_fingerprint}; "
            f"{cell(first.engine)}, {first.dtype} on {cell(first.device)}; floor {first.floor_nats:.2g} nats per "
            "token. Numbers after ± are one standard error. Each model's own report has the rest.",
        ]
    return "\n\n".join(sections) + "\n"


def _row(output: SeriesOutput) -> tuple[str, ...]:
    if output.broken is not None:
        return (output.path.name, f"{output.asked_bpw:g}", "", "", "", "broken")
    kl = "not measured" if output.comparison is None else f"{output.comparison.summary.kl_nats.value:.3g}"
    assert output.bpw is not None
    assert output.file_bytes is not None
    size = f"{output.file_bytes / 1e6:.1f} MB"
    return (output.path.name, f"{output.asked_bpw:g}", f"{output.bpw:.4f}", size, f"{output.predicted_nats:.3g}", kl)
