"""Markdown tables whose cells come from outside."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cell", "table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, every cell made harmless.

    Args:
        head: Titles of the columns.
        rows: As many cells in each.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Return a text on one line, which ends no cell and is not taken for HTML."""
    text = " ".join(text.split())
    for sign, replacement in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(sign, replacement)
    return text
