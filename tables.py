"""One table, written in many ways; every cell may come from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import printable

__all__ = ["Table", "cell", "table"]

_MOST_CHARACTERS = 10_000
_MOST_TERMINAL_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under titles.

    Attributes:
        header: Titles of the columns.
        rows: As many cells in each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """Return a Markdown table, every cell made harmless."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell(each) for each in line) + " |" for line in lines)

    def to_lines(self) -> list[str]:
        """Return the table as lines for a terminal, its columns aligned."""
        rows = [[printable(each, _MOST_TERMINAL_CHARACTERS) for each in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return ``Table(head, rows)`` as Markdown."""
    return Table(tuple(head), tuple(map(tuple, rows))).to_markdown()


def cell(text: str) -> str:
    """Return a text on one line that ends no cell, and is taken neither for HTML nor for a link or an image."""
    text = printable(" ".join(text.split()), _MOST_CHARACTERS)
    # The backslash first: it would undo the escape of a sign after it.
    for sign, replacement in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), *((s, f"\\{s}") for s in "|[")):
        text = text.replace(sign, replacement)
    return text
