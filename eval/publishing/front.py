"""The front page of a repository with several sizes of one model: a table of all, a chart, and which one to take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...convert.model import QuantizedModel
from ...convert.names import REPO
from ...convert.registry import require_format
from ...errors import BpwiseError, FormatError
from ...tables import Table, bytes_text, cell
from ..metrics.numbers import nats
from ..report.drawings.charts import SizedModel, size_chart
from ..report.drawings.png import png_bytes
from ..report.layers import find_plan, linear_costs, predicted_damage
from ..report.verdict import GOOD_ENOUGH_NATS, same_tokens, words_for
from .base_card import split_front
from .cards import ReportedComparison, card_path, reported
from .prompt import prompt_format, prompt_sections

__all__ = ["CHART_NAME", "FrontPage", "Size", "branch_link", "front_page"]

CHART_NAME = "kl-against-size.png"

_ORIGINAL = re.compile(r"^---\n+# The card of the original,", re.MULTILINE)

_ROOM = (
    "Take one that fits into your memory, with one or two gigabytes more than its size for the context. The KL "
    "divergence says how far the predictions are from the original's."
)

_OTHER_TEXTS = (
    "These models were measured on different texts, so their numbers cannot be compared. `bpwise eval` measures all of "
    "them on the same text."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One model of a repository.

    Attributes:
        name: Name of its directory or file.
        link: Where it lies: a file of the repository, or the address of a branch.
        label: What Ollama and llama.cpp find it by, as ``Q4_K_M``; None where they do not.
        file_bytes: Size of all files with tensors.
        measured: What its report says; None if it was not measured.
        predicted_nats: Damage that its plan predicted, nats per token; None if it is not known.
    """

    name: str
    link: str
    label: str | None
    file_bytes: int
    measured: ReportedComparison | None
    predicted_nats: float | None

    @classmethod
    def of(cls, output: Path, link: str, label: str | None) -> Size:
        """Read a model and its report.

        Raises:
            BpwiseError: The model cannot be opened, or its report is damaged.
        """
        model = require_format(output).open(output)
        return cls(
            name=output.name,
            link=link,
            label=label,
            file_bytes=model.file_bytes,
            measured=reported(output),
            predicted_nats=_predicted(model),
        )

    @property
    def nats(self) -> float | None:
        """Damage as it was measured, else as it was predicted, nats per token; None if it is not known."""
        return self.predicted_nats if self.measured is None else self.measured.summary.kl_nats.value

    @property
    def linked(self) -> str:
        """Its name as a link, in Markdown."""
        return f"[{cell(self.name)}](<{self.link}>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPage:
    """What a repository shows first.

    Attributes:
        base: Name of the original.
        first: The first model of those that are pushed.
        sizes: The models that it lists.
        text: The page as Markdown.
        chart: KL divergence against size as a PNG file, which the page shows; empty for none.
    """

    base: str
    first: Path
    sizes: tuple[Size, ...]
    text: str
    chart: bytes

    def with_published(self, published: Sequence[Size]) -> FrontPage:
        """Return the page with models that the repository has already, those that are pushed now apart.

        Raises:
            BpwiseError: As ``front_page``.
        """
        pushed = {each.link for each in self.sizes}
        others = [each for each in published if each.link not in pushed]
        return front_page(self.base, self.first, [*self.sizes, *others]) if others else self


def branch_link(repo: str, branch: str) -> str:
    """Return the address of a branch."""
    return f"https://huggingface.co/{repo}/tree/{branch}"


def front_page(base: str, first: Path, sizes: Sequence[Size]) -> FrontPage:
    """Return the page.

    Args:
        base: Name of the original.
        first: The model that front matter, prompt format and the original's card are taken of.
        sizes: The models to list.

    Raises:
        BpwiseError: The first model cannot be opened.
    """
    front, body = split_front(card_path(first).read_text(encoding="utf-8", errors="replace"))
    original = _ORIGINAL.search(body)
    comparable = len({each.measured.text_fingerprint for each in sizes if each.measured is not None}) < 2
    chart = _chart(sizes) if comparable else b""
    sections = [
        f"# {cell(base)} in {len(sizes)} size{'' if len(sizes) == 1 else 's'}",
        _table(sizes),
        *([f"![KL divergence against size]({CHART_NAME})"] if chart else []),
        "## Which one should I take?",
        *(_advice(sizes) if comparable else [_ROOM, _OTHER_TEXTS]),
        *prompt_sections(prompt_format(require_format(first).open(first))),
        *_picked(sizes),
    ]
    page = "\n\n".join(sections) + "\n"
    text = f"{front}\n{page}" + (f"\n{body[original.start() :]}" if original else "")
    return FrontPage(base=base, first=first, sizes=tuple(sizes), text=text, chart=chart)


