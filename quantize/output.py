"""The steps for one output: prepare, measure, plan, round, write, evaluate. Each goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.files.resume import RunArtifacts, run_artifacts
from ..convert.conversion import Target
from ..convert.model import Verification
from ..convert.plan import Plan
from ..convert.rounding import Drift, Refinement, RoundedModel, Rounder
from ..errors import CalibrationError, FormatError
from ..eval.comparison import Comparison
from ..eval.publishing.cards import card_path, write_card
from ..eval.publishing.mark import read_mark
from ..eval.report.content import Report
from ..eval.report.report import carried_over, clear_report, earlier_details, read_comparison, write_report
from ..measure.calibrated import CALIBRATION_FILE, kept_rows
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.run import MEASURED, measured_with
from ..measure.text.calibration import CalibrationSet
from ..version import __version__
from .checks import command_digest, output_of, report_place, run_prefix
from .config import Job
from .judge import refuse_marked
from .measuring import FINISHED_FILE, MEASUREMENT_FILE, PLAN_FILE, FinishedCommand, content_digest, load_or_measure
from .recipe import recipe_of, write_recipe
from .result import QuantizeResult, report_details
from .rounding.fallbacks import damping_fallbacks
from .rounding.model import RoundConfig, round_model, rounded_before, rounding_identity
from .rounding.rounding_pass import ROUNDED
from .timing.costs import StepClock

__all__ = ["finished_output", "make_output"]

_log = logging.getLogger(__name__)


def finished_output(job: Job, output: Path, target: Target | None, work: Path) -> QuantizeResult | None:
    """Return what an earlier run of the same command has made, None if it has not; arguments as for ``make_output``.

    Raises:
        BrokenModelError: It is marked as broken.
        BpwiseError: It cannot be read.
    """
    if not (work / FINISHED_FILE).is_file():
        return None
    with run_artifacts(work) as artifacts:
        return _OutputRun(job, output, target, work, artifacts).finished_before()


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
        run = _OutputRun(job, output, target, work, artifacts)
        result = run.result()
        artifacts.discard()  # first: a command that finds nothing to do lets none go
        run.finish()
    return result


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
        self._asked = self._output = output
        self._target = target
        self._work = work
        self._artifacts = artifacts
        self._clock = StepClock()
        self._finished: FinishedCommand | None = None
        measure = job.config.measure
        self._round_config = RoundConfig(device=measure.device, offload_dir=measure.offload_dir)

    def result(self) -> QuantizeResult:
        return self.finished_before() or self._run()

    def finish(self) -> None:
        kept = not self._job.conversion.measures or (self._work / PLAN_FILE).exists()  # not cleared away meanwhile
        if self._finished is not None and kept:
            self._finished.save(self._work)

    def finished_before(self) -> QuantizeResult | None:
        # A command that has finished left what it was in its work directory: nothing is converted to know that.
        job, recorded = self._job, self._recorded(complete=True)
        if recorded is None:
            return None
        output, plan = recorded
        refuse_marked(output)
        comparison = None if job.judge is None else _reported(job, output)
        whole = card_path(output).is_file() or not job.conversion.writes_card
        if not whole or (comparison is None) != (job.judge is None):
            return None
        self._output = output
        return self._result(plan, _Made(job.config.format.verify(output)), comparison, repeated=True)

    def _recorded(self, *, complete: bool) -> tuple[Path, Plan] | None:
        # The output of an earlier run of this command, and its plan; one that was cut off later only if not complete.
        job, conversion, folder = self._job, self._job.conversion, self._output.parent
        try:
            record = FinishedCommand.find(self._work, folder, conversion, self._command, job.progress)
            if record is None or (complete and not record.complete):
                return None
            output = record.opened_in(folder)
            plan = conversion.finished_plan(output, self._work / PLAN_FILE)
        except (FormatError, CalibrationError):
            return None
        made = record.is_from(plan) and (not conversion.measures or output_of(output, job.config.format, record.run))
        return (output, plan) if made else None

    def _command(self) -> str:
        job, config = self._job, self._job.config
        measured, rows = None if job.given is None else job.given.measurement, job.calibration
        if measured is None and rows is None:
            calibration, kept = config.measure.calibration, self._work / CALIBRATION_FILE
            rows = kept_rows(job.checkpoint, calibration, kept, device=config.measure.device)
        return command_digest(job.conversion, config, self._target, self._asked, measured, rows)

    def _run(self) -> QuantizeResult:
        job, conversion = self._job, self._job.conversion
        if job.judge is not None and not conversion.measures:
            job.judge.check_text(None)
        with self._clock.step("prepare"):
            for name, identity in conversion.prepare(self._work, job.progress, job.measurement):
                self._artifacts.add(name, identity)
        if job.judge is not None:
            conversion.require_readable()
        if conversion.measures:
            job.check_sizes([self._target], job.calibration)
        measured, rows = self._measured() if conversion.measures else (None, None)
        with self._clock.step("plan"):
            plan = conversion.plan(measured, self._target, job.provenance(rows))
        for fact in plan.describe().facts:
            _log.debug("plan for %s: %s", self._output, fact)
        run, self._output = _identity(job, rows, plan), conversion.placed(self._output, plan)
        finished = bool(not conversion.measures and self._recorded(complete=False)) or output_of(
            self._output, job.config.format, run
        )
        if measured is not None:
            plan.save(self._work / PLAN_FILE)
        made = self._made(plan, measured, rows, run, finished=finished)
        told = run if conversion.measures else content_digest(self._output, job.config.format)
        record = FinishedCommand.of(self._command(), told, plan, self._output, complete=False)
        if not conversion.measures:  # the output says nothing of its run: what comes may be cut off
            record.save(self._work)
        write_recipe(self._output, _recipe(job, self._target, measured, rows))
        earlier = _reported(job, self._output) if finished else None
        comparison = earlier or self._compared(plan)
        repeated = finished and (job.judge is None or earlier is not None)
        result = self._result(plan, made, comparison, measured, repeated=repeated)
        _report(job, self._output, result, finished=finished)
        self._finished = replace(record, complete=True)
        return result

    def _result(
        self,
        plan: Plan,
        made: _Made,
        comparison: Comparison | None,
        measured: Measurement | None = None,
        *,
        repeated: bool,
    ) -> QuantizeResult:
        job, conversion = self._job, self._job.conversion
        place = report_place(self._output, job.config.format)
        return QuantizeResult(
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
            seconds=time.monotonic() - job.started,
            repeated=repeated,
        )

    def _measured(self) -> tuple[Measurement, CalibrationSet]:
        job = self._job

        def check_rows(rows: CalibrationSet) -> None:
            if job.judge is not None:
                job.judge.check_text(rows)
            job.check_sizes([self._target], rows)

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
                    rounded, self._output, plan, measured, job.provenance(rows, run), job.progress
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
                device, states = resolve_device(config.device), config.offload_dir
                how = Refinement(measurement=measured, device=device, offload_dir=states, progress=job.progress)
                job.conversion.refine(rounded, rounder, how)
        return rounded

    def _compared(self, plan: Plan) -> Comparison | None:
        judge = self._job.judge
        if judge is None:
            refuse_marked(self._output)
            return None
        with self._clock.step("evaluate"):
            model = self._job.conversion.opened(self._output)
            return judge.compare(self._output, model, predicted_nats=plan.damage_nats)

    def _measurement_file(self) -> Path | None:
        job = self._job
        return (job.measurement or self._work / MEASUREMENT_FILE) if job.conversion.measures else None


def _recipe(
    job: Job, target: Target | None, measured: Measurement | None, rows: CalibrationSet | None
) -> dict[str, Any]:
    config = job.config
    if measured is not None and not job.measured_here:
        config = replace(config, measure=measured_with(measured))
    return recipe_of(config, target, job.checkpoint, None if rows is None else rows.options)


def _reported(job: Job, output: Path) -> Comparison | None:
    # What an earlier run of the same command measured; None where it did not come so far.
    judge, place = job.judge, report_place(output, job.config.format)
    found = read_comparison(place.directory, prefix=place.prefix)
    if judge is None or found is None or read_mark(output) is not None:
        return None
    return found if judge.made(found, job.conversion.opened(output)) else None


def _report(job: Job, output: Path, result: QuantizeResult, *, finished: bool) -> None:
    # Of a finished output, with what an earlier report told of its making.
    place = report_place(output, job.config.format)
    if job.judge is not None and result.comparison is not None:
        if not result.repeated:
            directory, prefix = place.directory, place.prefix
            earlier = earlier_details(directory, result.comparison, prefix=prefix) if finished else {}
            report = Report(
                comparisons=(result.comparison,),
                costs=(result.plan.costs(),),
                details={**carried_over(report_details(result), earlier), **job.judge.details()},
            )
            write_report(report, directory, prefix=prefix)
        else:
            clear_report(place.directory, place.prefix)
        job.judge.mark_if_broken(output, result.comparison, predicted_nats=result.plan.damage_nats)
    if job.conversion.writes_card:
        write_card(output, original=job.checkpoint.directory, base_model=job.config.base_model)


def _identity(job: Job, rows: CalibrationSet | None, plan: Plan) -> str:
    # What the written bytes depend on; runs on one model begin alike.
    checkpoint = job.checkpoint
    parts = [
        __version__,
        checkpoint.fingerprint,
        None if rows is None else rows.fingerprint,
        plan.identity(),
        job.conversion.identity(job.config.base_model_of(checkpoint)),
    ]
    return run_prefix(checkpoint) + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
