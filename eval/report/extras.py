"""Benchmarks and needles as parts of a report: tables for people, rows for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...tables import table
from ..metrics.estimate import Estimate
from ..tasks.benchmarks import TaskReport
from ..tasks.needle import DEPTHS, NeedleModel, NeedleReport
from ..tasks.scores import QuantizedScore, TaskScore
from .numbers import estimate, nats, percent

__all__ = [
    "NEEDLE_NOTE",
    "NO_EXTRAS",
    "TASKS_NOTE",
    "Extras",
    "extras_content",
    "extras_csv",
    "extras_lines",
    "extras_markdown",
    "needle_methods",
    "needle_rows",
    "task_head",
    "task_methods",
    "task_rows",
]

TASKS_NOTE = (
    "± is one standard error over the questions; differences are paired over the same questions, and changed is the "
    "share of them that is scored otherwise, either way. Without ±: the score is not a mean over questions."
)

NEEDLE_NOTE = (
    "A sentence with a secret number stands at some depth of a text, and the text ends with the sentence's beginning. "
    "Found: greedy decoding gives the whole number; it works for base models as for chat models. Nats: negative "
    "log-likelihood of the number. ± is one standard error with the texts as independent; changes are paired over the "
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


def extras_csv(extras: Extras) -> dict[str, list[dict[str, Any]]]:
    """Return the tables ``tasks`` and ``needle``: a row for each model and score, or prompt's place; or none."""
    tasks, models = extras.tasks, () if extras.needle is None else extras.needle.models
    return {
        "tasks": [] if tasks is None else [row for score in tasks.scores for row in _task_csv(tasks, score)],
        "needle": [{"model": model.name, **asdict(cell)} for model in models for cell in model.cells],
    }


def extras_markdown(extras: Extras) -> list[str]:
    """Return sections for Markdown; the parts of groups of benchmarks are left to the page, JSON and CSV."""
    sections = []
    if extras.tasks is not None:
        rows = task_rows(extras.tasks, [score for score in extras.tasks.scores if score.part_of is None])
        settings = table(("", ""), task_methods(extras.tasks))
        sections += ["## Benchmarks", table(task_head(extras.tasks), rows), TASKS_NOTE, settings]
    if extras.needle is not None:
        report = extras.needle
        sections += ["## Needle in a haystack", table(("model", "tokens", "found", "nats"), needle_rows(report))]
        lengths = [str(each.length) for each in report.models[0].lengths]
        for model in report.models:
            sections.append(f"Found by {model.name}, depth of the needle against length:")
            sections.append(table(("depth", *lengths), _grid(model)))
        sections += [NEEDLE_NOTE, table(("", ""), needle_methods(report))]
    return sections


def extras_lines(extras: Extras) -> list[str]:
    """Return results in a few lines for a terminal."""
    lines = []
    if extras.tasks is not None:
        for score in extras.tasks.scores:
            if score.part_of is None:
                name, *cells = task_rows(extras.tasks, [score])[0]
                lines.append(f"{name:11} {cells[2]} -> {', '.join(cells[3:])}")
    if extras.needle is not None:
        for name, length, found, value in needle_rows(extras.needle):
            lines.append(f"needle      {name}, {length} tokens: found {found}, {value} nats")
    return lines


def task_head(report: TaskReport) -> tuple[str, ...]:
    """Return the titles of ``task_rows``."""
    return ("benchmark", "few-shot", "questions", report.original, *report.quantized)


def task_rows(report: TaskReport, scores: Sequence[TaskScore]) -> list[tuple[str, ...]]:
    """Return a row for each score: what it is of, the original's, and the quantized models' with their differences.

    Args:
        report: Where the scores are from.
        scores: Those that are wanted.
    """
    rows = []
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        name = f"{score.task} {metric}"
        shown = [f"{_value(each.score.value, score)} ({_difference(each, score)})" for each in score.quantized]
        fewshot = "" if score.fewshot is None else str(score.fewshot)
        rows.append((name, fewshot, str(score.questions), _score(score.original, score), *shown))
    return rows


def _is_share(score: TaskScore) -> bool:
    return score.higher_is_better is not False and 0 <= score.original.value <= 1


def _value(value: float, score: TaskScore) -> str:
    return percent(Estimate(value, None)) if _is_share(score) else f"{value:.4g}"


def _score(value: Estimate, score: TaskScore) -> str:
    return percent(value) if _is_share(score) else estimate(value, 3)


def _difference(each: QuantizedScore, score: TaskScore) -> str:
    text = percent(each.difference, "+") if _is_share(score) else estimate(each.difference, 3, "+")
    return text if each.changed is None else f"{text}; {100 * each.changed:.1f} % changed"


def task_methods(report: TaskReport) -> list[tuple[str, str]]:
    """Return how benchmarks were run, as names and values."""
    versions = {score.task: score.version for score in report.scores if score.part_of is None}
    return [
        ("asked by", report.engine),
        ("versions of the tasks", ", ".join(f"{task} {version}" for task, version in versions.items())),
        ("questions", "all" if report.limit is None else f"limited to {report.limit:g} of each task"),
        ("few-shot", "as each task says" if report.num_fewshot is None else str(report.num_fewshot)),
        ("chat template", "applied" if report.apply_chat_template else "not applied"),
        ("batch size", report.batch_size),
        ("dtype and device", f"{report.dtype} on {report.device}"),
        ("time", f"{report.seconds:.1f} s"),
    ]


def needle_rows(report: NeedleReport) -> list[tuple[str, str, str, str]]:
    """Return a row for each model and length: their names, the share found and nats, both with what changed."""
    rows = []
    for model in report.models:
        for each in model.lengths:
            found, value = percent(each.found), nats(each.nats)
            if each.found_change is not None and each.nats_change is not None:
                found += f" ({percent(each.found_change, '+')})"
                value += f" ({estimate(each.nats_change, 3, '+')})"
            rows.append((model.name, str(each.length), found, value))
    return rows


def needle_methods(report: NeedleReport) -> list[tuple[str, str]]:
    """Return how needles were hidden, as names and values."""
    return [
        ("text", report.text),
        ("texts of each length", f"{report.samples}, each asked at {len(DEPTHS)} depths with a number of its own"),
        ("dtype and device", f"{report.dtype} on {report.device}"),
        ("time", f"{report.seconds:.1f} s"),
    ]


def _grid(model: NeedleModel) -> list[tuple[str, ...]]:
    found: Mapping[tuple[float, int], float] = {(cell.depth, cell.length): cell.found for cell in model.cells}
    return [
        (f"{100 * depth:.0f} %", *(f"{100 * found[depth, each.length]:.0f} %" for each in model.lengths))
        for depth in DEPTHS
    ]


def _task_csv(report: TaskReport, score: TaskScore) -> list[dict[str, Any]]:
    same = {
        "task": score.task,
        "part_of": score.part_of,
        "metric": score.metric,
        "filter": score.filter,
        "fewshot": score.fewshot,
        "questions": score.questions,
    }

    def row(model: str, value: Estimate, each: QuantizedScore | None) -> dict[str, Any]:
        return {
            "model": model,
            **same,
            "score": value.value,
            "score_standard_error": value.standard_error,
            "difference": each and each.difference.value,
            "difference_standard_error": each and each.difference.standard_error,
            "changed": each and each.changed,
        }

    others = zip(report.quantized, score.quantized, strict=True)
    return [row(report.original, score.original, None), *(row(name, each.score, each) for name, each in others)]
