"""Drawings as SVG text: scales, axes and marks. Colours are CSS variables, so that light and dark share one drawing.

They stand in attributes of their own, never in ``style``: the pages forbid that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

__all__ = [
    "LOG_RATIO",
    "STYLE",
    "WIDTH",
    "Axis",
    "Drawing",
    "distinct_names",
    "linear_axis",
    "log_axis",
    "series_color",
    "shared_length",
    "short_number",
    "shortened",
    "visible",
]

WIDTH = 400
"""Of a chart, and of a map at least."""

LOG_RATIO = 8
"""Where the largest number is that many times the smallest, a logarithmic axis shows more."""

_SERIES = 8
_GOOD_STEPS = (1, 2, 2.5, 5, 10)
_LABEL_CHARACTERS = 26

_WORD = re.compile(r"(?:[^-./ ]|(?<=\d)\.(?=\d))*[-./ ]|(?:[^-./ ]|(?<=\d)\.(?=\d))+")
"""A part of a model's name with what ends it; numbers and names of types stay whole."""

_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}

STYLE = """
.bp { --bp-ink: #1d2530; --bp-muted: #5d6878; --bp-grid: #e3e7ec; --bp-paper: #ffffff; --bp-heat: #c2410c;
  --bp-cool: #0b62a8; --bp-0: #0b62a8; --bp-1: #c2410c; --bp-2: #0f7b5f; --bp-3: #8a3fa0; --bp-4: #946200;
  --bp-5: #c0266d; --bp-6: #4b5563; --bp-7: #1a8fb5; }
@media (prefers-color-scheme: dark) { .bp { --bp-ink: #e6e9ee; --bp-muted: #9aa5b4; --bp-grid: #2c343f;
  --bp-paper: #171c23; --bp-heat: #fb923c; --bp-cool: #58a9f0; --bp-0: #58a9f0; --bp-1: #fb923c; --bp-2: #3fc39b;
  --bp-3: #c78ade; --bp-4: #dfb040; --bp-5: #f27cb1; --bp-6: #aeb6c2; --bp-7: #62cbe8; } }
svg.bp { font: 12px system-ui, sans-serif; fill: var(--bp-ink); overflow: visible; }
svg.bp .title { font-weight: 600; font-size: 14px; }
svg.bp .small { fill: var(--bp-muted); }
svg.bp .label { paint-order: stroke; stroke: var(--bp-paper); stroke-width: 4; stroke-linejoin: round; }
svg.bp .grid { stroke: var(--bp-grid); stroke-width: 1; }
svg.bp .paper { fill: var(--bp-paper); }
svg.bp path.mark { fill: none; stroke-width: 2; }
""".strip()
"""What drawings need, in a page or in a file of their own."""


