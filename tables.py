"""One table, written in many ways; every cell may come from outside."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from markupsafe import Markup

from .errors import printable

__all__ = ["AnyCell", "NotedCell", "Table", "bytes_text", "bytes_unit", "cell", "html_summary", "listed"]

_MOST_CHARACTERS = 10_000
_MOST_TERMINAL_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class NotedCell:
    """A cell with something beside its text.

    Attributes:
        text: The text.
        note: A second line in HTML, in brackets elsewhere; empty for none.
        key: Number that HTML sorts it by; None for its text.
        color: CSS colour of a chip before the text in HTML; empty for none.
    """

    text: str
    note: str = ""
    key: float | None = None
    color: str = ""

    def __str__(self) -> str:
        """Return all of it on one line."""
        return f"{self.text} ({self.note})" if self.note else self.text


AnyCell: TypeAlias = str | NotedCell
"""What a table's cell may be."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under titles.

    Attributes:
        header: Titles of the columns; all empty for none.
        rows: As many cells in each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[AnyCell, ...], ...]

    @classmethod
    def of(cls, header: Iterable[str], rows: Iterable[Sequence[AnyCell]]) -> Table:
        """Make a table of any iterables."""
        return cls(tuple(header), tuple(map(tuple, rows)))

    @classmethod
    def of_facts(cls, facts: Iterable[tuple[str, str]]) -> Table:
        """Make a table of names and values, without titles."""
        return cls.of(("", ""), facts)

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]]) -> Table:
        """Make a table of records, for programs: a column for each of their keys, empty where there is no value."""
        header = dict.fromkeys(key for record in records for key in record)
        values = [[record.get(key) for key in header] for record in records]
        return cls.of(header, [["" if value is None else str(value) for value in row] for row in values])

    def transposed(self) -> Table:
        """Return the table with rows as columns; the first cells become titles, which have no notes."""
        titles = (each.text if isinstance(each, NotedCell) else each for each in (row[0] for row in self.rows))
        columns = list(zip(self.header, *self.rows, strict=True))[1:]
        return Table.of((self.header[0], *titles), columns)

    def to_markdown(self) -> str:
        """Return a Markdown table, every cell made harmless."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell(str(each)) for each in line) + " |" for line in lines)

    def to_lines(self) -> list[str]:
        """Return the table as lines for a terminal, its columns aligned."""
        rows = [[printable(str(each), _MOST_TERMINAL_CHARACTERS) for each in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def to_csv(self) -> str:
        """Return the table as CSV, without notes; what a spreadsheet would take for a formula begins with ``'``."""
        text = io.StringIO(newline="")
        rows = [[each.text if isinstance(each, NotedCell) else each for each in row] for row in self.rows]
        csv.writer(text).writerows([self.header, *([_no_formula(each) for each in row] for row in rows)])
        return text.getvalue()

    def to_html(self, kind: str = "", *, id: str = "") -> Markup:
        """Return an HTML table, everything in it escaped.

        Args:
            kind: CSS class; ``sortable`` gives titles a button and cells what they are sorted by.
            id: The element's id; empty for none.
        """
        given = {key: value for key, value in (("id", id), ("class", kind)) if value}
        attributes = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in given.items())
        head: list[Markup] = []
        if any(self.header):
            title = Markup('<th><button type="button">{}</button></th>' if kind == "sortable" else "<th>{}</th>")
            titles = Markup("").join(title.format(_line(each)) for each in self.header)
            head = [Markup("<thead><tr>{}</tr></thead>").format(titles)]
        rows = [Markup("").join(_html_cells(row, self.header, kind)) for row in self.rows]
        body = Markup("\n").join(Markup("<tr>{}</tr>").format(row) for row in rows)
        inside = Markup("\n").join([*head, Markup("<tbody>\n{}\n</tbody>").format(body)])
        return Markup("<table{}>\n{}\n</table>").format(attributes, inside)


def cell(text: str) -> str:
    """Return a text on one line that ends no cell, and is taken neither for HTML nor for a link or an image."""
    text = _line(text)
    # The backslash first: it would undo the escape of a sign after it.
    for sign, replacement in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), *((s, f"\\{s}") for s in "|[")):
        text = text.replace(sign, replacement)
    return text


def bytes_text(count: int) -> str:
    """Return a size as people read it: ``812 bytes``, ``3.4 kB``, ``85.9 MB``, ``4.58 GB``."""
    if count < 1000:
        return f"{count} byte{'' if count == 1 else 's'}"
    if count < 999_950:
        return f"{count / 1000:.1f} kB"
    unit, size = bytes_unit(count)
    return f"{count / size:.{2 if unit == 'GB' else 1}f} {unit}"


def bytes_unit(count: int) -> tuple[str, int]:
    """Return the unit that sizes up to this one are shown in, and its bytes: GB where MB would show 1000."""
    return ("GB", 10**9) if count >= 999_950_000 else ("MB", 10**6)


def html_summary(title: str, facts: Iterable[str], table: Table | None = None, *, folded: bool = False) -> str:
    """Return what a notebook shows of an object: a title, lines and a table, everything in it escaped.

    Args:
        title: What it is.
        facts: Lines about it.
        table: What is in it; None for nothing.
        folded: Whether the table is shown only once it is asked for.
    """
    lines = Markup("").join(Markup("<li>{}</li>").format(_line(fact)) for fact in facts)
    shown = Markup("") if table is None else table.to_html()
    if folded:
        shown = Markup("<details><summary>{} rows</summary>{}</details>").format(
            len(table.rows if table else ()), shown
        )
    return str(Markup("<p><b>{}</b></p><ul>{}</ul>{}").format(_line(title), lines, shown))


def _line(text: str) -> str:
    return printable(" ".join(text.split()), _MOST_CHARACTERS)


def _html_cells(row: Sequence[AnyCell], header: Sequence[str], kind: str) -> Iterator[Markup]:
    for number, (each, title) in enumerate(zip(row, header, strict=True)):
        yield _html_cell(each, title, kind, first=number == 0)


def _html_cell(each: AnyCell, title: str, kind: str, *, first: bool) -> Markup:
    each = NotedCell(each) if isinstance(each, str) else each
    text = _line(each.text)
    key = text if each.key is None else each.key
    sort = Markup(' data-key="{}"').format(key) if kind == "sortable" else ""
    # An attribute, since the page's policy forbids inline styles.
    square = '<svg class="chip" viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="{}"/></svg>'
    chip = Markup(square).format(each.color) if each.color else ""
    shown = Markup('<span class="name">{}{}</span>').format(chip, text) if first else text
    # On a narrow screen a row is a list, and each cell says what it is.
    label = Markup(' data-label="{}"').format(_line(title)) if title and not first else ""
    note = Markup("<small>{}</small>").format(_line(each.note)) if each.note else ""
    return Markup("<td{}{}>{}{}</td>").format(sort, label, shown, note)


def _no_formula(text: str) -> str:
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them: ``a``, ``a and b``, ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
