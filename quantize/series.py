"""Several sizes and formats from one measurement: an output each, the original evaluated once, one report over all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, discard_artifacts, run_artifacts
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.original import Original
from ..convert.conversion import Conversion, Target
from ..convert.options import FormatOptions
from ..convert.registry import format_asking
from ..errors import BrokenModelError, CalibrationError, ConfigError, FormatError
from ..eval.config import EvalConfig
from ..eval.models import model_name
from ..eval.report.report import try_report
from ..eval.report.series import SeriesOutput, series_table, write_series_report
from ..measure.calibrated import CALIBRATION_FILE, kept_rows
from ..measure.measurement import Measurement
from ..measure.run import MEASURED, MeasureConfig
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, default_progress
from ..tables import bytes_text, html_summary
from .checks import check_output, check_places, files_beside, require_convertible
from .config import Job, QuantizeConfig, chosen_evaluation, options_naming, original_for
from .measuring import MEASUREMENT_FILE, MEASURING, GivenMeasurement, check_work, load_or_measure
from .output import finished_output, make_output
from .result import QuantizeResult
from .run import begin_jobs
from .timing.costs import StepClock, minutes

__all__ = ["SeriesOutput", "SeriesResult", "output_targets", "quantize_series"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SeriesResult:
    """What a series made.

    Attributes:
        outputs: One for each size, in the order asked; of several formats, all of the first before those of the next.
        report: The report over all: a page, or Markdown where nothing was evaluated.
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
        facts = [*self.warnings, f"Report: {self.report}"]
        return html_summary(self.report.parent.name, facts, series_table(self.outputs))

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        if all(output.repeated for output in self.outputs):
            return [f"finished already: {self.report.parent} holds what this command makes"]
        lines = [f"warning     {warning}" for warning in self.warnings]
        for output in self.outputs:
            kl = "" if output.kl is None else f", KL {output.kl:.3g} nats/token, {output.verdict}"
            assert output.bpw is not None
            assert output.file_bytes is not None
            lines.append(f"output      {output.path}: {output.bpw:.4f} bpw, {bytes_text(output.file_bytes)}{kl}")
        lines.append(f"measurement {self.measurement} serves any other bitrate")
        return [*lines, f"total       {minutes(self.seconds)}", f"report      {self.report}"]


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
                check_output(self.conversion, self.config, path, work / path.name, progress)


def quantize_series(
    model: Original,
    output: str | Path,
    sizes: Sequence[float | Target],
    *,
    measurement: Measurement | str | Path | None = None,
    calibration: CalibrationSet | None = None,
    options: FormatOptions | Sequence[FormatOptions] | None = None,
    measure: MeasureConfig | None = None,
    evaluate: EvalConfig | bool = True,
    cache: bool = True,
    base_model: str | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> SeriesResult:
    """Quantize a model to several sizes; finished ones are not made again when a run goes on.

    A broken output is marked and does not keep the others from being made. Every output has a model card.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: Directory that the outputs, ``report.html``, ``report.md`` and ``report.json`` go into.
        sizes: Bits per weight or other targets, each once.
        measurement: A measurement of this model, or its file; None measures first, once for all formats. It brings its
            calibration rows along.
        calibration: Rows to use instead of those that ``measure.calibration`` describes; not with a measurement.
        options: ``GgufOptions`` or ``Exl2Options``, which choose the format too, or several to make every size in each
            format; None for EXL2's defaults.
        measure: Options of measuring.
        evaluate: Options of the comparisons; True for the defaults, False leaves them out.
        cache: As for ``quantize_model``.
        base_model: Hub id of the original, for the model cards.
        work: Work directory; default ``OUTPUT.work``.
        progress: Shows how far the run is; None for bars in a notebook, and nothing elsewhere.

    Returns:
        What was made.

    Raises:
        BrokenModelError: At least one output is broken; all are made, and the report is written.
        BpwiseError: As ``quantize_model``.

    Example:
        >>> from bpwise import quantize_series
        >>> result = quantize_series("llama", "series", [8.0, 4.0], measurement="m.safetensors")
        >>> [output.path.name for output in result.outputs]
        ['llama-8.0bpw-6hb-exl2', 'llama-4.0bpw-6hb-exl2']
    """
    if not sizes or len(set(sizes)) < len(sizes):
        raise ConfigError(f"sizes: not usable. Got {list(sizes)}. Expected at least one, and each once. Choose others.")
    output, shown = named(Path(output)), progress or default_progress()
    work = work_beside(output) if work is None else Path(work)
    config = QuantizeConfig(
        measure=measure or MeasureConfig(), evaluate=chosen_evaluation(evaluate), base_model=base_model
    )
    each_format = [options or options_naming(output)] if not isinstance(options, Sequence) else options
    checkpoint = original_for(model, config.measure, measurement, options=each_format)
    lines = _lines(checkpoint, output, config, sizes, each_format)
    read = None if measurement is None or isinstance(measurement, Measurement) else Path(measurement)
    for line in lines:
        line.check(work, read, shown)
    check_work(work / MEASURING)
    try_report(output)
    given = GivenMeasurement.load(measurement, checkpoint, shown)
    parts = [(line.conversion, line.config, line.targets) for line in lines]
    jobs = begin_jobs(parts, work, given=given, calibration=calibration, cache=cache, progress=shown, series=True)
    with reserved(output), run_artifacts(work) as shared:
        targets = [line.targets for line in lines]
        found, used = _finished_before(jobs, targets, work)
        if used is None or len(found) < sum(map(len, targets)):
            found, used = _make_all(jobs, targets, work, shared, found)
        outputs = tuple(found.values())
        counted = {line.config.format.title: line.config.format.bpw_means for line in lines}
        report = write_series_report(model_name(checkpoint), outputs, output, counted)
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
        warnings=tuple(dict.fromkeys(warning for line in lines for warning in line.conversion.warnings)),
        seconds=time.monotonic() - jobs[0].started,
    )


