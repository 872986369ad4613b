"""Several bitrates from one measurement: an output each, the original evaluated once, and one report over all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.files.atomic import write_json, write_text
from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, discard_artifacts, locked_work
from ..checkpoint.source.original import Original, open_model
from ..convert.conversion import Target
from ..convert.options import FormatOptions
from ..errors import BrokenModelError, ConfigError
from ..eval.comparison import Comparison
from ..eval.config import EvalConfig
from ..eval.models import model_name
from ..eval.report.report import JSON_NAME, MARKDOWN_NAME, try_report
from ..eval.report.tables import models_table
from ..eval.report.verdict import verdict
from ..measure.measurement import Measurement
from ..measure.run import MEASURED, MeasureConfig
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, default_progress
from ..tables import Table, cell, html_summary
from ..version import __version__
from .checks import check_output, check_places, files_beside, require_convertible
from .config import QuantizeConfig, chosen_evaluation, options_naming
from .measuring import MEASUREMENT_FILE, MEASURING, GivenMeasurement, check_work, load_or_measure
from .output import Job, make_output
from .run import begin_job
from .timing.costs import StepClock, minutes

__all__ = ["SeriesOutput", "SeriesResult", "output_paths", "quantize_series"]

_SERIES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOutput:
    """One bitrate of a series.

    Attributes:
        path: Directory or file.
        asked_bpw: Bits per weight that were asked for.
        bpw: Bits per weight that it has; None if it is broken.
        file_bytes: Size of all files with tensors; None if it is broken.
        predicted_nats: Damage that the plan predicts, in nats per token; None if it is broken.
        comparison: The original against it; None if it was not evaluated, or is broken.
        broken: Why it is broken, or None if it is not.
        repeated: Whether an earlier run had made all of it.
    """

    path: Path
    asked_bpw: float
    bpw: float | None = None
    file_bytes: int | None = None
    predicted_nats: float | None = None
    comparison: Comparison | None = None
    broken: str | None = None
    repeated: bool = False

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the original, nats per token; None if it was not evaluated."""
        return None if self.comparison is None else self.comparison.kl

    @property
    def verdict(self) -> str | None:
        """What that means in use, in words; None if it was not evaluated."""
        return None if self.comparison is None else verdict(self.comparison)

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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SeriesResult:
    """What a series made.

    Attributes:
        outputs: One for each bitrate, in the order asked.
        report: The report over all, Markdown.
        measurement: The measurement file, which serves any other bitrate.
        warnings: What readers of the format compute otherwise than Transformers.
        seconds: Wall-clock time of the run.
    """

    outputs: tuple[SeriesOutput, ...]
    report: Path
    measurement: Path
    warnings: tuple[str, ...]
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return the outputs' names."""
        return f"SeriesResult({', '.join(output.path.name for output in self.outputs)})"

    def _repr_html_(self) -> str:
        return html_summary(self.report.parent.name, [*self.warnings, f"Report: {self.report}"], _table(self.outputs))

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        if all(output.repeated for output in self.outputs):
            return [f"finished already: {self.report.parent} holds what this command makes"]
        lines = [f"warning     {warning}" for warning in self.warnings]
        for output in self.outputs:
            kl = "" if output.kl is None else f", KL {output.kl:.3g} nats/token, {output.verdict}"
            assert output.bpw is not None
            assert output.file_bytes is not None
            lines.append(f"output      {output.path}: {output.bpw:.4f} bpw, {output.file_bytes / 2**20:.1f} MiB{kl}")
        lines.append(f"measurement {self.measurement} serves any other bitrate")
        return [*lines, f"total       {minutes(self.seconds)}", f"report      {self.report}"]


def output_paths(base_name: str, output: Path, config: QuantizeConfig, rates: Sequence[float]) -> dict[float, Path]:
    """Return where each bitrate goes: ``OUTPUT/NAME-8.0bpw-6hb-exl2``, or ``OUTPUT/NAME-8.0bpw.gguf``.

    Args:
        base_name: Name or Hub id of the original.
        output: The series' directory.
        config: Says which format, and what names tell of its options.
        rates: Bits per weight.
    """
    return {bpw: output / config.format.output_name(base_name, bpw, config.options) for bpw in rates}


