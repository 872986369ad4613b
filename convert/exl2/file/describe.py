"""Description of an EXL2 model for people: what each linear got, and the average of the decoder and the head."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....checkpoint.model.names import HEAD, model_order
from ....tables import Table, bytes_text
from ...model import Description

if TYPE_CHECKING:
    from .reader import Exl2Model

__all__ = ["decoder_bpw", "describe_exl2", "head_bpw", "stored_sizes", "width_shares"]

_DENSE_BITS = 16


def describe_exl2(model: Exl2Model) -> Description:
    """Return what is in an EXL2 model; every quantized linear is read.

    Raises:
        FormatError: What is stored breaks a rule of the format.
    """
    rows, linears = [], []
    for name, bpw in model.stored_bpw().items():
        features, columns = model.shape(f"{name}.weight")
        shares, stored_rows = "float16", Counter[str]()
        if name in model.linears:
            groups = model.linear(name).groups
            shares = width_shares([group.bits for group in groups], [group.rows for group in groups])
            for group in groups:
                stored_rows[str(group.bits)] += group.rows
        rows.append((name, f"{columns} x {features}", f"{bpw:.3f}", shares))
        sizes = {"in_features": columns, "out_features": features}
        linears.append({"name": name, **sizes, "bpw": bpw, "rows_by_bits": dict(stored_rows)})
    float16 = len(model.float16_linears)
    return Description(
        kind="EXL2 model",
        facts=(
            f"{len(model.linears)} quantized linears, decoder {decoder_bpw(model):.4f} bits per weight",
            *([f"{float16} linears of the decoder in float16"] if float16 else []),
            f"made with: {model.stored_config.get('quantization_config') or {}}",
            f"{bytes_text(model.file_bytes)} of tensors",
        ),
        table=Table(("linear", "in x out", "bpw", "share of rows at each width"), tuple(rows)),
        content={
            "decoder_bpw": decoder_bpw(model),
            "head_bpw": head_bpw(model),
            "float16_linears": float16,
            "quantization_config": model.stored_config.get("quantization_config") or {},
            "tensors_bytes": model.file_bytes,
            "linears": linears,
        },
    )


def stored_sizes(model: Exl2Model) -> dict[str, tuple[int, int]]:
    """Return of every linear, in model order, its stored bits, padding included and biases not, and its weights.

    Raises:
        FormatError: A part of it is missing.
    """
    sizes = {}
    for name in sorted((*model.linears, *model.float16_linears), key=model_order):
        weights = math.prod(model.shape(f"{name}.weight"))
        sizes[name] = (model.stored.linear_bits(name) if name in model.linears else _DENSE_BITS * weights, weights)
    return sizes


def decoder_bpw(model: Exl2Model) -> float:
    """Return the average over all linears but the head, overheads included, 16 for those in float16; 0 without any."""
    sizes = [size for name, size in stored_sizes(model).items() if not _is_head(name)]
    return sum(bits for bits, _ in sizes) / max(1, sum(weights for _, weights in sizes))


def head_bpw(model: Exl2Model) -> float:
    """Return the head's bits per weight with overheads; 16 if it is not quantized."""
    return next((bpw for name, bpw in model.stored_bpw().items() if _is_head(name)), float(_DENSE_BITS))


def width_shares(bits: Sequence[int], rows: Sequence[int]) -> str:
    """Return the share of a linear's rows at each width, the largest width first, as ``6:25% 4:75%``.

    Args:
        bits: Width of each group of rows, in bits.
        rows: Number of rows in each.
    """
    counts: Counter[int] = Counter()
    for width, count in zip(bits, rows, strict=True):
        counts[width] += count
    total = sum(rows)
    return " ".join(f"{width}:{100 * counts[width] / total:.0f}%" for width in sorted(counts, reverse=True))


def _is_head(linear: str) -> bool:
    return linear.rpartition(".")[2] == HEAD
