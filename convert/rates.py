"""Bits per weight as messages show them."""

from __future__ import annotations

import math

__all__ = ["round_up", "shown_range"]


def shown_range(lowest: float, highest: float) -> str:
    """Return a range of bits per weight for a message: four decimals, both ends large enough to be met from below."""
    return f"{round_up(lowest):.4f} to {round_up(highest):.4f}"


def round_up(bpw: float) -> float:
    """Return bits per weight rounded up to four decimals; 4.65 * 1e4 is a little above 46500."""
    return math.ceil(round(bpw * 1e4, 6)) / 1e4
