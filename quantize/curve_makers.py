"""What a run measures: the curves of its own format, or of all."""

from __future__ import annotations

from ..convert.exl2.curves import Exl2Curves
from ..convert.gguf.curves import GgufCurves
from ..measure.curves import CurveMaker

__all__ = ["curve_makers"]


def curve_makers(group_size: int = 32, *, types: bool) -> list[CurveMaker]:
    """Return the curves of EXL2, and of GGUF where ggml's library is installed.

    Args:
        group_size: Rows of a group in EXL2.
        types: Whether GGUF's are wanted.
    """
    gguf = GgufCurves.installed() if types else None
    return [Exl2Curves(group_size), *([] if gguf is None else [gguf])]
