"""The whole line for GGUF: measure, choose types, convert, round, write, verify, evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.files.atomic import private_directory, require_room
from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.paths import check_run, refuse_foreign, refuse_inputs, reserved, work_beside
from ..checkpoint.files.resume import RunArtifacts, run_artifacts
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.original import Original, open_model
from ..convert.gguf.base import BASE, base_identity, base_path, base_to_make, converted, prepare_base
from ..convert.gguf.file.header import GgufHeader, read_gguf_header
from ..convert.gguf.file.names import architecture_of, gguf_name, row_order
from ..convert.gguf.file.reader import GgufModel
from ..convert.gguf.file.writer import GgufVerification, planned_bytes, write_gguf
from ..convert.gguf.ggml.kernels import Bytes
from ..convert.gguf.llama_cpp.assign import dominant_file_type, mixture_types
from ..convert.gguf.llama_cpp.converter import find_converter
from ..convert.gguf.llama_cpp.imatrix import ImportanceMatrix, imatrix_metadata, read_imatrix, require_fitting
from ..convert.gguf.llama_cpp.mixtures import mixture
from ..convert.gguf.llama_cpp.readers import LIMITS_KEY, require_llama_cpp
from ..convert.gguf.plan import TypePlan, make_type_plan
from ..convert.gguf.rounder import (
    RoundedTypes,
    round_types,
    table_importance,
    type_rounding_identity,
    types_rounded_before,
)
from ..convert.publishing.cards import card_path, write_card
from ..convert.publishing.mark import mark_path
from ..convert.rounded import Drift, drift_section
from ..errors import BudgetError, FormatError, UnsupportedModelError, WorkDirectoryError
from ..eval.comparison import Comparison
from ..eval.metrics.overlap import SPANS_KEY, CalibrationSpans
from ..eval.report.layers import LinearCost
from ..eval.report.report import carried_over, earlier_details, report_names, summary_lines, try_report, write_report
from ..linalg.parallel import cores
from ..measure.measurement import Measurement
from ..measure.run import MEASURED, measured_rows
from ..measure.text.calibration import CalibrationSet
from ..progress import Progress, silent
from ..version import __version__
from .costs import StepClock, StepCost, cost_line, cost_section
from .judge import Judge, refuse_marked
from .measuring import MEASUREMENT_FILE, PLAN_FILE, GivenMeasurement, check_work, load_or_measure
from .options import GgufConfig
from .rounding.fallbacks import damping_fallbacks, fallback_entries, fallback_lines
from .rounding.rounding_pass import ROUNDED
from .support import largest_file_bytes, require_gguf, require_gguf_tools, require_mixture, require_types

__all__ = [
    "GgufConfig",
    "GgufResult",
    "convert_to_mixture",
    "files_beside",
    "importance_of",
    "make_gguf",
    "quantize_to_gguf",
    "refuse_others",
]

_CARD_SENTENCE = b"quantized to a GGUF file with bpwise."
"""What cards of GGUF files say."""

_RUN_KEY = "bpwise.run"
_ALIGNMENT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufResult:
    """What a run made.

    Attributes:
        output: The GGUF file.
        plan: The type of every tensor, with the predicted damage.
        verification: What was read back from the written file; None if an earlier run had written it.
        file_bytes: Size of the file.
        original_bytes: Size of the original tensors.
        comparison: Original against quantized, or None if evaluation was left out.
        costs: Time and memory of every stage that ran.
        warnings: What llama.cpp computes otherwise than Transformers, and what its converter left out.
        fallbacks: As in ``QuantizeResult``; empty if nothing was rounded now.
        drift: How far the hidden states after each block are from the original's; empty if nothing was rounded now.
        measurement: The measurement file, which serves any other size and format.
    """

    output: Path
    plan: TypePlan
    verification: GgufVerification | None
    file_bytes: int
    original_bytes: int
    comparison: Comparison | None
    costs: tuple[StepCost, ...]
    warnings: tuple[str, ...]
    fallbacks: Mapping[str, float]
    drift: tuple[Drift, ...]
    measurement: Path

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        plan = self.plan
        shares = ", ".join(f"{name} {share:.1%}" for name, share in plan.weights_per_type().items())
        lines = [
            f"size        {self.file_bytes / 2**20:.1f} MiB, {self.file_bytes / self.original_bytes:.1%} of the"
            f" original; {plan.bpw:.4f} bpw over all tensors",
            f"types       {shares}",
            f"predicted   {plan.damage_nats:.6f} nats/token with feedback, at most {100 * plan.gap:.3f} % above the"
            " best possible",
            *([] if self.comparison is None else summary_lines(self.comparison)),
            *(f"warning     {warning}" for warning in self.warnings),
            *fallback_lines(self.fallbacks),
        ]
        lines += map(cost_line, self.costs)
        lines.append(f"measurement {self.measurement} serves any other size, and EXL2")
        lines.append(f"output      {self.output}")
        return lines


def quantize_to_gguf(
    model: Original,
    output: Path,
    config: GgufConfig,
    *,
    measurement: Path | None = None,
    calibration: CalibrationSet | None = None,
    work: Path | None = None,
    base: Path | None = None,
    judge: Judge | None = None,
    progress: Progress = silent,
) -> GgufResult:
    """Quantize a model to a GGUF file for llama.cpp and compare the result with the original.

    Args:
        model: A local directory, a hub id, or what ``open_model`` made of one.
        output: File to make. It must not exist, or be the finished output of this very run.
        config: Options.
        measurement: A measurement of this model; None measures first, and keeps the measurement in the work
            directory. It brings its calibration rows along.
        calibration: Rows to use instead of those that ``config.measure.calibration`` describes; not with a measurement.
        work: Work directory; default ``OUTPUT.work``.
        base: The model as an unquantized GGUF file; None converts it.
        judge: What evaluates, to be shared with other outputs of the same model; made from ``config.evaluate`` if None.
        progress: Shows how far the stages are.

    Returns:
        What was made.

    Raises:
        BrokenModelError: The output's predictions are useless; it is marked, and the measurement kept.
        BpwiseError: Whatever is wrong with the model, the options, the text or the disk; or ggml's library or
            llama.cpp's converter is not installed.
    """
    checkpoint = open_model(model)
    require_gguf_tools(checkpoint, config, base=base)
    refuse_others(output, config)
    work = work or work_beside(output)
    directories, read = checkpoint.directories, (measurement, base)
    check_run(output, work, directories=directories, files=read, offload=config.offload_dirs)
    check_work(work)
    with reserved(output, files_beside(output)):
        given = GivenMeasurement.load(measurement, checkpoint, progress)
        require_gguf(
            checkpoint,
            {output: config},
            base=base_to_make(work) if base is None else None,
            measured=None if given is None else given.measurement,
            rows=calibration,
        )
        if judge is None and config.evaluate is not None:
            judge = Judge(checkpoint, config.evaluate, progress)
        return make_gguf(checkpoint, output, config, given, calibration, work, base, judge, progress)


def make_gguf(
    checkpoint: Checkpoint,
    output: Path,
    config: GgufConfig,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    work: Path,
    base: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> GgufResult:
    """Quantize a model as ``quantize_to_gguf`` does once it has made sure of all that may be in the way.

    Args:
        checkpoint: The model.
        output: As for ``quantize_to_gguf``.
        config: As for ``quantize_to_gguf``.
        given: The measurement that was given, as it was read; None measures first.
        calibration: As for ``quantize_to_gguf``.
        work: Work directory.
        base: As for ``quantize_to_gguf``.
        judge: What evaluates; None leaves that out.
        progress: As for ``quantize_to_gguf``.
    """
    with run_artifacts(work) as stages:
        return _quantize(checkpoint, output, config, given, calibration, work, stages, base, judge, progress)


def convert_to_mixture(
    model: Original,
    output: Path,
    name: str,
    *,
    imatrix: Path | None = None,
    base: Path | None = None,
    llama_cpp: Path | None = None,
    judge: Judge | None = None,
    progress: Progress = silent,
) -> tuple[GgufVerification, tuple[str, ...]]:
    """Quantize a model with one of llama.cpp's fixed mixtures: byte for byte what llama-quantize makes.

    Args:
        model: A local directory, a hub id, or what ``open_model`` made of one.
        output: File to make; it must not exist.
        name: The mixture, such as ``Q4_K_M``.
        imatrix: An importance matrix in either of llama.cpp's formats.
        base: The model as an unquantized GGUF file; None converts it.
        llama_cpp: As in ``GgufConfig``.
        judge: What the file will be compared by; its text is checked first. None if it will not be compared.
        progress: Shows how far the writing is.

    Returns:
        What was read back, and what llama.cpp computes otherwise than Transformers or its converter left out.

    Raises:
        BpwiseError: As ``quantize_to_gguf``.
    """
    chosen = mixture(name)
    if output.exists():
        raise WorkDirectoryError(f"{output}: exists already. Choose another name or delete it.")
    matrix = None if imatrix is None else read_imatrix(imatrix)
    checkpoint = open_model(model)
    refuse_inputs(output, directories=checkpoint.directories, files=(imatrix, base))
    limits = require_llama_cpp(checkpoint.config)
    with reserved(output, files_beside(output)), private_directory(output) as private:
        require_mixture(checkpoint, chosen, matrix, evaluated=judge is not None)
        if base is None:
            find_converter(llama_cpp)
            require_room(output, checkpoint.total_bytes)
        if judge is not None:
            judge.check_text(None)
        made = base or private / "base.gguf"
        left_out = () if base else converted(checkpoint, made, llama_cpp)
        header = read_gguf_header(made)
        if judge is not None:
            GgufModel.open(made)
        if matrix is not None:
            require_fitting(matrix, {name: tensor.shape for name, tensor in header.tensors.items()})
        verification = write_gguf(
            made,
            output,
            mixture_types(chosen, header, importance=None if matrix is None else matrix.sums.keys()),
            file_type=chosen.file_type,
            importance=None if matrix is None else matrix.mean_squares,
            metadata={} if matrix is None else imatrix_metadata(matrix, str(imatrix)),
            threads=cores(),
            progress=progress,
        )
    return verification, (*limits, *left_out)


def importance_of(measurement: Measurement) -> ImportanceMatrix:
    """Return the importances that a measurement implies: weighted mean squares of every linear's inputs.

    Tokens count as the end loss says (see ``bpwise.measure.statistics.inputs``), where llama.cpp counts all alike.

    Raises:
        UnsupportedModelError: A linear has no name in llama.cpp.
    """
    table = measurement.embedding
    heads = () if table.tied else (measurement.head,)
    means = {_gguf_name(x.name): torch.from_numpy(x.input_power) for x in (*measurement.linears, *heads)}
    means[_gguf_name(table.name)] = table_importance(measurement)
    rows, row_tokens = measurement.tokens.shape
    return ImportanceMatrix.from_means(
        means,
        rows * row_tokens,
        datasets=(measured_rows(measurement).description,),
        chunks=rows,
        chunk_tokens=row_tokens,
    )


def _quantize(
    checkpoint: Checkpoint,
    output: Path,
    config: GgufConfig,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    work: Path,
    stages: RunArtifacts,
    base: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> GgufResult:
    clock = StepClock()
    limits = config.reader_warnings(checkpoint)
    checkpoint.prepare_fingerprint(progress)
    if base is None:
        base = base_path(checkpoint, work, config.llama_cpp)
        stages.add(BASE, base_identity(checkpoint, config.llama_cpp))
    # The converter first: should it not know the model, nothing has been measured in vain.
    with clock.stage("convert"):
        left_out = prepare_base(checkpoint, base, config)
    header = read_gguf_header(base)

    def check_rows(rows: CalibrationSet) -> None:
        if judge is not None:
            judge.check_text(rows)
        if given is None:
            require_types(checkpoint, config, None, _tensor_bytes(header, checkpoint, config, rows))

    measured, rows = load_or_measure(
        checkpoint,
        config.measure,
        work,
        clock,
        progress,
        given=given,
        calibration=calibration,
        check_rows=check_rows,
    )
    with clock.stage("plan"):
        tensor_bytes = _tensor_bytes(header, checkpoint, config, rows)
        plan = make_type_plan(measured, bpw=config.bpw, tensor_bytes=tensor_bytes, overrides=config.overrides)
        plan.save(work / PLAN_FILE)
    stages.add(MEASURED, measured.provenance)
    stages.add(ROUNDED, type_rounding_identity(checkpoint, plan, config.measure.device))
    run = _identity(checkpoint, rows, plan, config, file_digests([base], FormatError, progress)[0])
    finished = output.exists()
    verification, rounded = None, None
    if finished:
        _refuse_other_runs(output, run)
        # There, if the run was cut off while it was evaluated.
        rounded = types_rounded_before(checkpoint, plan, work, device=config.measure.device)
    else:
        if config.feedback:
            with clock.stage("round"):
                rounded = _round(checkpoint, measured, plan, work, config, progress)
        with clock.stage("write and verify"):
            verification = _write(base, output, plan, rounded, measured, _metadata(run, rows, limits))
    comparison = None
    if judge is None:
        refuse_marked(output)
    else:
        with clock.stage("evaluate"):
            comparison = judge.compare(output, predicted_nats=plan.damage_nats)
    result = GgufResult(
        output=output,
        plan=plan,
        verification=verification,
        file_bytes=output.stat().st_size,
        original_bytes=checkpoint.total_bytes,
        comparison=comparison,
        costs=tuple(clock.costs),
        warnings=(*limits, *left_out),
        fallbacks={} if rounded is None else damping_fallbacks(measured, rounded.dampings()),
        drift=() if rounded is None else tuple(rounded.drift()),
        measurement=work / MEASUREMENT_FILE if given is None else given.path,
    )
    if judge is not None and comparison is not None:
        _report(result, comparison, judge, finished=finished)
    if config.card:
        write_card(output, original=checkpoint.directory, base_model=config.base_model)
    return result


def _round(
    checkpoint: Checkpoint, measured: Measurement, plan: TypePlan, work: Path, config: GgufConfig, progress: Progress
) -> RoundedTypes:
    return round_types(
        checkpoint,
        measured,
        plan,
        work,
        device=config.measure.device,
        offload_dir=config.measure.offload_dir,
        progress=progress,
    )


def _write(
    base: Path,
    output: Path,
    plan: TypePlan,
    rounded: RoundedTypes | None,
    measured: Measurement,
    metadata: Mapping[str, str],
) -> GgufVerification:
    types = {_gguf_name(name): kind for name, kind in plan.kinds.items()}
    return write_gguf(
        base,
        output,
        types,
        file_type=dominant_file_type(types, read_gguf_header(base)),
        encoded={} if rounded is None else _in_file_order(rounded, base),
        distances={} if rounded is None else _distances(rounded),
        importance=importance_of(measured).mean_squares,
        metadata=metadata,
        threads=cores(),
    )


def _report(result: GgufResult, comparison: Comparison, judge: Judge, *, finished: bool) -> None:
    # The report beside the file; of a finished one, with what an earlier report told of its making.
    output, plan = result.output, result.plan
    directory, prefix = output.parent, f"{output.stem}."
    costs = [LinearCost(tensor.name, tensor.kind.bits_per_weight, tensor.damage_nats) for tensor in plan.tensors]
    earlier = earlier_details(directory, comparison, prefix=prefix) if finished else {}
    details = {**carried_over(_report_details(result), earlier), **judge.details()}
    write_report(comparison, directory, details, costs=costs, prefix=prefix)
    judge.mark_if_broken(output, comparison, predicted_nats=plan.damage_nats)


def _metadata(run: str, rows: CalibrationSet, limits: Sequence[str]) -> dict[str, str]:
    return {
        _RUN_KEY: run,
        "bpwise.version": __version__,
        "bpwise.calibration": rows.description,
        f"bpwise.{SPANS_KEY}": CalibrationSpans.of(rows).to_text(),
        **({LIMITS_KEY: "\n".join(limits)} if limits else {}),
    }


def refuse_others(output: Path, config: GgufConfig) -> None:
    """Refuse an output that is no file of ours; whether it is this run's own shows when the plan is known.

    Args:
        output: The file to make, with report and card beside it.
        config: Says which of the two are made.

    Raises:
        WorkDirectoryError: It is something else, or files of others lie where report and card shall be.
        FormatError: It is no GGUF file.
    """
    if output.exists():
        _refuse_other_runs(output, None)
    if config.evaluate is not None:
        try_report(output.parent, prefix=f"{output.stem}.")
    if config.card:
        refuse_foreign(card_path(output), _is_card, "a card", advice="move it away")


def _refuse_other_runs(output: Path, run: str | None) -> None:
    # None: of whichever run it is.
    found = None if output.is_dir() else read_gguf_header(output).metadata.get(_RUN_KEY)
    if found is None or (run is not None and str(found) != run):
        raise WorkDirectoryError(
            f"{output}: exists already and is not the output of this run. Choose another name or delete it."
        )


def _is_card(path: Path) -> bool:
    try:
        return _CARD_SENTENCE in path.read_bytes()
    except OSError:
        return False


def files_beside(output: Path) -> list[str]:
    """Return the names of all files that may come to lie beside an output."""
    return [*report_names(f"{output.stem}."), card_path(output).name, mark_path(output).name]


def _tensor_bytes(header: GgufHeader, checkpoint: Checkpoint, config: GgufConfig, rows: CalibrationSet) -> int | None:
    # What a largest size leaves for tensors beside the file's own metadata; None where bits per weight are asked for.
    max_bytes = largest_file_bytes(checkpoint, config)
    if max_bytes is None:
        return None
    tensors = sum(tensor.size_bytes for tensor in header.tensors.values())
    metadata = _metadata("0" * 32, rows, config.reader_warnings(checkpoint))
    overhead = planned_bytes(header, {}, file_type=0, metadata=metadata)
    room = max_bytes - (overhead - tensors) - _ALIGNMENT_BYTES * len(header.tensors)
    if room <= 0:
        raise BudgetError(
            f"a file of {max_bytes} bytes has no room for tensors: metadata and vocabulary take {max_bytes - room}. "
            "Ask for a larger file."
        )
    return room


def _identity(checkpoint: Checkpoint, rows: CalibrationSet, plan: TypePlan, config: GgufConfig, base: str) -> str:
    # What the written bytes depend on.
    types = [(tensor.name, tensor.type) for tensor in plan.tensors]
    parts = [
        __version__,
        checkpoint.fingerprint,
        base,
        rows.fingerprint,
        plan.measurement,
        types,
        config.feedback,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _distances(rounded: RoundedTypes) -> dict[str, float]:
    return {_gguf_name(name): distance for name, distance in rounded.distances().items()}


def _in_file_order(rounded: RoundedTypes, base: Path) -> dict[str, Callable[[], Bytes]]:
    # What makes each tensor's bytes, by its name in the file, with the file's order of rows.
    model = GgufModel.open(base)
    architecture = architecture_of(model.header.metadata["general.architecture"])

    def data(name: str) -> Bytes:
        order = row_order(f"{name}.weight", architecture, model.config)
        rows = rounded.data(name)
        return rows if order is None else rows[order.numpy()]

    return {_gguf_name(name): partial(data, name) for name in rounded.names}


def _gguf_name(module: str) -> str:
    name = gguf_name(f"{module}.weight")
    if name is None:
        raise UnsupportedModelError(
            f"{module}: has no name in GGUF. Expected a linear of a family that GGUF output is for (docs/families.md). "
            "Choose an EXL2 output."
        )
    return name


def _report_details(result: GgufResult) -> dict[str, dict[str, str | float]]:
    plan = result.plan
    return {
        "Size": {
            "bits per weight, all tensors": round(plan.bpw, 4),
            "file, bytes": result.file_bytes,
            "original tensors, bytes": result.original_bytes,
            "quantized / original": round(result.file_bytes / result.original_bytes, 4),
        },
        "Plan": {
            "predicted damage, nats/token": plan.damage_nats,
            "least possible damage at this size": plan.lower_bound_nats,
            **{f"weights in {name}, %": round(100 * share, 2) for name, share in plan.weights_per_type().items()},
            **fallback_entries(result.fallbacks),
        },
        **cost_section(result.costs),
        **drift_section(result.drift),
    }
