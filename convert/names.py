"""Names of outputs by convention, and what names of others may be taken for."""

from __future__ import annotations

import re

__all__ = ["HUB_ID", "RATE", "RECIPE_FILE", "REPORT_FILE", "convention_name", "pasteable", "rate_text"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Name of a repository on the Hub: an owner and a name."""

RATE = re.compile(r"-(\d+(?:\.\d+)?)bpw(?:-[A-Za-z0-9]+)*$")
"""End of a name by convention: the bits per weight, and what a format may add behind."""

RECIPE_FILE = "recipe.yaml"
"""Options that make a model again, in its directory or beside its file."""

REPORT_FILE = "report.json"
"""Report on a model for programs, in its directory or beside its file."""


def convention_name(base_name: str, bpw: float | str, *more: str) -> str:
    """Return the name by convention, as ``Llama-3.2-1B-4.5bpw``.

    Args:
        base_name: Name of the original; of a Hub id the part after the owner is taken.
        bpw: Bits per weight that were asked for, or another label of the size.
        *more: What the format adds, in letters and digits.
    """
    return "-".join((base_name.rpartition("/")[2], bpw if isinstance(bpw, str) else f"{rate_text(bpw)}bpw", *more))


def rate_text(bpw: float) -> str:
    """Return bits per weight as names have them: at least one decimal."""
    return f"{bpw:.1f}" if round(bpw, 1) == bpw else f"{bpw:g}"


def pasteable(name: str) -> str:
    """Return a name that does no harm in code which people paste into a shell."""
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).lstrip("-") or "model"
