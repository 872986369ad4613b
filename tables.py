"""Markdown tables whose cells come from outside."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import printable

__all__ = ["cell", "table"]

_MOST_CHARACTERS = 10_000


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, every cell made harmless.

    Args:
        head: Titles of the columns.
        rows: As many cells in each.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Return a text on one line that ends no cell, and is taken neither for HTML nor for a link or an image."""
    text = printable(" ".join(text.split()), _MOST_CHARACTERS)
    # The backslash first: it would undo the escape of a sign after it.
    for sign, replacement in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), *((s, f"\\{s}") for s in "|[")):
        text = text.replace(sign, replacement)
    return text
