"""The whole line for GGUF: measure, choose types, convert, round, write, verify, evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..convert.checkpoint import Checkpoint
from ..convert.content import file_digests
from ..convert.files import private_directory
from ..convert.gguf.assign import dominant_file_type, mixture_types
from ..convert.gguf.base import converter_digest, converter_files, make_base
from ..convert.gguf.check import check_base
from ..convert.gguf.ggml import Bytes
from ..convert.gguf.header import GgufHeader, read_gguf_header
from ..convert.gguf.imatrix import ImportanceMatrix, imatrix_metadata, read_imatrix, require_fitting
from ..convert.gguf.mixtures import mixture
from ..convert.gguf.names import architecture_of, gguf_name, row_order
from ..convert.gguf.reader import GgufModel
from ..convert.gguf.readers import LIMITS_KEY, require_llama_cpp
from ..convert.gguf.writer import GgufVerification, planned_bytes, write_gguf
from ..convert.mark import mark_path
from ..convert.original import Original, open_model
from ..convert.places import check_run, refuse_inputs, reserved, work_beside
from ..convert.work import RunStages, StageDirectory, discard_stage, stages_in
from ..errors import BudgetError, CheckpointError, FormatError, UnsupportedModelError, WorkDirectoryError
from ..eval.comparison import Comparison
from ..eval.layers import LinearCost
from ..eval.overlap import SPANS_KEY, CalibrationSpans
from ..eval.report import carried_over, earlier_details, report_names, summary_lines, write_report
from ..measure.calibration import CalibrationSet
from ..measure.measurement import Measurement
from ..measure.run import MEASURED, measured_rows
from ..progress import Progress, silent
from ..rounding.parallel import cores
from ..version import __version__
from .cards import card_path, write_card
from .fallbacks import damping_fallbacks, fallback_entries, fallback_lines
from .hidden_states import Drift, drift_section
from .judge import Judge, refuse_marked
from .obtain import MEASUREMENT_FILE, PLAN_FILE, check_work, load_measurement, obtain_measurement
from .options import GgufConfig
from .rounding_pass import ROUNDED
from .stages import StageClock, StageCost, cost_line, cost_section
from .support import largest_file_bytes, require_gguf, require_mixture, require_types
from .type_plan import TypePlan, make_type_plan
from .type_rounding import (
    RoundedTypes,
    round_types,
    table_importance,
    type_rounding_identity,
    types_rounded_before,
)

__all__ = [
    "GgufConfig",
    "GgufResult",
    "base_path",
    "convert_to_mixture",
    "discard_base",
    "importance_of",
    "prepare_base",
    "quantize_to_gguf",
    "refuse_others",
]

_BASE = "base"
"""Name of the stage in the work directory that holds the unquantized file."""

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
    costs: tuple[StageCost, ...]
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
    config.reader_warnings(checkpoint)
    refuse_others(output)
    work = work or work_beside(output)
    directories, read = checkpoint.directories, (measurement, base)
    check_run(output, work, directories=directories, files=read, offload=config.offload_dirs)
    check_work(work)
    with reserved(output, _beside(output)):
        checkpoint.prepare_fingerprint(progress)
        measured = None if measurement is None else load_measurement(measurement, checkpoint)
        require_gguf(checkpoint, output, config, measured=measured, rows=calibration)
        if judge is None and config.evaluate is not None:
            judge = Judge(checkpoint, config.evaluate, progress)
        with stages_in(work) as stages:
            return _quantize(checkpoint, output, config, measurement, calibration, work, stages, base, judge, progress)


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
    with reserved(output, _beside(output)), private_directory(output) as private:
        require_mixture(checkpoint, chosen, matrix, evaluated=judge is not None)
        if judge is not None:
            judge.check_text(None)
        made = base or private / "base.gguf"
        warnings = () if base else _converted(checkpoint, made, llama_cpp)
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
    return verification, (*limits, *warnings)


def importance_of(measurement: Measurement) -> ImportanceMatrix:
    """Return the importances that a measurement implies: weighted mean squares of every linear's inputs.

    Tokens count as the end loss says (see ``bpwise.measure.statistics``), where llama.cpp's own tool counts all alike.

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
    measurement: Path | None,
    calibration: CalibrationSet | None,
    work: Path,
    stages: RunStages,
    base: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> GgufResult:
    clock = StageClock()
    limits = config.reader_warnings(checkpoint)
    if base is None:
        base = _undamaged(base_path(checkpoint, work, config.llama_cpp))
        stages.add(_BASE, _base_identity(checkpoint, config.llama_cpp))
    # The converter first: should it not know the model, nothing has been measured in vain.
    with clock.stage("convert"):
        warnings = prepare_base(checkpoint, base, config)
    header = read_gguf_header(base)

    def check_rows(rows: CalibrationSet) -> None:
        if judge is not None:
            judge.check_text(rows)
        if measurement is None:
            require_types(checkpoint, config, None, _tensor_bytes(header, checkpoint, config, rows))

    measured, rows = obtain_measurement(
        checkpoint,
        config.measure,
        work,
        clock,
        progress,
        given=measurement,
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
    verification = None
    rounded: RoundedTypes | None = None
    finished = output.exists()
    if not finished:
        if config.feedback:
            with clock.stage("round"):
                rounded = round_types(
                    checkpoint,
                    measured,
                    plan,
                    work,
                    device=config.measure.device,
                    offload_dir=config.measure.offload_dir,
                    progress=progress,
                )
        with clock.stage("write and verify"):
            types = {_gguf_name(name): kind for name, kind in plan.kinds.items()}
            verification = write_gguf(
                base,
                output,
                types,
                file_type=dominant_file_type(types, header),
                encoded={} if rounded is None else _in_file_order(rounded, base),
                distances={} if rounded is None else _distances(rounded),
                importance=importance_of(measured).mean_squares,
                metadata=_metadata(run, rows, limits),
                threads=cores(),
            )
    elif str(read_gguf_header(output).metadata.get(_RUN_KEY)) != run:
        raise WorkDirectoryError(
            f"{output}: exists already and is not the output of this run. Choose another name or delete it."
        )
    else:
        # There, if the run was cut off while it was evaluated.
        rounded = types_rounded_before(checkpoint, plan, work, device=config.measure.device)
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
        warnings=(*limits, *warnings),
        fallbacks={} if rounded is None else damping_fallbacks(measured, rounded.dampings()),
        drift=() if rounded is None else tuple(rounded.drift()),
        measurement=measurement or work / MEASUREMENT_FILE,
    )
    if judge is not None and comparison is not None:
        costs = [LinearCost(tensor.name, tensor.kind.bits_per_weight, tensor.damage_nats) for tensor in plan.tensors]
        earlier = earlier_details(output.parent, comparison, prefix=f"{output.stem}.") if finished else {}
        details = {**carried_over(_report_details(result), earlier), **judge.details()}
        write_report(comparison, output.parent, details, costs=costs, prefix=f"{output.stem}.")
        judge.sentence(output, comparison, predicted_nats=plan.damage_nats)
    if config.card:
        write_card(output, original=checkpoint.directory, base_model=config.base_model)
    return result


