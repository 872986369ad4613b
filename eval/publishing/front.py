"""The front page of a repository with several sizes of one model: a table of all, and which one to take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...convert.names import REPO
from ...convert.registry import require_format
from ...tables import Table, cell
from .base_card import split_front
from .cards import card_path, measured_damage

__all__ = ["Size", "front_page"]

_ORIGINAL = re.compile(r"^---\n+# The card of the original,", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One model of a repository.

    Attributes:
        output: Its directory or file.
        link: Where it lies: a file of the repository, or the address of a branch.
        label: What Ollama and llama.cpp find it by, as ``Q4_K_M``; None where they do not.
    """

    output: Path
    link: str
    label: str | None


def front_page(base: str, sizes: Sequence[Size]) -> str:
    """Return the page as Markdown; front matter and the original's card are those of the first model's card.

    Args:
        base: Name of the original.
        sizes: All that is in the repository.

    Raises:
        BpwiseError: A model cannot be opened, or its report is damaged.
    """
    front, body = split_front(card_path(sizes[0].output).read_text(encoding="utf-8", errors="replace"))
    original = _ORIGINAL.search(body)
    sections = [
        f"# {cell(base)} in {len(sizes)} sizes",
        _table(sizes),
        "## Which one should I take?",
        "The largest that fits into your memory: leave one or two gigabytes more than the file for the context. The "
        "KL divergence says how far the predictions are from the original's. Below 0.01 the model is hard to tell "
        "from the original; above 0.1 expect mistakes that the original does not make.",
        *_picked(sizes),
    ]
    page = "\n\n".join(sections) + "\n"
    return f"{front}\n{page}" + (f"\n{body[original.start() :]}" if original else "")


def _table(sizes: Sequence[Size]) -> str:
    bytes_of = {each.output: require_format(each.output).open(each.output).file_bytes for each in sizes}
    lines = ["| model | size | KL divergence, nats per token | same most likely token |", "| --- | --- | --- | --- |"]
    for each in sorted(sizes, key=lambda size: -bytes_of[size.output]):
        kl, same = measured_damage(each.output) or ("not measured", "")
        link = f"[{cell(each.output.name)}](<{each.link}>)"
        lines.append(f"| {link} | {bytes_of[each.output] / 1e9:.3f} GB | {kl} | {same} |")
    return "\n".join(lines)


def _picked(sizes: Sequence[Size]) -> list[str]:
    # What each command takes: of several files with one label, the first by name.
    found: dict[str, list[str]] = {}
    for each in sizes:
        if each.label is not None:
            found.setdefault(each.label, []).append(each.output.name)
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