def _lines(
    checkpoint: Checkpoint,
    output: Path,
    config: QuantizeConfig,
    sizes: Sequence[float | Target],
    formats: Sequence[FormatOptions],
) -> list[_Line]:
    base_name = config.base_model or model_name(checkpoint)
    lines = []
    for options in formats:
        own = replace(config, options=format_asking(options).completed(options, sized=True))
        conversion = own.conversion(checkpoint)
        conversion.writes_card = True
        targets = output_targets(base_name, output, conversion, sizes)
        lines.append(_Line(config=own, conversion=conversion, targets=targets))
    return lines


def _finished_before(
    jobs: Sequence[Job], targets: Sequence[Mapping[Path, Target]], work: Path
) -> tuple[dict[Path, SeriesOutput], Path | None]:
    # As ``_make_all``, for what earlier runs have made: nothing is converted to know that.
    given, kept = jobs[0].given, work / MEASURING / MEASUREMENT_FILE
    if given is None:
        given = _measured_before(jobs[0], kept)
    elif given.path is None:
        given = replace(given, path=kept)
    if given is None or given.path is None:
        return {}, None
    found: dict[Path, SeriesOutput] = {}
    for job, own in zip(jobs, targets, strict=True):
        ready = replace(job, given=given, calibration=None)
        for path, target in own.items():
            output = _make(ready, path, target, work, finished_output)
            if output is not None:
                found[path] = output
    return found, given.path


def _measured_before(job: Job, kept: Path) -> GivenMeasurement | None:
    # What an earlier run has measured on the rows that this one asks for; its other options are the outputs' to know.
    rows, config = job.calibration, job.config.measure
    try:
        if rows is None:
            place = kept.with_name(CALIBRATION_FILE)
            rows = kept_rows(job.checkpoint, config.calibration, place, device=config.device)
        if rows is None or not kept.is_file():
            return None
        measured = Measurement.load(kept)
    except (CalibrationError, FormatError):  # damaged: all is gone over
        return None
    return GivenMeasurement(kept, measured) if measured.provenance.get("calibration") == rows.fingerprint else None


def _make_all(
    jobs: Sequence[Job],
    targets: Sequence[Mapping[Path, Target]],
    work: Path,
    shared: RunArtifacts,
    found: Mapping[Path, SeriesOutput],
) -> tuple[dict[Path, SeriesOutput], Path]:
    # The outputs, and the measurement file that they were made from; those that were found are not made again.
    for job, own in zip(jobs, targets, strict=True):
        for name, identity in job.conversion.prepare(work, job.progress, job.measurement):
            shared.add(name, identity)
        job.check_sizes(own.values(), job.calibration)
    given = jobs[0].given
    if given is None or given.path is None:
        given = GivenMeasurement(work / MEASURING / MEASUREMENT_FILE, _measured(jobs, targets, work / MEASURING))
    ready = [replace(job, given=given, calibration=None) for job in jobs]
    outputs: dict[Path, SeriesOutput] = {}
    for job, own in zip(ready, targets, strict=True):
        for path, target in own.items():
            output = found.get(path) or _make(job, path, target, work, make_output)
            assert output is not None, "whatever is made is there"
            outputs[path] = output
    assert given.path is not None
    return outputs, given.path


def _measured(jobs: Sequence[Job], targets: Sequence[Mapping[Path, Target]], work: Path) -> Measurement:
    first = jobs[0]

    def check_rows(rows: CalibrationSet) -> None:
        if first.judge is not None:
            first.judge.check_text(rows)
        for job, own in zip(jobs, targets, strict=True):
            job.check_sizes(own.values(), rows)

    measured, _ = load_or_measure(
        first.checkpoint,
        first.config.measure,
        lambda: [job.conversion.curves() for job in jobs],
        work,
        StepClock(),
        first.progress,
        given=first.given,
        calibration=first.calibration,
        check_rows=check_rows,
    )
    discard_artifacts(work, MEASURED, measured.provenance)
    return measured


def _make(
    job: Job, path: Path, target: Target, work: Path, make: Callable[[Job, Path, Target, Path], QuantizeResult | None]
) -> SeriesOutput | None:
    size = target.label if target.size_of is None else f"size of {target.size_of}"
    asked = SeriesOutput(path=path, format=job.config.format.name, asked=size)
    try:
        with reserved(path, files_beside(path, job.conversion, job.config.format)):
            made = make(job, path, target, work / path.name)
    except BrokenModelError as cause:
        return replace(asked, broken=str(cause))
    if made is None:
        return None
    return replace(
        asked,
        path=made.output,
        bpw=made.verification.bpw,
        file_bytes=made.verification.file_bytes,
        predicted_nats=made.plan.damage_nats,
        comparison=made.comparison,
        repeated=made.repeated,
    )