def series_color(index: int) -> str:
    """Return the colour of the model with this index; there are eight, chosen to differ for the colour-blind too."""
    return f"var(--bp-{index % _SERIES})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps numbers to a length.

    Attributes:
        low: Number at the start.
        high: Number at the end.
        ticks: Numbers to write on it.
        log: Whether equal ratios take equal lengths.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a number lies, 0 at the start and 1 at the end; numbers beyond the ends lie at them."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, count: int = 5) -> Axis:
    """Return an axis from a little below ``low`` to a little above ``high``, with about ``count`` round ticks."""
    span = high - low or abs(high) or 1.0
    exact = span / count
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(power * good for good in _GOOD_STEPS if power * good >= exact * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Axis(low=first * step, high=last * step, ticks=tuple(n * step for n in range(first, last + 1)))


def log_axis(low: float, high: float) -> Axis:
    """Return a logarithmic axis around two positive numbers, with ticks at 1, 2 and 5 or at powers of ten only."""
    decades = math.log10(high / low)
    marks = (1, 2, 5) if decades < 2 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    numbers = [mark * 10.0**power for power in range(first, last + 1) for mark in marks]
    start = max((n for n in numbers if n <= low * (1 + 1e-9)), default=low)
    end = min((n for n in numbers if n >= high * (1 - 1e-9) and n > start), default=high)
    ticks = [n for n in numbers if start <= n <= end]
    every = math.ceil(len(ticks) / 8)
    return Axis(low=start, high=end, ticks=tuple(ticks[::every]), log=True)


class Drawing:
    """An SVG drawing that grows. Text is escaped; every mark has the class ``mark`` and says what it is on hovering."""

    def __init__(self, width: float, height: float, title: str) -> None:
        """Begin a drawing.

        Args:
            width: In the units of all lengths: CSS pixels if it is not scaled.
            height: Likewise.
            title: Stands at the top.
        """
        self.width = width
        self.height = height
        self.title = title
        self._parts: list[str] = []
        self.text(0, 13, title, kind="title")

    def _add(self, tag: str, content: str = "", **attributes: str | float) -> None:
        shown = ""
        for name, value in attributes.items():
            text = value if isinstance(value, str) else f"{round(value, 2):g}"
            shown += f' {name.strip("_").replace("_", "-")}="{text}"'
        self._parts.append(f"<{tag}{shown}>{content}</{tag}>")

    def _mark(self, tag: str, hint: str, **attributes: str | float) -> None:
        self._add(tag, f"<title>{_safe(hint)}</title>", class_="mark", **attributes)

    def text(self, x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> None:
        """Write a line; ``anchor`` is ``start``, ``middle`` or ``end``, ``kind`` a CSS class."""
        self._add("text", _safe(content), x=x, y=y, text_anchor=anchor, class_=kind)

    def line(self, x1: float, y1: float, x2: float, y2: float, *, color: str = "", width: float = 1) -> None:
        """Draw a straight line; without a colour it belongs to the grid."""
        look = {"stroke": color, "stroke_width": f"{width:g}"} if color else {"class": "grid"}
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, **look)

    def rectangle(  # the four sides, and how it looks
        self, x: float, y: float, width: float, height: float, *, color: str, hint: str = "", opacity: float = 1.0
    ) -> None:
        """Draw a filled rectangle; without a hint it is no mark, but a piece of a legend."""
        add = partial(self._mark, "rect", hint) if hint else partial(self._add, "rect")
        look = {"fill": color, "fill_opacity": f"{opacity:.3f}"}
        add(x=x, y=y, width=max(width, 0), height=max(height, 0), **look)

    def dot(self, x: float, y: float, *, color: str, hint: str, radius: float = 4) -> None:
        """Draw a filled circle."""
        self._mark("circle", hint, cx=x, cy=y, r=radius, fill=color)

    def path(self, points: Sequence[tuple[float, float]], *, color: str, hint: str) -> None:
        """Draw a line through points."""
        data = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
        self._mark("path", hint, d=data, stroke=color)

    def legend(self, names: Sequence[str], y: float, *, columns: int = 2) -> float:
        """Name the series in their colours from ``y`` downwards; return where the legend ends."""
        for number, name in enumerate(names):
            row, column = divmod(number, columns)
            x, line = column * self.width / columns, y + 17 * row
            self.rectangle(x, line - 9, 10, 10, color=series_color(number))
            self.text(x + 15, line, shortened(name))
        return y + 17 * math.ceil(len(names) / columns)

    def render(self, *, standalone: bool = False) -> str:
        """Return the SVG element; ``standalone`` makes it a file of its own, with style and background."""
        box = f'viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}"'
        style = ""
        if standalone:
            box = f'viewBox="-12 -12 {self.width + 24:g} {self.height + 24:g}" width="{self.width + 24:g}"'
            back = f'<rect class="paper" x="-12" y="-12" width="{self.width + 24:g}" height="{self.height + 24:g}"/>'
            style = f"<style>{STYLE}</style>{back}"
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="bp" {box} role="img" aria-label="{_safe(self.title)}">'
            f"{style}\n{body}\n</svg>"
        )


def short_number(value: float) -> str:
    """Return a number with at most three digits, of small and large ones the power of ten."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def shortened(text: str) -> str:
    """Return text that fits a label; the middle goes, because names differ at their ends."""
    if len(text) <= _LABEL_CHARACTERS:
        return text
    half = (_LABEL_CHARACTERS - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return names without the words that all begin or end with, as labels."""
    words = [_WORD.findall(name) for name in names]
    begin = shared_length(words) if len(words) > 1 else 0
    end = shared_length([each[begin:][::-1] for each in words]) if len(words) > 1 else 0
    short = ["".join(each[begin : len(each) - end]).strip("-./ ") for each in words]
    return [shortened(each) for each in (short if all(short) else names)]


def shared_length(items: Sequence[Sequence[str]]) -> int:
    """Return how many entries all sequences have in common at their start."""
    columns = enumerate(zip(*items, strict=False))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, items)))


def visible(text: str, *, spaces: bool = True) -> str:
    """Return text with a sign for everything that would not be seen, or would reorder what is around it.

    Args:
        text: What a token decodes to, or a piece of text.
        spaces: Whether spaces get a sign too; line breaks then lose their effect, otherwise they keep it.
    """

    def shown(sign: str) -> str:
        if sign == " " and not spaces:
            return sign
        if sign == "\n" and not spaces:
            return "⏎\n"
        return _SIGNS.get(sign) or (sign if sign.isprintable() else repr(sign)[1:-1])

    return "".join(map(shown, text))


def _safe(text: str) -> str:
    return escape(visible(text, spaces=False))
