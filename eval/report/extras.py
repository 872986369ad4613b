"""Benchmarks, needles and answers as parts of a report: tables for people, rows for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...tables import AnyCell, NotedCell, Table
from ..comparison import Comparison
from ..metrics.estimate import Estimate
from ..metrics.numbers import estimate, nats, percent
from ..tasks.benchmarks import TaskReport
from ..tasks.needle import DEPTHS, NeedleModel, NeedleReport
from ..tasks.scores import QuantizedScore, TaskScore
from .drawings.svg import shared_length
from .tables import flat, with_bootstrap, with_ends

__all__ = [
    "AGREEMENT_NOTE",
    "ANSWERS_NOTE",
    "NEEDLE_NOTE",
    "NO_EXTRAS",
    "TASKS_NOTE",
    "Extras",
    "agreement_records",
    "agreement_table",
    "answer_parts",
    "answers_table",
    "extras_content",
    "extras_lines",
    "extras_records",
    "needle_grid",
    "needle_methods",
    "needle_table",
    "prompt_of",
    "task_methods",
    "tasks_table",
]

AGREEMENT_NOTE = (
    "Chats of our own, answered by greedy decoding. Alike: tokens that both answers begin with. Changes are in pairs, "
    "quantized minus original; in brackets or beneath: 95 % intervals, bootstrapped over the prompts. An answer is cut "
    "after so many tokens as the column of those that ended says."
)

ANSWERS_NOTE = (
    "Greedy decoding: always the most likely token. A single different token can change the rest of an answer."
)

TASKS_NOTE = (
    "± is one standard error over the questions; differences are paired over the same questions. Changed: share of "
    "questions whose score changed, for better or worse. Without ±: the score is not a mean over questions."
)

NEEDLE_NOTE = (
    "A sentence with a secret number is hidden somewhere in a text, which ends with the beginning of that sentence. "
    "Found: greedy decoding completes the number, which base models can do as well as chat models. Nats: negative "
    "log-likelihood of the number. ± is one standard error, treating texts as independent; changes are paired over the "
    "same prompts."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What a report tells beside the comparisons, of the same models in the same order.

    Attributes:
        tasks: Benchmarks, or None.
        needle: Needles in haystacks, or None.
    """

    tasks: TaskReport | None = None
    needle: NeedleReport | None = None


NO_EXTRAS = Extras()


def extras_content(extras: Extras) -> dict[str, Any]:
    """Return what ``report.json`` says; parts that were not measured are left out."""
    return {
        name: asdict(part) for name, part in (("tasks", extras.tasks), ("needle", extras.needle)) if part is not None
    }


def extras_records(extras: Extras) -> dict[str, list[dict[str, Any]]]:
    """Return the tables ``tasks`` and ``needle``: a record for each model and score, or prompt's place; or none."""
    tasks, models = extras.tasks, () if extras.needle is None else extras.needle.models
    return {
        "tasks": [] if tasks is None else [record for score in tasks.scores for record in _records(tasks, score)],
        "needle": [{"model": model.name, **asdict(cell)} for model in models for cell in model.cells],
    }


def _records(report: TaskReport, score: TaskScore) -> list[dict[str, Any]]:
    same = {key: getattr(score, key) for key in ("task", "part_of", "metric", "filter", "fewshot", "questions")}
    return [
        {"model": report.original, **same, **flat({"score": asdict(score.original)})},
        *(
            {"model": name, **same, **flat(asdict(each))}
            for name, each in zip(report.quantized, score.quantized, strict=True)
        ),
    ]


def extras_lines(extras: Extras) -> list[str]:
    """Return results as lines for a terminal."""
    tables = [
        *([] if extras.tasks is None else [tasks_table(extras.tasks)]),
        *([] if extras.needle is None else [needle_table(extras.needle)]),
    ]
    return [line for each in tables for line in each.to_lines()]


def tasks_table(report: TaskReport, *, parts: bool = False) -> Table:
    """Return a row for each score: the original's, and the quantized models' with their differences.

    Args:
        report: Where the scores are from.
        parts: Whether of the parts of groups, instead of what was asked for.
    """
    rows: list[tuple[AnyCell, ...]] = []
    for score in report.scores:
        if (score.part_of is not None) is parts:
            metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
            fewshot = "" if score.fewshot is None else str(score.fewshot)
            original, shown = _shown(score.original, score), [_beside(each, score) for each in score.quantized]
            rows.append((f"{score.task} {metric}", fewshot, str(score.questions), original, *shown))
    return Table.of(("benchmark", "few-shot", "questions", report.original, *report.quantized), rows)


def _shown(value: Estimate, score: TaskScore, sign: str = "") -> str:
    share = score.higher_is_better is not False and 0 <= score.original.value <= 1
    return percent(value, sign) if share else estimate(value, 3, sign)


