"""The whole line: measure, allocate, round, write, verify, evaluate. Every stage goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.paths import check_run, named, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, run_artifacts
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.hub import side_files
from ..checkpoint.source.language import Exl2Names
from ..checkpoint.source.original import Original, open_model
from ..convert.exl2.file.manifest import read_manifest
from ..convert.exl2.file.verify import Verification, verify_model
from ..convert.exl2.file.writer import write_model
from ..convert.exl2.plan.plan import Plan, make_plan
from ..convert.exl2.plan.unquantized import unquantized_lines
from ..convert.exl2.rounding.rounder import (
    RoundConfig,
    RoundedModel,
    round_model,
    rounded_before,
    rounding_identity,
    tune_model,
)
from ..convert.publishing.cards import write_card
from ..convert.rounded import Drift, drift_section
from ..errors import CheckpointError, WorkDirectoryError
from ..eval.comparison import Comparison
from ..eval.metrics.overlap import SPANS_KEY, CalibrationSpans
from ..eval.report.report import carried_over, earlier_details, summary_lines, write_report
from ..measure.measurement import Measurement
from ..measure.run import MEASURED
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from ..version import __version__
from .costs import StepClock, StepCost, cost_line, cost_section
from .judge import Judge, refuse_marked
from .measuring import MEASUREMENT_FILE, PLAN_FILE, GivenMeasurement, check_work, load_or_measure
from .options import QuantizeConfig
from .planning import plan_costs
from .rounding.fallbacks import damping_fallbacks, fallback_entries, fallback_lines
from .rounding.rounding_pass import ROUNDED
from .support import exists, require_exl2

__all__ = [
    "QuantizeConfig",
    "QuantizeResult",
    "is_finished",
    "make_exl2",
    "quantize_model",
    "report_details",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a run made.

    Attributes:
        output: The EXL2 directory.
        plan: The bits of every linear, with the predicted damage.
        verification: What was read back from the written files.
        original_bytes: Size of the original tensors.
        comparison: Original against quantized, or None if evaluation was left out.
        costs: Time and memory of every stage that ran.
        fallbacks: Linears whose Gram matrix could not be factored with the measured damping, and the damping that it
            took (infinite: rounded without error feedback).
        drift: How far the hidden states after each block are from the original's; empty if nothing was rounded now, or
            scales were tuned after that.
        measurement: The measurement file, which serves any other bitrate.
        experts: How many experts calibration text hardly reached; None for a model without experts.
        warnings: What EXL2 readers compute otherwise than Transformers.
    """

    output: Path
    plan: Plan
    verification: Verification
    original_bytes: int
    comparison: Comparison | None
    costs: tuple[StepCost, ...]
    fallbacks: Mapping[str, float]
    drift: tuple[Drift, ...]
    measurement: Path
    experts: str | None
    warnings: tuple[str, ...]

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        plan, verified = self.plan, self.verification
        lines = [
            f"size        {verified.file_bytes / 2**20:.1f} MiB, {verified.file_bytes / self.original_bytes:.1%} of the"
            f" original; decoder {verified.decoder_bpw:.4f} bpw (asked {plan.target_bpw:g}), "
            f"head {verified.head_bpw:.4f} bpw",
            *(f"float16     {line}" for line in unquantized_lines(plan.kept, plan.head_reason)),
            f"predicted   {plan.damage_nats:.6f} nats/token, at most {100 * plan.gap:.3f} % above the best possible",
            *([] if self.comparison is None else summary_lines(self.comparison)),
            *(f"warning     {warning}" for warning in self.warnings),
        ]
        if self.experts is not None:
            lines.append(f"experts     {self.experts}")
        lines += fallback_lines(self.fallbacks)
        lines += map(cost_line, self.costs)
        lines.append(f"measurement {self.measurement} serves any other bitrate")
        report = " (with README.md)" if self.comparison is None else " (with README.md, report.html, report.md, ...)"
        lines.append(f"output      {self.output}{report}")
        return lines


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
    """Quantize a model to EXL2 and compare the result with the original.

    Args:
        model: A local directory, a hub id, or what ``open_model`` made of one.
        output: Directory to make. It must not exist, or be the finished output of this very run.
        config: Options.
        measurement: A measurement of this model; None measures first, and keeps the measurement in the work
            directory. It brings its calibration rows along.
        calibration: Rows to use instead of those that ``config.measure.calibration`` describes; not with a measurement.
        work: Work directory; default ``OUTPUT.work``.
        judge: What evaluates, to be shared with other outputs of the same model; made from ``config.evaluate`` if None.
        progress: Shows how far the stages are.

    Returns:
        What was made.

    Raises:
        BrokenModelError: The output's predictions are useless; it is marked, and the measurement kept.
        BpwiseError: Whatever is wrong with the model, the options, the text or the disk.
    """
    checkpoint = open_model(model)
    output = named(output)
    work = work or work_beside(output)
    check_run(output, work, directories=checkpoint.directories, files=(measurement,), offload=config.offload_dirs)
    check_work(work)
    with reserved(output):
        if exists(output):
            checkpoint.prepare_fingerprint(progress)
        is_finished(output, model=lambda: checkpoint.fingerprint)
        given = GivenMeasurement.load(measurement, checkpoint, progress)
        require_exl2(
            checkpoint, {output: config}, measured=None if given is None else given.measurement, rows=calibration
        )
        if judge is None and config.evaluate is not None:
            judge = Judge(checkpoint, config.evaluate, progress)
        return make_exl2(checkpoint, output, config, given, calibration, work, judge, progress)