def _metadata(run: str, rows: CalibrationSet, limits: Sequence[str]) -> dict[str, str]:
    return {
        _RUN_KEY: run,
        "bpwise.version": __version__,
        "bpwise.calibration": rows.description,
        f"bpwise.{SPANS_KEY}": CalibrationSpans.of(rows).to_text(),
        **({LIMITS_KEY: "\n".join(limits)} if limits else {}),
    }


def refuse_others(output: Path) -> None:
    """Refuse an output that is no file of ours; whether it is this run's own shows when the plan is known.

    Raises:
        WorkDirectoryError: It is something else.
        FormatError: It is no GGUF file.
    """
    if output.exists() and (output.is_dir() or _RUN_KEY not in read_gguf_header(output).metadata):
        raise WorkDirectoryError(
            f"{output}: exists already and is not the output of this run. Choose another name or delete it."
        )


def base_path(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None) -> Path:
    """Return where a run keeps the model as an unquantized GGUF file: as any piece, never mixed with another run's.

    Args:
        checkpoint: The model.
        work: Work directory.
        llama_cpp: As in ``GgufConfig``.
    """
    return StageDirectory(work, _BASE, _base_identity(checkpoint, llama_cpp)).path / "base.gguf"


def discard_base(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None) -> None:
    """Delete what ``base_path`` names; its arguments are the same."""
    discard_stage(work, _BASE, _base_identity(checkpoint, llama_cpp))


def _base_identity(checkpoint: Checkpoint, llama_cpp: Path | None) -> dict[str, Any]:
    return {
        "model": checkpoint.fingerprint,
        "files": _carried(checkpoint),
        "converter": converter_digest(llama_cpp),
    }


def _beside(output: Path) -> list[str]:
    # Names of all files that may come to lie beside it.
    return [*report_names(f"{output.stem}."), card_path(output).name, mark_path(output).name]


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    # The vocabulary and the chat templates in a GGUF file are those of the files that the converter saw.
    names = converter_files(checkpoint.directory)
    digests = file_digests([checkpoint.file(name) for name in names], CheckpointError)
    return dict(zip(names, digests, strict=True))


def _undamaged(base: Path) -> Path:
    # What an earlier run converted and cannot be read any more is converted again.
    if base.exists():
        try:
            read_gguf_header(base)
        except FormatError:
            base.unlink()
    return base


def prepare_base(checkpoint: Checkpoint, base: Path, config: GgufConfig) -> tuple[str, ...]:
    """Convert a model to the unquantized file that a run works from, unless it is there; return what was left out.

    Args:
        checkpoint: The model.
        base: The file, as ``base_path`` names it.
        config: Says where the converter is, and whether the file will have to be read.

    Raises:
        BpwiseError: As ``make_base`` and ``check_base``; or it holds a variant of the architecture that is not read.
    """
    warnings = _converted(checkpoint, base, config.llama_cpp)
    if config.feedback or config.evaluate is not None:
        GgufModel.open(base)
    return warnings


def _converted(checkpoint: Checkpoint, base: Path, llama_cpp: Path | None) -> tuple[str, ...]:
    if not base.exists():
        make_base(checkpoint, base, llama_cpp=llama_cpp)
    return tuple(check_base(base, checkpoint))


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
