"""Reports as text: Markdown for files and model cards, lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ...tables import cell
from ..comparison import Comparison
from ..metrics.numbers import nats, percent, perplexity
from .content import Report
from .extras import (
    AGREEMENT_NOTE,
    ANSWERS_NOTE,
    NEEDLE_NOTE,
    TASKS_NOTE,
    Extras,
    agreement_table,
    answers_table,
    needle_grid,
    needle_methods,
    needle_table,
    prompt_of,
    task_methods,
    tasks_table,
)
from .tables import (
    DOMAINS_NOTE,
    detail_tables,
    domains_table,
    drift_table,
    kinds_table,
    methods_table,
    models_table,
    paired_table,
    percentiles_table,
    positions_table,
)
from .verdict import domains_sentence, headline, sentence, verdict_sentence

__all__ = ["joint_lines", "markdown_report", "summary_lines"]

_ERRORS_NOTE = (
    "Numbers after ± are one standard error; in brackets after KL is its 95 % confidence interval. Both treat "
    "sequences, not tokens, as independent, because the tokens of a sequence are alike; differences are paired on the "
    "same tokens. In brackets after a perplexity: the difference from the original. Δp: change in the true token's "
    "probability, root mean square and mean. Top-5: share of the original's five most likely tokens that are also "
    "among the quantized model's five."
)


def markdown_report(report: Report) -> str:
    """Return the report as Markdown."""
    comparisons = report.comparisons
    models, percentiles = models_table(comparisons), percentiles_table(comparisons)
    alone = len(comparisons) == 1
    if alone:
        models, percentiles = models.transposed(), percentiles.transposed()
    sections = [
        f"# {cell(report.title)}",
        f"**{cell(headline(comparisons))}**",
        *([sentence(comparisons[0]), *_floor_notes(comparisons[0])] if alone else []),
        models.to_markdown(),
        _ERRORS_NOTE,
        "## KL divergence of tokens, nats",
        percentiles.to_markdown(),
    ]
    domains = domains_table(comparisons)
    if domains is not None:
        sections += ["## By domain", domains.to_markdown(), DOMAINS_NOTE]
    if alone:
        where = positions_table(comparisons[0]), kinds_table(comparisons[0])
        sections += ["## Where", *(each.to_markdown() for each in where)]
    if report.paired:
        note = "Second model minus first, paired over the same sequences, with 95 % confidence intervals."
        sections += ["## Differences between the models", note, paired_table(report.paired).to_markdown()]
    drift = drift_table(comparisons)
    if drift is not None:
        sections += ["## Measured error of hidden states, relative", drift.to_markdown()]
    sections += [
        *_answers_sections(comparisons),
        *_extras_sections(report.extras),
        "## How it was measured",
        methods_table(comparisons, report.made).to_markdown(),
    ]
    for title, table in detail_tables(report.details):
        sections += [f"## {cell(title)}", table.to_markdown()]
    return "\n\n".join(sections) + "\n"


def _answers_sections(comparisons: Sequence[Comparison]) -> list[str]:
    answers = answers_table(comparisons)
    prompt = prompt_of(comparisons)
    sections = ["## The same prompt", f"> {cell(prompt)}", answers.to_markdown(), ANSWERS_NOTE] if answers else []
    agreement = agreement_table(comparisons)
    return sections if agreement is None else [*sections, "## Answers", agreement.to_markdown(), AGREEMENT_NOTE]


def _extras_sections(extras: Extras) -> list[str]:
    # The parts of groups of benchmarks are left to the page, JSON and CSV.
    tasks, needle = extras.tasks, extras.needle
    sections = []
    if tasks is not None:
        scores, methods = tasks_table(tasks), task_methods(tasks)
        sections += ["## Benchmarks", scores.to_markdown(), TASKS_NOTE, methods.to_markdown()]
    if needle is not None:
        sections += ["## Needle in a haystack", needle_table(needle).to_markdown()]
        for model in needle.models:
            sections.append(f"Found by {cell(model.name)}, depth of the needle against length:")
            sections.append(needle_grid(model).to_markdown())
        sections += [NEEDLE_NOTE, needle_methods(needle).to_markdown()]
    return sections


def summary_lines(comparison: Comparison) -> list[str]:
    """Return the result in a few lines for a terminal."""
    summary = comparison.summary
    lines = [
        f"perplexity  {perplexity(summary.original_perplexity)} -> {perplexity(summary.quantized_perplexity)}"
        f"  (difference {perplexity(summary.perplexity_difference, sign='+')})",
        f"KL          {nats(summary.kl_nats)} nats per token"
        f"  (median {nats(summary.kl_median_nats)}, 99 % below {nats(summary.kl_p99_nats)},"
        f" max {nats(summary.kl_max_nats)}, floor {nats(comparison.floor_nats)})",
        f"top-1       {percent(summary.top1_agreement)} of tokens agree; top-5 {percent(summary.top5_agreement)}",
    ]
    if comparison.tokens_per_second is not None:
        lines.append(f"speed       {comparison.tokens_per_second:.3g} tokens per second in llama.cpp on this machine")
    lines += [*_floor_notes(comparison), *_table_lines([comparison])]
    return [*lines, domains_sentence(comparison)] if comparison.domains else lines


def joint_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the results of several models in a line each for a terminal, and the verdict on all."""
    width = max(len(each.quantized.name) for each in comparisons)
    return [
        *(
            f"{each.quantized.name:{width}}  {nats(each.summary.kl_nats.value)} nats/token; {verdict_sentence(each)}"
            for each in comparisons
        ),
        *_table_lines(comparisons),
        headline(comparisons),
    ]


def _table_lines(comparisons: Sequence[Comparison]) -> list[str]:
    tables = (domains_table(comparisons), agreement_table(comparisons))
    return [line for table in tables if table is not None for line in table.to_lines()]


def _floor_notes(comparison: Comparison) -> list[str]:
    if comparison.within_floor:
        return [
            f"The mean KL divergence is within the floor of {nats(comparison.floor_nats)} nats per token: it cannot be "
            f"told from what {comparison.dtype} arithmetic alone does to the original."
        ]
    if comparison.within_bfloat16 and comparison.bfloat16_floor_nats is not None:
        return [
            f"The mean KL divergence is below {nats(comparison.bfloat16_floor_nats)} nats per token: less than running "
            "the original in bfloat16 instead of float32 does to it."
        ]
    return []