def make_exl2(
    checkpoint: Checkpoint,
    output: Path,
    config: QuantizeConfig,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    work: Path,
    judge: Judge | None,
    progress: Progress,
) -> QuantizeResult:
    """Quantize a model as ``quantize_model`` does once it has made sure of all that may be in the way.

    Args:
        checkpoint: The model.
        output: As for ``quantize_model``.
        config: As for ``quantize_model``.
        given: The measurement that was given, as it was read; None measures first.
        calibration: As for ``quantize_model``.
        work: Work directory.
        judge: What evaluates; None leaves that out.
        progress: As for ``quantize_model``.
    """
    with run_artifacts(work) as stages:
        return _quantize(checkpoint, output, config, given, calibration, work, stages, judge, progress)


def _quantize(
    checkpoint: Checkpoint,
    output: Path,
    config: QuantizeConfig,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    work: Path,
    stages: RunArtifacts,
    judge: Judge | None,
    progress: Progress,
) -> QuantizeResult:
    clock = StepClock()
    measured, rows = load_or_measure(
        checkpoint,
        config.measure,
        work,
        clock,
        progress,
        given=given,
        calibration=calibration,
        check_rows=None if judge is None else judge.check_text,
    )
    with clock.stage("plan"):
        plan = make_plan(
            measured,
            bpw=config.bpw,
            size=config.size_limit(checkpoint),
            head_bits=config.head_bits,
            overrides=config.overrides,
            keep_fp16=config.keep_fp16,
        )
        plan.save(work / PLAN_FILE)
    rounding = RoundConfig(device=config.measure.device, offload_dir=config.measure.offload_dir)
    stages.add(MEASURED, measured.provenance)
    stages.add(ROUNDED, rounding_identity(checkpoint, plan, rounding))
    run = _identity(checkpoint, rows, plan, config)
    fallbacks: dict[str, float] = {}
    drift: list[Drift] = []
    finished = is_finished(output, run=lambda: run)
    if finished:
        verification = verify_model(output)
        before = rounded_before(checkpoint, plan, rounding, work)
        if before is not None:  # cut off while it was evaluated
            fallbacks, drift = _fallbacks(before, measured), [] if config.effort == "high" else before.drift()
    else:
        with clock.stage("round"):
            rounded = round_model(checkpoint, measured, plan, rounding, work, progress)
            fallbacks, drift = _fallbacks(rounded, measured), rounded.drift()
        if config.effort == "high":
            with clock.stage("tune"):
                rounded, drift = tune_model(rounded, measured, rounding, progress), []
        with clock.stage("write and verify"):
            verification = _write(checkpoint, rounded, output, plan, rows, config, run)
    comparison = None
    if judge is None:
        refuse_marked(output)
    else:
        with clock.stage("evaluate"):
            comparison = judge.compare(output, predicted_nats=plan.damage_nats)
    result = QuantizeResult(
        output=output,
        plan=plan,
        verification=verification,
        original_bytes=checkpoint.total_bytes,
        comparison=comparison,
        costs=tuple(clock.costs),
        fallbacks=fallbacks,
        drift=tuple(drift),
        measurement=work / MEASUREMENT_FILE if given is None else given.path,
        experts=measured.experts_sentence,
        warnings=config.reader_warnings(checkpoint),
    )
    if judge is not None and comparison is not None:
        earlier = earlier_details(output, comparison) if finished else {}
        details = {**carried_over(report_details(result), earlier), **judge.details()}
        write_report(comparison, output, details, costs=plan_costs(plan))
        judge.mark_if_broken(output, comparison, predicted_nats=plan.damage_nats)
    write_card(output, original=checkpoint.directory, base_model=config.base_model)
    return result