def _beside(each: QuantizedScore, score: TaskScore) -> NotedCell:
    changed = "" if each.changed is None else f"; {100 * each.changed:.1f} % changed"
    return NotedCell(_shown(Estimate(each.score.value, None), score), _shown(each.difference, score, "+") + changed)


def task_methods(report: TaskReport) -> Table:
    """Return how benchmarks were run."""
    versions = {score.task: score.version for score in report.scores if score.part_of is None}
    return Table.of_facts(
        [
            ("asked by", report.engine),
            ("versions of the tasks", ", ".join(f"{task} {version}" for task, version in versions.items())),
            ("questions", "all" if report.limit is None else f"limited to {report.limit:g} of each task"),
            ("few-shot", "as each task says" if report.num_fewshot is None else str(report.num_fewshot)),
            ("chat template", "applied" if report.apply_chat_template else "not applied"),
            ("batch size", report.batch_size),
            ("dtype and device", f"{report.dtype} on {report.device}"),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )


def needle_table(report: NeedleReport) -> Table:
    """Return a row for each model and length: the share found and nats, both with what changed."""
    rows: list[tuple[AnyCell, ...]] = []
    for model in report.models:
        for each in model.lengths:
            changes = ("", "")
            if each.found_change is not None and each.nats_change is not None:
                changes = (percent(each.found_change, "+"), estimate(each.nats_change, 3, "+"))
            found, value = map(NotedCell, (percent(each.found), nats(each.nats)), changes)
            rows.append((model.name, str(each.length), found, value))
    return Table.of(("needle in a haystack", "tokens", "found", "nats"), rows)


def needle_grid(model: NeedleModel) -> Table:
    """Return what a model finds, by depth of the needle (downwards) and length of the prompt."""
    found = {(cell.depth, cell.length): cell.found for cell in model.cells}
    lengths = [each.length for each in model.lengths]
    rows = [
        (f"{100 * depth:.0f} %", *(f"{100 * found[depth, length]:.0f} %" for length in lengths)) for depth in DEPTHS
    ]
    return Table.of(("depth", *map(str, lengths)), rows)


def needle_methods(report: NeedleReport) -> Table:
    """Return how needles were hidden."""
    return Table.of_facts(
        [
            ("text", report.text),
            ("texts of each length", f"{report.samples}, each asked at {len(DEPTHS)} depths with a number of its own"),
            ("dtype and device", f"{report.dtype} on {report.device}"),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )


def prompt_of(comparisons: Sequence[Comparison]) -> str:
    """Return the prompt that the models answered; empty if there was none."""
    return next((each.answers.prompt for each in comparisons if each.answers is not None), "")


def answers_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return a row for the answer of each model, the original first; None if there was no prompt."""
    parts = answer_parts(comparisons)
    return Table.of(("model", "answer"), [(name, same + other) for name, same, other in parts]) if parts else None


def agreement_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return how far many answers agree, and how long they are, a row for each model; None if none were asked for."""
    rows = []
    most = 0
    for comparison in comparisons:
        each = None if comparison.answers is None else comparison.answers.agreement
        if each is not None:
            most = each.most_tokens
            rows.append(
                (
                    comparison.quantized.name,
                    str(each.prompts),
                    with_bootstrap(each.same, ".0f", 100, " %"),
                    with_bootstrap(each.shared_tokens, ".1f"),
                    with_bootstrap(each.original_tokens, ".1f"),
                    with_bootstrap(each.length_change, "+.1f"),
                    NotedCell(f"{100 * each.quantized_ended:.0f} %", f"original {100 * each.original_ended:.0f} %"),
                    with_bootstrap(each.original_thinking, ".1f"),
                    with_bootstrap(each.thinking_change, "+.1f"),
                )
            )
    head = ("answers", "prompts", "the same", "tokens alike", "tokens, original", "change", f"ended within {most}")
    return Table.of((*head, "thinking, original", "change"), rows) if rows else None


def agreement_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return a record for each model whose answers were counted, every number with all its digits."""
    return [
        {"model": each.quantized.name, **with_ends(asdict(each.answers.agreement))}
        for each in comparisons
        if each.answers is not None and each.answers.agreement is not None
    ]


def answer_parts(comparisons: Sequence[Comparison]) -> list[tuple[str, str, str]]:
    """Return the name of each model, and its answer up to where it parts from the original's and from there on."""
    parts: list[tuple[str, str, str]] = []
    for comparison in comparisons:
        answers = comparison.answers
        if answers is not None:  # some may not have fitted into memory
            original, other = answers.original, answers.quantized
            shared = shared_length([original, other])
            parts = parts or [(comparison.original.name, original, "")]
            parts.append((comparison.quantized.name, other[:shared], other[shared:]))
    return parts