def _predicted(model: QuantizedModel) -> float | None:
    with suppress(FormatError):  # what lies in a work directory is not published
        return predicted_damage(model, linear_costs(model, find_plan(model.path)))
    return None


def _chart(sizes: Sequence[Size]) -> bytes:
    measured = [(each, each.measured.summary) for each in sizes if each.measured is not None]
    drawing = size_chart([SizedModel(each.name, each.file_bytes, summary.kl_nats) for each, summary in measured])
    with suppress(BpwiseError):  # the renderer is an extra
        return b"" if drawing is None else png_bytes(drawing)
    return b""


def _table(sizes: Sequence[Size]) -> str:
    head = ("model", "size", "KL divergence, nats per token", "same most likely token", "in words")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for each in sorted(sizes, key=lambda size: -size.file_bytes):
        kl, same = "not measured", ""
        if each.measured is not None:
            summary = each.measured.summary
            kl, same = summary.kl_nats.text(), f"{summary.top1_agreement.text(100)} %"
        elif each.predicted_nats is not None:
            kl = f"{nats(each.predicted_nats)} predicted"
        words = "" if each.nats is None else words_for(each.nats)
        lines.append(f"| {each.linked} | {bytes_text(each.file_bytes)} | {kl} | {same} | {words} |")
    return "\n".join(lines)


def _advice(sizes: Sequence[Size]) -> list[str]:
    # By what was measured; where nothing was, by what the plans predicted.
    known = [each for each in sizes if each.measured is not None]
    sections = [_ROOM]
    if not known:
        known = [each for each in sizes if each.predicted_nats is not None]
        why = "the numbers are predictions of the plans" if known else "the largest is the closest to the original"
        sections.append(f"None of these models was measured: {why}.")
    if not known:
        return sections
    closest = min(known, key=lambda each: each.nats or 0.0)
    good = [each for each in known if (each.nats or 0.0) <= GOOD_ENOUGH_NATS]
    smallest = min(good, key=lambda each: each.file_bytes, default=None)
    found = f"None is close to the original (at most {GOOD_ENOUGH_NATS:g} nats per token away)."
    if smallest is not None:
        found = f"**The smallest that is close to the original:** {_judged(smallest)}"
    return [*sections, found, *([f"**The closest:** {_judged(closest)}"] if closest is not smallest else [])]


def _judged(size: Size) -> str:
    assert size.nats is not None
    told = f"{size.linked}, {bytes_text(size.file_bytes)}: {words_for(size.nats)}"
    if size.measured is None:
        return f"{told}, as predicted."
    return f"{told}. {same_tokens(size.measured.summary.top1_agreement.value)}."


def _picked(sizes: Sequence[Size]) -> list[str]:
    # What each command takes: of several files with one label, the first by name.
    found: dict[str, list[str]] = {}
    for each in sizes:
        if each.label is not None:
            found.setdefault(each.label, []).append(each.name)
    if not found:
        return []
    rows = [
        (f"`ollama run hf.co/{REPO}:{label}`", f"`llama-server -hf {REPO}:{label}`", min(names))
        for label, names in found.items()
    ]
    others = sorted(name for names in found.values() for name in names if name != min(names))
    more = (
        f"Files with the label of another one are found by their names alone, with `ollama run hf.co/{REPO}:NAME` or "
        f"`llama-server -hf {REPO} -hff NAME`: {', '.join(map(cell, others))}."
    )
    table = Table.of(("Ollama", "llama.cpp", "takes"), rows).to_markdown()
    return ["## How to run it", table, *([more] if others else [])]
