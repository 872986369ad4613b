"""What is in a file or directory that bpwise reads or writes, as a table of facts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files.safetensors_file import load_metadata
from ..checkpoint.files.schemas import read_json
from ..checkpoint.model.names import HEAD
from ..checkpoint.source.original import open_model
from ..convert.exl2.file.reader import Exl2Model, is_exl2
from ..convert.exl2.plan.plan import LinearPlan, Plan
from ..convert.exl2.plan.unquantized import unquantized_lines
from ..convert.gguf.file.header import is_gguf, read_gguf_header
from ..convert.gguf.plan import TYPE_PLAN_KEY, TypePlan
from ..errors import FormatError
from ..measure.measurement import HEADER_KEY, FormatCurves, Measurement
from ..measure.text.calibration import CalibrationSet

__all__ = ["Inspection", "inspect_path"]

_SHOWN_VALUES = 8
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A description.

    Attributes:
        kind: What the thing is.
        facts: Lines about the whole.
        header: Names of the table's columns.
        rows: One row a linear or tensor, as text.
    """

    kind: str
    facts: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def inspect_path(path: Path) -> Inspection:
    """Describe an EXL2 directory, a checkpoint directory, a GGUF file, a measurement, a calibration set or a plan.

    Raises:
        BpwiseError: It is none of these, or damaged.
    """
    if path.is_dir():
        return _exl2(path) if is_exl2(path) else _checkpoint(path)
    if is_gguf(path):
        return _gguf(path)
    if path.suffix == ".json":
        return _type_plan(path) if TYPE_PLAN_KEY in read_json(path, FormatError) else _plan(path)
    if path.suffix == ".safetensors":
        return _measurement(path) if HEADER_KEY in load_metadata(path) else _calibration(path)
    raise FormatError(
        f"{path}: cannot be inspected, expected a model directory, a GGUF file, a .safetensors measurement or "
        "calibration set, or a plan.json."
    )


def _widths(bits: Sequence[int], rows: Sequence[int]) -> str:
    counts: Counter[int] = Counter()
    for width, count in zip(bits, rows, strict=True):
        counts[width] += count
    total = sum(rows)
    return " ".join(f"{width}:{100 * counts[width] / total:.0f}%" for width in sorted(counts, reverse=True))


def _exl2(path: Path) -> Inspection:
    model = Exl2Model.open(path)
    rows = []
    bits = weights = 0
    for name in model.linears:
        linear = model.linear(name)
        size = linear.in_features * linear.out_features
        if name.rpartition(".")[2] != HEAD:
            bits += linear.stored_bits
            weights += size
        rows.append(
            (
                name,
                f"{linear.in_features} x {linear.out_features}",
                f"{linear.stored_bits / size:.3f}",
                _widths([g.bits for g in linear.groups], [g.rows for g in linear.groups]),
            )
        )
    for name in model.float16_linears:
        columns, features = model.shape(f"{name}.weight")
        rows.append((name, f"{features} x {columns}", "16.000", "float16"))
        bits += 16 * features * columns
        weights += features * columns
    settings = model.stored_config.get("quantization_config") or {}
    return Inspection(
        kind="EXL2 model",
        facts=(
            f"{len(model.linears)} quantized linears, decoder {bits / max(weights, 1):.4f} bits per weight",
            *([f"{len(model.float16_linears)} linears of the decoder in float16"] if model.float16_linears else []),
            f"made with: {settings}",
            f"{model.file_bytes / 2**20:.1f} MiB of tensors",
        ),
        header=("linear", "in x out", "bpw", "share of rows at each width"),
        rows=tuple(rows),
    )


def _checkpoint(path: Path) -> Inspection:
    checkpoint = open_model(path)
    rows = []
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        rows.append((name, " x ".join(map(str, info.shape)), str(info.dtype).removeprefix("torch."), info.file.name))
    return Inspection(
        kind="checkpoint",
        facts=(
            f"model_type {checkpoint.config.get('model_type')}, "
            f"{checkpoint.parameter_count / 1e6:.1f} million stored parameters, "
            f"{checkpoint.total_bytes / 2**20:.1f} MiB",
            f"tied embeddings: {'yes' if checkpoint.tied_embeddings else 'no'}",
        ),
        header=("tensor", "shape", "dtype", "file"),
        rows=tuple(rows),
    )


