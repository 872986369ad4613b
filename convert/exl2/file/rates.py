"""Bits per weight of an EXL2 model, as its targets count them: of the decoder, and of the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....checkpoint.model.names import HEAD

if TYPE_CHECKING:
    from .reader import Exl2Model

__all__ = ["decoder_bpw", "head_bpw"]


def decoder_bpw(model: Exl2Model) -> float:
    """Return the average over all linears but the head, overheads included, 16 for those in float16; 0 without any."""
    sizes = [size for name, size in model.stored_sizes().items() if not _is_head(name)]
    return sum(bits for bits, _ in sizes) / max(1, sum(weights for _, weights in sizes))


def head_bpw(model: Exl2Model) -> float:
    """Return the head's bits per weight with overheads; 16 if it is not quantized."""
    return next((bpw for name, bpw in model.stored_bpw().items() if _is_head(name)), 16.0)


def _is_head(linear: str) -> bool:
    return linear.rpartition(".")[2] == HEAD