def report_details(result: QuantizeResult) -> dict[str, dict[str, str | float]]:
    """Return what a report should say of the run beside the comparison: section -> entry -> value."""
    plan, verified = result.plan, result.verification
    return {
        "Size": {
            "decoder bits per weight": round(verified.decoder_bpw, 4),
            "asked": plan.target_bpw,
            "head bits per weight": round(verified.head_bpw, 4),
            "quantized files, bytes": verified.file_bytes,
            "original tensors, bytes": result.original_bytes,
            "quantized / original": round(verified.file_bytes / result.original_bytes, 4),
        },
        "Plan": {
            "predicted damage, nats/token": plan.damage_nats,
            "of it in the decoder": plan.decoder_damage_nats,
            "least possible damage at this size": plan.lower_bound_nats,
            **{
                f"decoder weights at {bits} bits, %": round(100 * share, 2)
                for bits, share in plan.weights_per_width().items()
            },
            **{
                f"in float16, reason {number}": line
                for number, line in enumerate(unquantized_lines(plan.kept, plan.head_reason), 1)
            },
            **({} if result.experts is None else {"experts": result.experts}),
            **fallback_entries(result.fallbacks),
        },
        **cost_section(result.costs),
        **drift_section(result.drift),
    }


def _identity(checkpoint: Checkpoint, rows: CalibrationSet, plan: Plan, config: QuantizeConfig) -> str:
    # What the written bytes depend on.
    linears = (*plan.linears, *([plan.head] if plan.head else []))
    parts = [
        __version__,
        checkpoint.fingerprint,
        file_digests([checkpoint.file(name) for name in side_files(checkpoint.directory)], CheckpointError),
        rows.fingerprint,
        plan.measurement,
        plan.target_bpw,
        plan.head_bits,
        [(linear.name, linear.group_bits) for linear in linears],
        config.effort,
        config.shard_bytes,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _fallbacks(rounded: RoundedModel, measurement: Measurement) -> dict[str, float]:
    return damping_fallbacks(measurement, {name: rounded.damping(name) for name in rounded.names})


def is_finished(output: Path, **expected: Callable[[], str]) -> bool:
    """Return whether an output is there with these entries in its provenance.

    Args:
        output: EXL2 directory, or where it shall be.
        **expected: What makes entries of its manifest's provenance, as ``model``, the original's fingerprint; called
            only if something is there, for a fingerprint may have to read the whole model.

    Raises:
        WorkDirectoryError: Something else is in the way.
    """
    if not exists(output):
        return False
    manifest = read_manifest(output) if output.is_dir() else None
    if manifest is not None and all(getattr(manifest.provenance, key) == value() for key, value in expected.items()):
        return True
    raise WorkDirectoryError(
        f"{output}: exists already and is not the output of this run. Choose another or delete it."
    )


def _write(
    checkpoint: Checkpoint,
    rounded: RoundedModel,
    output: Path,
    plan: Plan,
    rows: CalibrationSet,
    config: QuantizeConfig,
    run: str,
) -> Verification:
    row_count, row_tokens = rows.tokens.shape
    written = Exl2Names(rounded.source)
    return write_model(
        written,
        {written.prefix + name: partial(rounded.linear, name) for name in rounded.names},
        output,
        quantization={
            "version": __version__,
            "bits": plan.target_bpw,
            "head_bits": plan.head_code_bits,
            "calibration": {"rows": row_count, "length": row_tokens, "dataset": rows.description},
        },
        provenance={
            "bpwise": __version__,
            "run": run,
            "model": checkpoint.fingerprint,
            **({"changes": checkpoint.changes} if checkpoint.changes else {}),
            "calibration": rows.fingerprint,
            SPANS_KEY: CalibrationSpans.of(rows).to_text(),
            "measurement": plan.measurement,
            "bpw": plan.bpw,
            "head_bits": plan.head_bits,
            "float16_linears": len(plan.kept),
            "effort": config.effort,
            "predicted_damage_nats": plan.damage_nats,
        },
        float16=[written.prefix + linear.name for linear in plan.kept],
        shard_bytes=config.shard_bytes,
    )
