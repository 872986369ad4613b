"""Description of an EXL2 model for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....tables import Table
from ...format import Description
from .rates import decoder_bpw

if TYPE_CHECKING:
    from .reader import Exl2Model

__all__ = ["describe_exl2", "width_shares"]


def describe_exl2(model: Exl2Model) -> Description:
    """Return what is in an EXL2 model; every quantized linear is read.

    Raises:
        FormatError: What is stored breaks a rule of the format.
    """
    rows = []
    for name, bpw in model.stored_bpw().items():
        features, columns = model.shape(f"{name}.weight")
        shares = "float16"
        if name in model.linears:
            groups = model.linear(name).groups
            shares = width_shares([group.bits for group in groups], [group.rows for group in groups])
        rows.append((name, f"{columns} x {features}", f"{bpw:.3f}", shares))
    float16 = len(model.float16_linears)
    return Description(
        kind="EXL2 model",
        facts=(
            f"{len(model.linears)} quantized linears, decoder {decoder_bpw(model):.4f} bits per weight",
            *([f"{float16} linears of the decoder in float16"] if float16 else []),
            f"made with: {model.stored_config.get('quantization_config') or {}}",
            f"{model.file_bytes / 2**20:.1f} MiB of tensors",
        ),
        table=Table(("linear", "in x out", "bpw", "share of rows at each width"), tuple(rows)),
    )


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
