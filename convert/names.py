"""Names of outputs by convention, and what names of others may be taken for."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "HUB_ID",
    "RATE",
    "RECIPE_FILE",
    "REPO",
    "REPORT_FILE",
    "NameParts",
    "convention_name",
    "hub_id",
    "pasteable",
    "size_text",
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Name of a repository on the Hub: an owner and a name."""

RATE = re.compile(r"-(\d+(?:\.\d+)?)bpw(?:-[A-Za-z0-9_]+)*$")
"""End of a name by convention: the bits per weight, and what a format may add behind."""

REPO = "USER/REPO"
"""In cards, the repository that a model is going to be in; ``push`` puts its name there."""

RECIPE_FILE = "recipe.yaml"
"""Options that make a model again, in its directory or beside its file."""

REPORT_FILE = "report.json"
"""Report on a model for programs, in its directory or beside its file."""


@dataclass(frozen=True, slots=True)
class NameParts:
    """What the name of an output tells.

    Attributes:
        base: Name of the original.
        size: As ``4.5bpw``, or another label.
        more: What the format adds, hyphens excluded.
        label: What programs that load it find it by on the Hub, as ``Q4_K_M``; None where they do not.
    """

    base: str
    size: str
    more: tuple[str, ...] = ()
    label: str | None = None

    @classmethod
    def of(cls, name: str) -> NameParts | None:
        """Take a name by convention apart; None of others."""
        found = RATE.search(name)
        if found is None:
            return None
        more = name[found.end(1) :].split("-")[1:]
        return cls(name[: found.start()], size_text(float(found[1])), tuple(more))


def convention_name(base_name: str, bpw: float | str, *more: str) -> str:
    """Return the name by convention, as ``Llama-3.2-1B-4.5bpw``.

    Args:
        base_name: Name of the original; of a Hub id the part after the owner is taken.
        bpw: Bits per weight that were asked for, or another label of the size.
        *more: What the format adds, in letters and digits.
    """
    return "-".join((base_name.rpartition("/")[2], size_text(bpw), *more))


def size_text(bpw: float | str) -> str:
    """Return a size as names have it: ``4.5bpw``, with at least one decimal, or the label that it is."""
    if isinstance(bpw, str):
        return bpw
    return f"{bpw:.1f}bpw" if round(bpw, 1) == bpw else f"{bpw:g}bpw"


def hub_id(name: str) -> str | None:
    """Return a name that is a Hub id; None of others."""
    return name if HUB_ID.fullmatch(name) else None


def pasteable(name: str) -> str:
    """Return a name that does no harm in code which people paste into a shell."""
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).lstrip("-") or "model"
