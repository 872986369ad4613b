"""Several bitrates from one measurement: an output each, the original evaluated once, and one report over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.files.atomic import write_json, write_text
from ..checkpoint.files.operations import delete
from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, discard_artifacts, locked_work
from ..checkpoint.source.original import Original, open_model
from ..convert.conversion import Target
from ..errors import BrokenModelError, ConfigError
from ..eval.comparison import Comparison
from ..eval.models import model_name
from ..eval.report.content import Report
from ..eval.report.html import html_report
from ..eval.report.report import HTML_NAME, JSON_NAME, MARKDOWN_NAME, try_report
from ..eval.report.tables import models_table
from ..measure.run import MEASURED
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from ..tables import Table, cell
from ..version import __version__
from .checks import check_output, check_places, files_beside, forecast_outputs, require_convertible
from .config import QuantizeConfig
from .costs import StepClock
from .judge import Judge
from .measuring import MEASUREMENT_FILE, MEASURING, GivenMeasurement, check_work, load_or_measure
from .run import Job, make_output
from .times import announce

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
        report: The report over all: a page, or Markdown where nothing was evaluated.
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
    output: Path,
    config: QuantizeConfig,
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
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: Directory that the outputs, ``report.html``, ``report.md`` and ``report.json`` go into.
        config: Options of every output; their target is not read.
        rates: Bits per weight, each once.
        measurement: A measurement of this model; None measures first. It brings its calibration rows along.
        calibration: Rows to use instead of those that ``config.measure.calibration`` describes; not with a measurement.
        work: Work directory; default ``OUTPUT.work``.
        progress: Shows how far the steps are.

    Returns:
        What was made.

    Raises:
        BrokenModelError: At least one output is broken; all are made, and the report is written.
        BpwiseError: As ``quantize_model``.

    Example:
        >>> from pathlib import Path
        >>> from bpwise import QuantizeConfig, quantize_series
        >>> result = quantize_series("llama", Path("series"), QuantizeConfig(), [8.0, 4.0])
        >>> [output.path.name for output in result.outputs]
        ['llama-8.0bpw-6hb-exl2', 'llama-4.0bpw-6hb-exl2']
    """
    if not rates or len(set(rates)) < len(rates):
        raise ConfigError(
            f"bitrates: not usable. Got {list(rates)}. Expected at least one, and each once. Choose another."
        )
    checkpoint = open_model(model)
    output = named(Path(output))
    work = work or work_beside(output)
    conversion = config.conversion(checkpoint)
    if not conversion.measures:
        raise ConfigError("bitrates: these options say by themselves how large an output is. Leave one of them out.")
    require_convertible(conversion)
    paths = output_paths(config.base_model or model_name(checkpoint), output, config, rates)
    targets = {path: Target(bpw=bpw) for bpw, path in paths.items()}
    for path in targets:
        check_places(conversion, config, path, work / path.name, measurement)
        with reserved(path, files_beside(path, conversion, config.format)):
            check_output(conversion, config, path, progress)
    check_work(work / MEASURING)
    try_report(output)
    given = GivenMeasurement.load(measurement, checkpoint, progress)
    measured = None if given is None else given.measurement
    forecasts = forecast_outputs(
        conversion,
        targets,
        config.measure,
        config.evaluate,
        work,
        measured=measured,
        measurement=measurement,
        rows=calibration,
    )
    known = measured or calibration
    announce(progress, forecasts, conversion, config, work, known=known, measurement=measurement, series=True)
    judge = None if config.evaluate is None else Judge(checkpoint, config.evaluate, progress)
    job = Job(
        conversion=conversion, config=config, given=given, calibration=calibration, judge=judge, progress=progress
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
    return SeriesResult(outputs=outputs, report=report, measurement=used, warnings=conversion.warnings)


def _make_all(job: Job, targets: Mapping[Path, Target], work: Path) -> tuple[tuple[SeriesOutput, ...], Path]:
    # The outputs, and the measurement file that they were made from.
    shared = RunArtifacts(work)
    for name, identity in job.conversion.prepare(work, job.progress, job.measurement):
        shared.add(name, identity)
    given = job.given or _measured(job, work / MEASURING)
    job = replace(job, given=given, calibration=None)
    outputs = tuple(_make(job, path, target, work) for path, target in targets.items())
    shared.discard()
    return outputs, given.path


def _measured(job: Job, work: Path) -> GivenMeasurement:
    measured, _ = load_or_measure(
        job.checkpoint,
        job.config.measure,
        lambda: [job.conversion.curves()],
        work,
        StepClock(),
        job.progress,
        given=None,
        calibration=job.calibration,
        check_rows=None if job.judge is None else job.judge.check_text,
    )
    discard_artifacts(work, MEASURED, measured.provenance)
    return GivenMeasurement(work / MEASUREMENT_FILE, measured)


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
    )


def _write_report(original: str, outputs: Sequence[SeriesOutput], directory: Path) -> Path:
    content = {
        "bpwise_series": _SERIES_VERSION,
        "bpwise": __version__,
        "original": original,
        "outputs": [output.to_dict() for output in outputs],
    }
    write_json(directory / JSON_NAME, content)
    write_text(directory / MARKDOWN_NAME, _markdown(original, outputs))
    comparisons = tuple(output.comparison for output in outputs if output.comparison is not None)
    if not comparisons:
        delete(directory / HTML_NAME, missing_ok=True)  # an earlier run's
        return directory / MARKDOWN_NAME
    write_text(directory / HTML_NAME, html_report(Report(comparisons=comparisons, details=_details(outputs))))
    return directory / HTML_NAME


def _details(outputs: Sequence[SeriesOutput]) -> dict[str, dict[str, str]]:
    made, broken = {}, {}
    for output in outputs:
        if output.broken is not None:
            broken[output.path.name] = output.broken
        else:
            made[output.path.name] = (
                f"{output.bpw:.4f} bits per weight, {output.asked_bpw:g} asked for; "
                f"predicted {output.predicted_nats:.3g} nats/token"
            )
    return {title: section for title, section in (("Broken", broken), ("Bitrates", made)) if section}


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