def quantize_series(
    model: Original,
    output: str | Path,
    bpw: Sequence[float],
    *,
    measurement: Measurement | str | Path | None = None,
    calibration: CalibrationSet | None = None,
    options: FormatOptions | None = None,
    measure: MeasureConfig | None = None,
    evaluate: EvalConfig | bool = True,
    base_model: str | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> SeriesResult:
    """Quantize a model to several bitrates; finished ones are not made again when a run goes on.

    A broken output is marked and does not keep the others from being made.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: Directory that the outputs, ``report.md`` and ``report.json`` go into.
        bpw: Bits per weight, each once.
        measurement: As for ``quantize_model``, like all that follow.
        calibration: Rows to use instead of those that ``measure.calibration`` describes; not with a measurement.
        options: ``GgufOptions`` or ``Exl2Options``, which choose the format too; None for EXL2's defaults.
        measure: Options of measuring.
        evaluate: Options of the comparisons; True for the defaults, False leaves them out.
        base_model: Hub id of the original, for the model cards.
        work: Work directory; default ``OUTPUT.work``.
        progress: Shows how far the run is.

    Returns:
        What was made.

    Raises:
        BrokenModelError: At least one output is broken; all are made, and the report is written.
        BpwiseError: As ``quantize_model``.

    Example:
        >>> from bpwise import quantize_series
        >>> result = quantize_series("llama", "series", bpw=[8.0, 4.0], measurement="m.safetensors")
        >>> [output.path.name for output in result.outputs]
        ['llama-8.0bpw-6hb-exl2', 'llama-4.0bpw-6hb-exl2']
    """
    rates = tuple(bpw)
    if not rates or len(set(rates)) < len(rates):
        raise ConfigError(
            f"bitrates: not usable. Got {list(rates)}. Expected at least one, and each once. Choose another."
        )
    output = named(Path(output))
    config = QuantizeConfig(
        options=options or options_naming(output),
        measure=measure or MeasureConfig(),
        evaluate=chosen_evaluation(evaluate),
        base_model=base_model,
    )
    shown = progress or default_progress()
    checkpoint = open_model(model)
    work = work_beside(output) if work is None else Path(work)
    conversion = config.conversion(checkpoint)
    if not conversion.measures:
        raise ConfigError("bitrates: these options say by themselves how large an output is. Leave one of them out.")
    require_convertible(conversion)
    paths = output_paths(config.base_model or model_name(checkpoint), output, config, rates)
    targets = {path: Target(bpw=rate) for rate, path in paths.items()}
    read = None if measurement is None or isinstance(measurement, Measurement) else Path(measurement)
    for path in targets:
        check_places(conversion, config, path, work / path.name, read)
        with reserved(path, files_beside(path, conversion, config.format)):
            check_output(conversion, config, path, shown)
    check_work(work / MEASURING)
    try_report(output)
    given = GivenMeasurement.load(measurement, checkpoint, shown)
    job = begin_job(
        conversion, config, targets, work, given=given, calibration=calibration, progress=shown, series=True
    )
    with reserved(output), locked_work(work):
        outputs, used = _make_all(job, targets, work)
        report = _write_report(model_name(checkpoint), outputs, output)
    broken = [each.path.name for each in outputs if each.broken is not None]
    if broken:
        raise BrokenModelError(
            f"{output}: {len(broken)} of {len(outputs)} outputs are broken and marked so: {', '.join(broken)}. "
            f"See {report}."
        )
    return SeriesResult(
        outputs=outputs,
        report=report,
        measurement=used,
        warnings=conversion.warnings,
        seconds=time.monotonic() - job.started,
    )


def _make_all(job: Job, targets: Mapping[Path, Target], work: Path) -> tuple[tuple[SeriesOutput, ...], Path]:
    # The outputs, and the measurement file that they were made from.
    shared = RunArtifacts(work)
    for name, identity in job.conversion.prepare(work, job.progress, job.measurement):
        shared.add(name, identity)
    given = job.given
    if given is None or given.path is None:
        given = GivenMeasurement(work / MEASURING / MEASUREMENT_FILE, _measured(job, work / MEASURING))
    job = replace(job, given=given, calibration=None)
    outputs = tuple(_make(job, path, target, work) for path, target in targets.items())
    shared.discard()
    assert given.path is not None
    return outputs, given.path


def _measured(job: Job, work: Path) -> Measurement:
    measured, _ = load_or_measure(
        job.checkpoint,
        job.config.measure,
        lambda: [job.conversion.curves()],
        work,
        StepClock(),
        job.progress,
        given=job.given,
        calibration=job.calibration,
        check_rows=None if job.judge is None else job.judge.check_text,
    )
    discard_artifacts(work, MEASURED, measured.provenance)
    return measured


def _make(job: Job, path: Path, target: Target, work: Path) -> SeriesOutput:
    assert target.bpw is not None
    try:
        with reserved(path, files_beside(path, job.conversion, job.config.format)):
            made = make_output(job, path, target, work / path.name)
    except BrokenModelError as cause:
        return SeriesOutput(path=path, asked_bpw=target.bpw, broken=str(cause))
    return SeriesOutput(
        path=path,
        asked_bpw=target.bpw,
        bpw=made.verification.bpw,
        file_bytes=made.verification.file_bytes,
        predicted_nats=made.plan.damage_nats,
        comparison=made.comparison,
        repeated=made.repeated,
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
    sections = [
        f"# {cell(original)} at {len(outputs)} bitrates, from one measurement",
        _table(outputs).to_markdown(),
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


def _table(outputs: Sequence[SeriesOutput]) -> Table:
    head = ("model", "asked, bpw", "bpw", "size of the weights", "predicted KL, nats per token", "measured")
    return Table.of(head, map(_row, outputs))


def _row(output: SeriesOutput) -> tuple[str, ...]:
    if output.broken is not None:
        return (output.path.name, f"{output.asked_bpw:g}", "", "", "", "broken")
    kl = "not measured" if output.comparison is None else f"{output.comparison.summary.kl_nats.value:.3g}"
    assert output.bpw is not None
    assert output.file_bytes is not None
    size = f"{output.file_bytes / 1e6:.1f} MB"
    return (output.path.name, f"{output.asked_bpw:g}", f"{output.bpw:.4f}", size, f"{output.predicted_nats:.3g}", kl)
