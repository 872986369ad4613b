"""What models score in benchmarks, and differences between them in pairs over the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics.estimate import Estimate

__all__ = ["QuantizedScore", "TaskScore", "task_scores"]

_SAME = 1e-6
"""Relative difference up to which a mean over the questions is the score that lm-eval reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedScore:
    """What a quantized model scores, beside the original.

    Attributes:
        score: Its score. The standard error is None where the score is no mean over the questions.
        difference: The score minus the original's. Its standard error is that of the differences over the same
            questions, which is several times smaller than those of both scores.
        changed: Share of the questions that are scored otherwise than with the original, either way, 0 to 1; None
            where the score is no mean over the questions. It shows damage that cancels in the difference.
    """

    score: Estimate
    difference: Estimate
    changed: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one benchmark, or of a group of them.

    Attributes:
        task: lm-eval's name.
        part_of: The listed group that it belongs to; None for what was asked for.
        metric: lm-eval's name, as ``acc_norm``.
        filter: How answers were extracted, as ``strict-match``; ``none`` where nothing is.
        version: Of the task's definition.
        fewshot: Examples before each question.
        questions: Number of them.
        higher_is_better: Whether a higher score is better; None if lm-eval does not say.
        original: What the original scores.
        quantized: What the quantized models score.
    """

    task: str
    part_of: str | None
    metric: str
    filter: str
    version: str
    fewshot: int | None
    questions: int
    higher_is_better: bool | None
    original: Estimate
    quantized: tuple[QuantizedScore, ...]


def task_scores(
    asked: Sequence[str], original: Mapping[str, Any], quantized: Sequence[Mapping[str, Any]]
) -> tuple[TaskScore, ...]:
    """Pair results of ``lm_eval.simple_evaluate``.

    Args:
        asked: Names of tasks and groups, in the order of the report.
        original: The original's results, with logged samples.
        quantized: The same of each quantized model, on the same questions.
    """
    return tuple(score for name in asked for score in _walk(name, None, original, quantized))


def _walk(
    name: str, part_of: str | None, original: Mapping[str, Any], quantized: Sequence[Mapping[str, Any]]
) -> Iterator[TaskScore]:
    keys = [key for key in original["results"].get(name, {}) if "," in key and "_stderr," not in key]
    for key in keys:
        yield _score(name, part_of, key, original, quantized)
    for child in original["group_subtasks"].get(name, ()):
        yield from _walk(child, name if keys else part_of, original, quantized)


def _score(
    name: str, part_of: str | None, key: str, original: Mapping[str, Any], quantized: Sequence[Mapping[str, Any]]
) -> TaskScore:
    metric, _, filter_name = key.partition(",")
    leaves = [leaf for leaf in _leaves(name, original) if key in original["results"][leaf]]
    reported = float(original["results"][name][key])
    base = _values(leaves, metric, filter_name, original)
    weights = _weights(base, reported)
    scores = []
    for other in quantized:
        other_reported = float(other["results"][name][key])
        values = _values(leaves, metric, filter_name, other)
        if base is None or weights is None or values is None or not _same_questions(leaves, original, other):
            difference = Estimate(other_reported - reported, None)
            scores.append(QuantizedScore(score=Estimate(other_reported, None), difference=difference, changed=None))
            continue
        changes = [after - before for before, after in zip(base, values, strict=True)]
        changed = sum(int((change != 0).sum()) for change in changes) / sum(map(len, changes))
        scores.append(QuantizedScore(score=_mean(values, weights), difference=_mean(changes, weights), changed=changed))
    fewshot = original["n-shot"].get(name)
    return TaskScore(
        task=name,
        part_of=part_of,
        metric=metric,
        filter=filter_name,
        version=str(original["versions"].get(name)),
        fewshot=fewshot if isinstance(fewshot, int) else None,
        questions=sum(original["n-samples"][leaf]["effective"] for leaf in leaves),
        higher_is_better=original["higher_is_better"].get(name, {}).get(metric),
        original=Estimate(reported, None) if base is None or weights is None else _mean(base, weights),
        quantized=tuple(scores),
    )


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    children = results["group_subtasks"].get(name, ())
    return [leaf for child in children for leaf in _leaves(child, results)] if children else [name]


def _values(leaves: Sequence[str], metric: str, filter_name: str, results: Mapping[str, Any]) -> list[Tensor] | None:
    # What each question scores, float64, one tensor a task; None if a question has no number of its own.
    tensors = []
    for leaf in leaves:
        samples = [sample for sample in results["samples"][leaf] if sample["filter"] == filter_name]
        values = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        if not values or not all(isinstance(value, (bool, int, float)) for value in values):
            return None
        tensors.append(torch.tensor([float(value) for value in values], dtype=torch.float64))
    return tensors


def _same_questions(leaves: Sequence[str], first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    asked, others = (
        {(leaf, sample["doc_id"], sample["doc_hash"]) for leaf in leaves for sample in results["samples"][leaf]}
        for results in (first, second)
    )
    return asked == others


def _weights(values: Sequence[Tensor] | None, reported: float) -> list[float] | None:
    # Groups average their tasks by size or equally: whichever gives what lm-eval reports.
    if values is None:
        return None
    sizes = [len(each) for each in values]
    for weights in ([size / sum(sizes) for size in sizes], [1 / len(sizes)] * len(sizes)):
        if math.isclose(_mean(values, weights).value, reported, rel_tol=_SAME, abs_tol=_SAME):
            return weights
    return None


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Estimate:
    # Questions are independent, tasks are strata: the variances of their means add up.
    value = sum(weight * float(each.mean()) for weight, each in zip(weights, values, strict=True))
    if any(len(each) < 2 for each in values):
        return Estimate(value, None)
    variance = sum(
        weight**2 * float(each.var(correction=1)) / len(each) for weight, each in zip(weights, values, strict=True)
    )
    return Estimate(value, math.sqrt(variance))
