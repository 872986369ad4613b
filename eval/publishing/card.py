"""The card of a quantized model, as the Hub shows it: what was done, what it cost, how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...convert.model import CardFacts
from ...convert.registry import formats
from ...tables import Table, cell
from .base_card import BaseCard
from .prompt import prompt_sections

__all__ = ["Card", "CardResult", "render_card"]


# They name the original's files, not ours.
_FORMAT_TAGS = frozenset({"safetensors", "pytorch", "exl3", "gptq", "awq", "onnx", "mlx", "jax", "tf"})


@dataclass(frozen=True, slots=True)
class CardResult:
    """One number for the Hub's ``model-index``.

    Attributes:
        kind: Name of the metric for programs, as ``perplexity``.
        name: The same for people.
        value: The number.
        text: Text that it was measured on.
    """

    kind: str
    name: str
    value: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All that a card says.

    Attributes:
        facts: What the format says.
        format: Name of the format.
        base_name: Name of the original.
        base_model: Hub id of the original, or None if it is not known.
        measured: The table of what it cost: a name, the original's value, the quantized model's; empty if it was not
            measured.
        measured_note: How that was measured.
        results: The numbers of it that the Hub is told.
        prompt: The prompt format; empty for none.
        base: What the original's card says.
    """

    facts: CardFacts
    format: str
    base_name: str
    base_model: str | None = None
    measured: tuple[tuple[str, str, str], ...] = ()
    measured_note: str = ""
    results: tuple[CardResult, ...] = ()
    prompt: str = ""
    base: BaseCard


def render_card(card: Card) -> str:
    """Return the card as Markdown with YAML front matter."""
    # Imported here: the Hub's client takes its time.
    from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415

    results = [
        EvalResult("text-generation", "text", each.text, each.kind, each.value, metric_name=each.name)
        for each in card.results
    ]
    data = ModelCardData(**_front_matter(card), eval_results=results or None)
    front = data.to_yaml().strip() + "\n"
    base = f"[{card.base_model}](https://huggingface.co/{card.base_model})" if card.base_model else cell(card.base_name)
    sections = [
        f"# {cell(card.facts.name)}",
        f"{base}, quantized to {card.facts.kind} with bpwise.",
        *(f"> **Note.** {cell(note)}" for note in card.base.notes),
        "## What was done",
        Table.of_facts(card.facts.made).to_markdown(),
        "## What it cost",
        *_measured(card),
        *_limits(card),
        *prompt_sections(card.prompt),
        "## How to load it",
        card.facts.loading,
    ]
    if card.base.body:
        sections += ["---", f"# The card of the original, {cell(card.base_name)}", card.base.body]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    files = _FORMAT_TAGS | formats().keys()
    carried = [tag for tag in card.base.lists.get("tags", ()) if tag.lower() not in files]
    languages = list(card.base.lists.get("language", ()))
    entries: dict[str, Any] = {}
    if card.base_model is not None:
        entries |= {"base_model": card.base_model, "base_model_relation": "quantized"}
    entries |= {"library_name": card.facts.library, "quantized_by": "bpwise", **card.base.values}
    entries.setdefault("pipeline_tag", "text-generation")
    if languages:
        entries["language"] = languages
    ours = [card.format, "quantized", "bpwise"]
    entries["tags"] = [*ours, *(tag for tag in carried if tag not in ours)]
    entries["model_name"] = card.facts.name
    return entries


def _measured(card: Card) -> list[str]:
    if not card.measured:
        return ["Not measured: this model was not compared with the original."]
    return [Table.of(("", "original", "this model"), card.measured).to_markdown(), cell(card.measured_note)]


def _limits(card: Card) -> list[str]:
    return ["## Limits", "\n".join(f"- {cell(limit)}" for limit in card.facts.limits)] if card.facts.limits else []
