"""Several sizes and formats from one measurement: an output each, the original evaluated once, one report over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, discard_artifacts, locked_work
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.original import Original, open_model
from ..convert.conversion import Conversion, Target
from ..convert.options import FormatOptions
from ..errors import BrokenModelError, ConfigError
from ..eval.models import model_name
from ..eval.report.report import try_report
from ..eval.report.series import SeriesOutput, write_series_report
from ..measure.run import MEASURED
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from .checks import (
    check_output,
    check_places,
    files_beside,
    forecast_outputs,
    require_convertible,
    require_together,
)
from .config import Job, QuantizeConfig
from .judge import Judge
from .measuring import MEASUREMENT_FILE, MEASURING, GivenMeasurement, check_work, load_or_measure
from .run import make_output
from .times import announce
from .timing.costs import StepClock

__all__ = ["SeriesOutput", "SeriesResult", "output_targets", "quantize_series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult:
    """What a series made.

    Attributes:
        outputs: One for each size, in the order asked; of several formats, all of the first before those of the next.
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


def output_targets(
    base_name: str, output: Path, conversion: Conversion, sizes: Sequence[float | Target]
) -> dict[Path, Target]:
    """Return where each size goes: ``OUTPUT/NAME-8.0bpw-6hb-exl2``, or ``OUTPUT/NAME-8.0bpw-Q8_0.gguf``.

    Args:
        base_name: Name or Hub id of the original.
        output: The series' directory.
        conversion: The original on its way into the format.
        sizes: Bits per weight, or other targets.
    """
    targets = [each if isinstance(each, Target) else Target(bpw=each) for each in sizes]
    return {output / conversion.output_name(base_name, each): each for each in targets}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Line:
    """The outputs of one format."""

    config: QuantizeConfig
    conversion: Conversion
    targets: Mapping[Path, Target]

    def check(self, work: Path, measurement: Path | None, progress: Progress) -> None:
        """Refuse what cannot be made, and places that are in the way, before anything is made."""
        if not self.conversion.measures:
            raise ConfigError("sizes: these options say by themselves how large an output is. Leave one of them out.")
        require_convertible(self.conversion)
        for path in self.targets:
            check_places(self.conversion, self.config, path, work / path.name, measurement)
            with reserved(path, files_beside(path, self.conversion, self.config.format)):
                check_output(self.conversion, self.config, path, progress)


