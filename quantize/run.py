"""The whole pipeline for one output: measure, plan, round, write, evaluate. Every step goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.files.paths import named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, run_artifacts
from ..checkpoint.source.original import Original, open_model
from ..convert.conversion import Provenance, Target
from ..convert.model import Verification
from ..convert.plan import Plan
from ..convert.publishing.cards import write_card
from ..convert.rounding import Drift, RoundedModel, Rounder
from ..eval.comparison import Comparison
from ..eval.metrics.overlap import CalibrationSpans
from ..eval.report.content import Report
from ..eval.report.report import carried_over, earlier_details, write_report
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.run import MEASURED
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from ..version import __version__
from .checks import (
    check_output,
    check_places,
    files_beside,
    forecast_outputs,
    output_of,
    report_place,
    require_convertible,
    run_prefix,
)
from .config import Job, QuantizeConfig
from .judge import Judge, refuse_marked
from .measuring import MEASUREMENT_FILE, PLAN_FILE, GivenMeasurement, load_or_measure
from .recipe import recipe_of, write_recipe
from .result import QuantizeResult, report_details
from .rounding.fallbacks import damping_fallbacks
from .rounding.model import RoundConfig, round_model, rounded_before, rounding_identity
from .rounding.rounding_pass import ROUNDED
from .times import announce
from .timing.costs import StepClock

__all__ = ["make_output", "quantize_model"]


def quantize_model(
    model: Original,
    output: Path,
    config: QuantizeConfig,
    *,
    measurement: Path | None = None,
    calibration: CalibrationSet | None = None,
    work: Path | None = None,
    judge: Judge | None = None,
    progress: Progress = silent,
) -> QuantizeResult:
    """Quantize a model, and compare the result with the original.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: Directory or file to make. It must not exist, or be the finished output of this very run.
        config: Options.
        measurement: A measurement of this model; None measures first, and keeps the measurement in the work
            directory. It brings its calibration rows along.
        calibration: Rows to use instead of those that ``config.measure.calibration`` describes; not with a measurement.
        work: Work directory; default ``OUTPUT.work``.
        judge: What evaluates, to be shared with other outputs of the same model; made from ``config.evaluate`` if None.
        progress: Shows how far the steps are.

    Returns:
        What was made.

    Raises:
        BrokenModelError: The output's predictions are useless; it is marked, and the measurement kept.
        BpwiseError: What is wrong with the model, the options, the text, the tools or the disk.

    Example:
        >>> from pathlib import Path
        >>> from bpwise import QuantizeConfig, Target, quantize_model
        >>> result = quantize_model("llama", Path("llama-4bpw"), QuantizeConfig(target=Target(bpw=4.0)))
        >>> 3.9 < result.verification.bpw <= 4.0
        True
    """
    checkpoint = open_model(model)
    output = named(Path(output))
    work = work or work_beside(output)
    conversion = config.conversion(checkpoint)
    require_convertible(conversion)
    check_places(conversion, config, output, work, measurement)
    with reserved(output, files_beside(output, conversion, config.format)):
        check_output(conversion, config, output, progress)
        given = GivenMeasurement.load(measurement, checkpoint, progress)
        measured = None if given is None else given.measurement
        forecasts = forecast_outputs(
            conversion,
            {output: config.target},
            config.measure,
            config.evaluate,
            work,
            measured=measured,
            measurement=measurement,
            rows=calibration,
        )
        known = measured or calibration
        announce(progress, forecasts, conversion, config, work, known=known, measurement=measurement)
        if judge is None and config.evaluate is not None:
            judge = Judge(checkpoint, config.evaluate, progress)
        job = Job(
            conversion=conversion,
            config=config,
            given=given,
            calibration=calibration,
            calibrated=known is None,
            judge=judge,
            progress=progress,
        )
        return make_output(job, output, config.target, work)


def make_output(job: Job, output: Path, target: Target | None, work: Path) -> QuantizeResult:
    """Quantize a model once it is made sure of all that may be in the way.

    Args:
        job: What all outputs share.
        output: As for ``quantize_model``.
        target: How large it may be.
        work: Its work directory.

    Raises:
        BpwiseError: As ``quantize_model``.
    """
    with run_artifacts(work) as artifacts:
        return _OutputRun(job, output, target, work, artifacts).result()


@dataclass(frozen=True, slots=True)
class _Made:
    """An output that is there, and what is known of its rounding; see ``QuantizeResult``."""

    verification: Verification
    fallbacks: Mapping[str, float] = field(default_factory=dict)
    drift: tuple[Drift, ...] = ()


class _OutputRun:
    """The steps for one output, in their order."""

    def __init__(self, job: Job, output: Path, target: Target | None, work: Path, artifacts: RunArtifacts) -> None:
        self._job = job
        self._output = output
        self._target = target
        self._work = work
        self._artifacts = artifacts
        self._clock = StepClock()
        measure = job.config.measure
        self._round_config = RoundConfig(device=measure.device, offload_dir=measure.offload_dir)

    def result(self) -> QuantizeResult:
        job, conversion = self._job, self._job.conversion
        if job.judge is not None and not conversion.measures:
            job.judge.check_text(None)
        with self._clock.step("prepare"):
            for name, identity in conversion.prepare(self._work, job.progress, job.measurement):
                self._artifacts.add(name, identity)
        if job.judge is not None:
            conversion.require_readable()
        measured, rows = self._measured() if conversion.measures else (None, None)
        with self._clock.step("plan"):
            plan = conversion.plan(measured, self._target, self._provenance(rows))
        if measured is not None:
            plan.save(self._work / PLAN_FILE)
        run, self._output = self._identity(rows, plan), conversion.placed(self._output, plan)
        finished = output_of(self._output, job.config.format, run)
        made = self._made(plan, measured, rows, run, finished=finished)
        write_recipe(self._output, recipe_of(job.config, self._target, job.checkpoint, calibrated=job.calibrated))
        comparison = self._compared(plan)
        place = report_place(self._output, job.config.format)
        result = QuantizeResult(
            output=self._output,
            plan=plan,
            verification=made.verification,
            original_bytes=job.checkpoint.total_bytes,
            comparison=comparison,
            costs=tuple(self._clock.costs),
            fallbacks=made.fallbacks,
            drift=made.drift,
            measurement=self._measurement_file(),
            report=None if comparison is None else place.directory / f"{place.prefix}report.html",
            experts=None if measured is None else measured.experts_sentence,
            precision=None if measured is None else measured.precision,
            warnings=(*conversion.warnings, *conversion.notes),
            beside=tuple(filter(Path.exists, conversion.beside(self._output))),
            details=conversion.details,
        )
        self._report(result, finished=finished)
        return result

    def _measured(self) -> tuple[Measurement, CalibrationSet]:
        job = self._job

        def check_rows(rows: CalibrationSet) -> None:
            if job.judge is not None:
                job.judge.check_text(rows)
            measured = None if job.given is None else job.given.measurement
            job.conversion.forecast(self._target, measured, self._provenance(rows))

        measured, rows = load_or_measure(
            job.checkpoint,
            job.config.measure,
            lambda: [job.conversion.curves()],
            self._work,
            self._clock,
            job.progress,
            given=job.given,
            calibration=job.calibration,
            check_rows=check_rows,
        )
        self._artifacts.add(MEASURED, measured.provenance)
        return measured, rows

    def _made(
        self,
        plan: Plan,
        measured: Measurement | None,
        rows: CalibrationSet | None,
        run: str,
        *,
        finished: bool,
    ) -> _Made:
        job, config = self._job, self._round_config
        rounder = None if measured is None else job.conversion.rounder(plan, measured)
        rounded = None
        if rounder is not None:
            self._artifacts.add(ROUNDED, rounding_identity(job.checkpoint, plan, rounder, config))
        if finished:
            if rounder is not None:  # there, if the run was cut off while it was evaluated
                rounded = rounded_before(job.checkpoint, plan, rounder, config, self._work)
            verification = job.config.format.verify(self._output)
        else:
            if rounder is not None and measured is not None:
                rounded = self._rounded(plan, measured, rounder)
            with self._clock.step("write and verify"):
                verification = job.conversion.write(
                    rounded, self._output, plan, measured, self._provenance(rows, run), job.progress
                )
        if rounded is None or measured is None:
            return _Made(verification)
        # Now: what is in the work directory may go while the output is evaluated.
        drift = () if job.conversion.refines else tuple(rounded.drift())
        return _Made(verification, damping_fallbacks(measured, rounded.numbers("damping")), drift)

    def _rounded(self, plan: Plan, measured: Measurement, rounder: Rounder) -> RoundedModel:
        job, config = self._job, self._round_config
        with self._clock.step("round"):
            rounded = round_model(job.checkpoint, measured, plan, rounder, config, self._work, job.progress)
        if job.conversion.refines:
            with self._clock.step("tune"):
                device = resolve_device(config.device)
                job.conversion.refine(rounded, plan, measured, device, config.offload_dir, job.progress)
        return rounded

    def _compared(self, plan: Plan) -> Comparison | None:
        judge = self._job.judge
        if judge is None:
            refuse_marked(self._output)
            return None
        with self._clock.step("evaluate"):
            model = self._job.conversion.opened(self._output)
            return judge.compare(self._output, model, predicted_nats=plan.damage_nats)

    def _report(self, result: QuantizeResult, *, finished: bool) -> None:
        # Of a finished output, with what an earlier report told of its making.
        job, place = self._job, report_place(self._output, self._job.config.format)
        if job.judge is not None and result.comparison is not None:
            directory, prefix = place.directory, place.prefix
            earlier = earlier_details(directory, result.comparison, prefix=prefix) if finished else {}
            report = Report(
                comparisons=(result.comparison,),
                costs=(result.plan.costs(),),
                details={**carried_over(report_details(result), earlier), **job.judge.details()},
            )
            write_report(report, directory, prefix=prefix)
            job.judge.mark_if_broken(self._output, result.comparison, predicted_nats=result.plan.damage_nats)
        if job.conversion.writes_card:
            write_card(self._output, original=job.checkpoint.directory, base_model=job.config.base_model)

    def _measurement_file(self) -> Path | None:
        return (self._job.measurement or self._work / MEASUREMENT_FILE) if self._job.conversion.measures else None

    def _provenance(self, rows: CalibrationSet | None, run: str = "0" * 32) -> Provenance:
        checkpoint, warnings = self._job.checkpoint, self._job.conversion.warnings
        checkpoint.prepare_fingerprint(self._job.progress)
        if rows is None:
            return Provenance(version=__version__, run=run, model=checkpoint.fingerprint, warnings=warnings)
        return Provenance(
            version=__version__,
            run=run,
            model=checkpoint.fingerprint,
            changes=checkpoint.changes,
            base_model=self._job.config.base_model_of(checkpoint),
            calibration=rows.fingerprint,
            calibration_text=rows.description,
            calibration_spans=CalibrationSpans.of(rows).to_text(),
            calibration_shape=(int(rows.tokens.shape[0]), int(rows.tokens.shape[1])),
            warnings=warnings,
        )

    def _identity(self, rows: CalibrationSet | None, plan: Plan) -> str:
        # What the written bytes depend on; runs on one model begin alike.
        checkpoint = self._job.checkpoint
        parts = [
            __version__,
            checkpoint.fingerprint,
            None if rows is None else rows.fingerprint,
            plan.identity(),
            self._job.conversion.identity(),
        ]
        return run_prefix(checkpoint) + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