def _gguf(path: Path) -> Inspection:
    header = read_gguf_header(path)
    tensors = header.tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    bits = 8 * sum(tensor.size_bytes for tensor in tensors)
    counts = Counter(tensor.type.name for tensor in tensors)
    return Inspection(
        kind=f"GGUF file, version {header.version}",
        facts=(
            f"{len(tensors)} tensors, {weights / 1e6:.1f} million weights, {header.file_bytes / 2**20:.1f} MiB",
            f"bits per weight: {bits / max(weights, 1):.4f}, with metadata "
            f"{8 * header.file_bytes / max(weights, 1):.4f}",
            f"types: {', '.join(f'{count} {name}' for name, count in counts.most_common())}",
            *(f"{key}: {_metadata_value(value)}" for key, value in header.metadata.items()),
        ),
        header=("tensor", "shape", "type", "bpw"),
        rows=tuple(
            (
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                tensor.type.name,
                f"{tensor.type.bits_per_weight:.4g}",
            )
            for tensor in tensors
        ),
    )


def _metadata_value(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"{len(value)} values" if len(value) > _SHOWN_VALUES else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _measurement(path: Path) -> Inspection:
    measurement = Measurement.load(path)
    linears = (*measurement.linears, measurement.head)
    names = [linear.name for linear in linears]
    columns = [_damages(name, curves, names) for name, curves in measurement.curves.items()]
    rows = [
        (
            linear.name,
            f"{linear.in_features} x {linear.out_features}",
            *(f"{damage:.2e}" for _, damages in columns for damage in damages[index]),
        )
        for index, linear in enumerate(linears)
    ]
    facts = {key: value for key, value in measurement.provenance.items() if not isinstance(value, list)}
    if measurement.experts_sentence is not None:
        facts["experts"] = measurement.experts_sentence
    return Inspection(
        kind="measurement",
        facts=tuple(f"{key}: {value}" for key, value in facts.items()),
        header=("linear, damage in nats/token", "in x out", *(title for titles, _ in columns for title in titles)),
        rows=tuple(rows),
    )


def _damages(name: str, curves: FormatCurves, linears: Sequence[str]) -> tuple[list[str], list[NDArray[Any]]]:
    # Titles, and the damage of each linear in each of the format's choices; nothing where a header names none.
    choices = next((value for value in curves.header.values() if isinstance(value, list)), [])
    damages = [curves.linears[linear].get("damage_nats", np.zeros(0)) for linear in linears]
    if not all(damage.ndim and damage.shape[-1] == len(choices) for damage in damages):
        return [], [np.zeros(0)] * len(linears)
    sums = [damage.reshape(-1, len(choices)).sum(axis=0) for damage in damages]
    return [f"{name} {choice}" for choice in choices], sums


def _calibration(path: Path) -> Inspection:
    rows = CalibrationSet.load(path)
    count, length = rows.tokens.shape
    return Inspection(
        kind="calibration set",
        facts=(rows.description, f"{count} rows of {length} tokens", f"fingerprint {rows.fingerprint}"),
        header=("kind of text", "rows"),
        rows=tuple((kind, str(number)) for kind, number in rows.rows_per_kind.items()),
    )


def _plan(path: Path) -> Inspection:
    plan = Plan.load(path)

    def row(linear: LinearPlan) -> tuple[str, ...]:
        return (
            linear.name,
            f"{linear.in_features} x {linear.out_features}",
            f"{linear.bpw:.3f}",
            f"{linear.damage_nats:.2e}",
            _widths(linear.group_bits, linear.group_rows),
        )

    return Inspection(
        kind="plan",
        facts=(
            f"decoder {plan.bpw:.4f} bits per weight, head {plan.head.bpw if plan.head else 16:.4f} "
            f"(asked {plan.target_bpw:g}, head {plan.head_bits})",
            f"predicted damage {plan.damage_nats:.6f} nats/token, of it {plan.decoder_damage_nats:.6f} in the decoder "
            f"(no plan of this size can go below {plan.lower_bound_nats:.6f})",
            *(f"in float16: {line}" for line in unquantized_lines(plan.kept, plan.head_reason)),
        ),
        header=("linear", "in x out", "bpw", "damage", "share of rows at each width"),
        rows=tuple(row(p) for p in (*plan.linears, *([plan.head] if plan.head else []))),
    )


def _type_plan(path: Path) -> Inspection:
    plan = TypePlan.load(path)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in plan.weights_per_type().items())
    return Inspection(
        kind="GGUF plan",
        facts=(
            f"{plan.bpw:.4f} bits per weight over all tensors, {plan.stored_bytes / 2**20:.1f} MiB (at most "
            f"{plan.target_bytes / 2**20:.1f} MiB asked)",
            f"predicted damage {plan.damage_nats:.6f} nats/token (no plan of this size can go below "
            f"{plan.lower_bound_nats:.6f})",
            f"weights: {shares}",
        ),
        header=("tensor", "in x out", "type", "bpw", "damage"),
        rows=tuple(
            (
                tensor.name,
                f"{tensor.row_weights} x {tensor.rows}",
                tensor.type,
                f"{tensor.kind.bits_per_weight:.3f}",
                f"{tensor.damage_nats:.2e}",
            )
            for tensor in plan.tensors
        ),
    )