def quantize_series(
    model: Original,
    output: Path,
    config: QuantizeConfig,
    sizes: Sequence[float | Target],
    *,
    formats: Sequence[FormatOptions] = (),
    measurement: Path | None = None,
    calibration: CalibrationSet | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> SeriesResult:
    """Quantize a model to several sizes; finished ones are not made again when a run goes on.

    A broken output is marked and does not keep the others from being made. Every output has a model card.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: Directory that the outputs, ``report.md`` and ``report.json`` go into.
        config: Options of every output; their target is not read.
        sizes: Bits per weight or other targets, each once.
        formats: Options of each format to make; empty for the one of ``config.options``.
        measurement: A measurement of this model; None measures first, once for all formats. It brings its calibration
            rows along.
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
    if not sizes or len(set(sizes)) < len(sizes):
        raise ConfigError(f"sizes: not usable. Got {list(sizes)}. Expected at least one, and each once. Choose others.")
    checkpoint = open_model(model)
    output = named(Path(output))
    work = work or work_beside(output)
    lines = _lines(checkpoint, output, config, sizes, formats)
    for line in lines:
        line.check(work, measurement, progress)
    check_work(work / MEASURING)
    try_report(output)
    given = GivenMeasurement.load(measurement, checkpoint, progress)
    _forecast(lines, config, work, progress, given=given, calibration=calibration)
    judge = None if config.evaluate is None else Judge(checkpoint, config.evaluate, progress)
    jobs = [
        Job(
            conversion=line.conversion,
            config=line.config,
            given=given,
            calibration=calibration,
            calibrated=given is None and calibration is None,
            judge=judge,
            progress=progress,
        )
        for line in lines
    ]
    with reserved(output), locked_work(work):
        outputs, used = _make_all(jobs, [line.targets for line in lines], work)
        counted = {line.config.format.title: line.config.format.bpw_means for line in lines}
        report = write_series_report(model_name(checkpoint), outputs, output, counted)
    broken = [each.path.name for each in outputs if each.broken is not None]
    if broken:
        raise BrokenModelError(
            f"{output}: {len(broken)} of {len(outputs)} outputs are broken and marked so: {', '.join(broken)}. "
            f"See {report}."
        )
    warnings = dict.fromkeys(warning for line in lines for warning in line.conversion.warnings)
    return SeriesResult(outputs=outputs, report=report, measurement=used, warnings=tuple(warnings))


def _lines(
    checkpoint: Checkpoint,
    output: Path,
    config: QuantizeConfig,
    sizes: Sequence[float | Target],
    formats: Sequence[FormatOptions],
) -> list[_Line]:
    base_name = config.base_model or model_name(checkpoint)
    lines = []
    for options in formats or (config.options,):
        own = replace(config, options=options)
        conversion = own.conversion(checkpoint)
        conversion.writes_card = True
        targets = output_targets(base_name, output, conversion, sizes)
        lines.append(_Line(config=own, conversion=conversion, targets=targets))
    return lines


def _forecast(
    lines: Sequence[_Line],
    config: QuantizeConfig,
    work: Path,
    progress: Progress,
    *,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
) -> None:
    # Tells the progress what all outputs will take; refuses what cannot be made, and disks without room for all.
    measured, measurement = (None, None) if given is None else (given.measurement, given.path)
    forecasts = [
        forecast_outputs(
            line.conversion,
            line.targets,
            config.measure,
            config.evaluate,
            work,
            measured=measured,
            measurement=measurement,
            rows=calibration,
        )
        for line in lines
    ]
    require_together([(line.conversion, each) for line, each in zip(lines, forecasts, strict=True)], work, measurement)
    announce(
        progress,
        {path: each for together in forecasts for path, each in together.items()},
        {path: line.conversion for line in lines for path in line.targets},
        config,
        work,
        known=measured or calibration,
        measurement=measurement,
        series=True,
    )


def _make_all(
    jobs: Sequence[Job], targets: Sequence[Mapping[Path, Target]], work: Path
) -> tuple[tuple[SeriesOutput, ...], Path]:
    # The outputs, and the measurement file that they were made from.
    shared = RunArtifacts(work)
    for job in jobs:
        for name, identity in job.conversion.prepare(work, job.progress, job.measurement):
            shared.add(name, identity)
    given = jobs[0].given or _measured(jobs, work / MEASURING)
    ready = [replace(job, given=given, calibration=None) for job in jobs]
    outputs = tuple(
        _make(job, path, target, work) for job, own in zip(ready, targets, strict=True) for path, target in own.items()
    )
    shared.discard()
    return outputs, given.path


def _measured(jobs: Sequence[Job], work: Path) -> GivenMeasurement:
    first = jobs[0]
    measured, _ = load_or_measure(
        first.checkpoint,
        first.config.measure,
        lambda: [job.conversion.curves() for job in jobs],
        work,
        StepClock(),
        first.progress,
        given=None,
        calibration=first.calibration,
        check_rows=None if first.judge is None else first.judge.check_text,
    )
    discard_artifacts(work, MEASURED, measured.provenance)
    return GivenMeasurement(work / MEASUREMENT_FILE, measured)


def _make(job: Job, path: Path, target: Target, work: Path) -> SeriesOutput:
    size = target.label if target.size_of is None else f"size of {target.size_of}"
    asked = SeriesOutput(path=path, format=job.config.format.name, asked=size)
    try:
        with reserved(path, files_beside(path, job.conversion, job.config.format)):
            made = make_output(job, path, target, work / path.name)
    except BrokenModelError as cause:
        return replace(asked, broken=str(cause))
    return replace(
        asked,
        path=made.output,
        bpw=made.verification.bpw,
        file_bytes=made.verification.file_bytes,
        predicted_nats=made.plan.damage_nats,
        comparison=made.comparison,
    )
