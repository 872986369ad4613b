"""Comparisons as text: Markdown for reports and model cards, lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...tables import cell, table
from ...version import __version__
from ..comparison import Comparison
from ..metrics.estimate import Estimate, Interval
from ..metrics.paired import PairedDifference, paired_differences
from ..models import ModelSummary
from .extras import NO_EXTRAS, Extras, extras_markdown
from .numbers import estimate, nats, percent, perplexity
from .verdict import headline, verdict_sentence

__all__ = [
    "Details",
    "comparison_table",
    "joint_lines",
    "joint_markdown",
    "markdown_report",
    "method_rows",
    "paired_rows",
    "sentence",
    "summary_lines",
]

_DRIFT_ROWS = 9
"""Blocks that a table shows of the drift, evenly spread; the drawing and JSON show all."""

Details = Mapping[str, Mapping[str, str | float]]
"""More sections of a report: titles, and for each the rows of its table."""


def markdown_report(comparison: Comparison, details: Details | None = None, extras: Extras = NO_EXTRAS) -> str:
    """Return the report on one model as Markdown.

    Args:
        comparison: What was measured.
        details: As in ``write_report``.
        extras: As in ``write_report``.
    """
    sections = [
        f"# {cell(comparison.quantized.name)} against {cell(comparison.original.name)}",
        f"**{cell(verdict_sentence(comparison))}**",
        sentence(comparison),
        *_floor_notes(comparison),
        _damage_table(comparison),
        _ERRORS_NOTE,
        "## KL divergence per token",
        _divergence_table(comparison),
        "## Where",
        _positions_table(comparison),
        _kinds_table(comparison),
        *_drift_sections([comparison]),
        *extras_markdown(extras),
        "## How it was measured",
        table(("", ""), method_rows([comparison])),
        *_details_sections(details),
    ]
    return "\n\n".join(sections) + "\n"


def joint_markdown(
    comparisons: Sequence[Comparison], details: Details | None = None, extras: Extras = NO_EXTRAS
) -> str:
    """Return the report on several models as Markdown.

    Args:
        comparisons: At least one; all with the same original on the same text.
        details: As in ``write_report``.
        extras: As in ``write_report``.

    Raises:
        ConfigError: They are not.
    """
    paired = paired_differences(comparisons)
    pairs = [
        "## Differences between the models",
        "In pairs over the same rows: what the second has more than the first, with 95 % confidence intervals.",
        table(("first", "second", "KL, nats per token", "perplexity ratio", "top-1 agreement"), paired_rows(paired)),
    ]
    verdicts = "\n".join(f"- {cell(each.quantized.name)}: {verdict_sentence(each)}" for each in comparisons)
    sections = [
        f"# Quantized models against {cell(comparisons[0].original.name)}",
        f"**{cell(headline(comparisons))}**",
        comparison_table(comparisons),
        verdicts,
        _ERRORS_NOTE,
        "## KL divergence per token, and what became of the most likely tokens",
        _tokens_table(comparisons),
        *(pairs if paired else []),
        *_drift_sections(comparisons),
        *extras_markdown(extras),
        "## How it was measured",
        table(("", ""), method_rows(comparisons)),
        *_details_sections(details),
    ]
    return "\n\n".join(sections) + "\n"


def _details_sections(details: Details | None) -> list[str]:
    sections = []
    for title, section in (details or {}).items():
        rows = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in section.items()]
        sections += [f"## {cell(title)}", table(("", ""), rows)]
    return sections


_ERRORS_NOTE = (
    "Numbers after ± are one standard error. They take rows, not tokens, as independent, because the tokens of a "
    "row are alike; differences are paired on the same tokens."
)


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
    return [*lines, *_floor_notes(comparison)]


def joint_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the results of several models in a line each for a terminal, and the verdict on all."""
    width = max(len(each.quantized.name) for each in comparisons)
    return [
        *(f"{each.quantized.name:{width}}  {verdict_sentence(each)}" for each in comparisons),
        headline(comparisons),
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table with the original in its first row and a quantized model in each other.

    Args:
        comparisons: At least one; all with the same original on the same text.
    """
    first = comparisons[0]
    rows = [
        (*_model_cells(first.original), perplexity(first.summary.original_perplexity), "", "0", "100 %"),
        *(
            (
                *_model_cells(each.quantized),
                perplexity(each.summary.quantized_perplexity),
                perplexity(each.summary.perplexity_difference, sign="+"),
                nats(each.summary.kl_nats),
                percent(each.summary.top1_agreement),
            )
            for each in comparisons
        ),
    ]
    head = ("model", "size", "bits per parameter", "perplexity", "difference", "KL, nats per token", "top-1 agreement")
    return table(head, rows)


def sentence(comparison: Comparison) -> str:
    """Return the result on one model as a sentence."""
    summary = comparison.summary
    change = summary.perplexity_ratio
    relative = estimate(change.scaled(100 * (change.value - 1), 100), 2, "+")
    return (
        f"Over {comparison.predicted_tokens} tokens of evaluation text the quantized model's predictions are "
        f"{nats(summary.kl_nats.value)} nats per token away from the original's (mean KL divergence), "
        f"{percent(Estimate(summary.top1_agreement.value, None))} of its most likely next tokens are the same, "
        f"and its perplexity is {summary.quantized_perplexity.value:.3f} instead of "
        f"{summary.original_perplexity.value:.3f} ({relative} %)."
    )


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


def _drift_sections(comparisons: Sequence[Comparison]) -> list[str]:
    if not all(each.drift for each in comparisons):
        return []
    count = min(len(each.drift) for each in comparisons)
    names = [""] if len(comparisons) == 1 else [f"{each.quantized.name}, " for each in comparisons]
    head = ["after", *(f"{name}{which}" for name in names for which in ("tokens but the first", "first token"))]
    rows = []
    for number in sorted({round(step * (count - 1) / (_DRIFT_ROWS - 1)) for step in range(_DRIFT_ROWS)}):
        places = [each.drift[number] for each in comparisons]
        block = places[0].block
        cells = [nats(error) for place in places for error in (place.error, place.first_token)]
        rows.append(("the token embeddings" if block is None else f"block {block}", *cells))
    return ["## Measured error of hidden states, relative", table(head, rows)]


def _damage_table(comparison: Comparison) -> str:
    summary = comparison.summary
    original, quantized = _model_cells(comparison.original), _model_cells(comparison.quantized)
    rows = [
        ("size of the weights", original[1], quantized[1], ""),
        ("bits per parameter of the original", original[2], quantized[2], ""),
        (
            "perplexity",
            perplexity(summary.original_perplexity),
            perplexity(summary.quantized_perplexity),
            perplexity(summary.perplexity_difference, sign="+"),
        ),
        ("perplexity ratio", "", "", estimate(summary.perplexity_ratio, 5)),
        ("mean KL divergence, nats per token", "", "", nats(summary.kl_nats)),
        ("same most likely token (top-1)", "", "", percent(summary.top1_agreement)),
        ("shared among the five most likely (top-5)", "", "", percent(summary.top5_agreement)),
        ("change of the true token's probability, mean", "", "", percent(summary.probability_change, "+")),
        ("the same, root mean square", "", "", percent(summary.probability_change_rms)),
    ]
    return table(("", "original", "quantized", "difference"), rows)


def _divergence_table(comparison: Comparison) -> str:
    summary = comparison.summary
    rows = [
        ("mean", nats(summary.kl_nats)),
        ("median", nats(summary.kl_median_nats)),
        ("90 % below", nats(summary.kl_p90_nats)),
        ("99 % below", nats(summary.kl_p99_nats)),
        ("99.9 % below", nats(summary.kl_p999_nats)),
        ("largest", nats(summary.kl_max_nats)),
        ("floor of the mean", nats(comparison.floor_nats)),
        *([("mean of bfloat16 alone", nats(comparison.bfloat16_floor_nats))] if comparison.bfloat16_floor_nats else []),
    ]
    return table(("KL(original ‖ quantized)", "nats"), rows)


def _tokens_table(comparisons: Sequence[Comparison]) -> str:
    head = ("model", "median", "90 % below", "99 % below", "99.9 % below", "largest", "top-5", "Δp, mean", "Δp, RMS")
    rows = []
    for each in comparisons:
        summary = each.summary
        quantiles = (summary.kl_median_nats, summary.kl_p90_nats, summary.kl_p99_nats, summary.kl_p999_nats)
        rows.append(
            (
                each.quantized.name,
                *map(nats, (*quantiles, summary.kl_max_nats)),
                percent(summary.top5_agreement),
                percent(summary.probability_change, "+"),
                percent(summary.probability_change_rms),
            )
        )
    return table(head, rows)


def _positions_table(comparison: Comparison) -> str:
    rows = [
        (
            f"{each.first} to {each.last}",
            nats(each.kl_nats),
            percent(each.top1_agreement),
            estimate(each.original_perplexity, 4),
            estimate(each.perplexity_ratio, 4),
        )
        for each in comparison.profile.positions
    ]
    head = ("tokens before the predicted one", "KL, nats per token", "top-1 agreement")
    return table((*head, "perplexity, original", "perplexity ratio"), rows)


def _kinds_table(comparison: Comparison) -> str:
    rows = [
        (
            each.kind,
            str(each.rows),
            nats(each.kl_nats),
            percent(each.top1_agreement),
            estimate(each.perplexity_ratio, 4),
        )
        for each in comparison.profile.kinds
    ]
    return table(("kind of text", "rows", "KL, nats per token", "top-1 agreement", "perplexity ratio"), rows)


def paired_rows(paired: Sequence[PairedDifference]) -> list[tuple[str, ...]]:
    """Return the rows of the table of differences: two names, and values with their confidence intervals."""
    return [
        (
            pair.first,
            pair.second,
            _with_interval(f"{pair.kl_nats.value:+.3g}", pair.kl_interval, "+.3g"),
            _with_interval(f"{pair.perplexity_ratio.value:.5f}", pair.perplexity_interval, ".5f"),
            _with_interval(f"{100 * pair.top1_agreement.value:+.2f} %", pair.top1_interval, "+.2f", 100),
        )
        for pair in paired
    ]


def _with_interval(value: str, interval: Interval | None, form: str, scale: float = 1.0) -> str:
    if interval is None:
        return value
    return f"{value} ({scale * interval.low:{form}} to {scale * interval.high:{form}})"


def method_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Return how it was measured, as names and values."""
    comparison = comparisons[0]
    return [
        ("text", comparison.text),
        ("fingerprint of the token ids", comparison.text_fingerprint),
        (
            "window and stride",
            f"{comparison.rows} rows of {comparison.row_tokens} tokens, stride {comparison.stride}: none sees another",
        ),
        ("BOS", "each row begins with it" if comparison.adds_bos else "none, as the tokenizer adds none"),
        ("predicted tokens", f"{comparison.predicted_tokens}: all but the first of each row"),
        ("run by", comparison.engine),
        ("dtype and device", f"{comparison.dtype} on {comparison.device}"),
        ("floor", f"{nats(comparison.floor_nats)} nats per token: {comparison.floor_definition}"),
        *_bfloat16_rows(comparison),
        ("original", f"{comparison.original.name}, fingerprint {comparison.original.fingerprint}"),
        *(("quantized", f"{each.quantized.name}, fingerprint {each.quantized.fingerprint}") for each in comparisons),
        *([("time", f"{comparison.seconds:.1f} s")] if len(comparisons) == 1 else []),
        ("bpwise", __version__),
    ]


def _bfloat16_rows(comparison: Comparison) -> list[tuple[str, str]]:
    if comparison.bfloat16_floor_nats is None:
        return []
    return [
        (
            "bfloat16 alone",
            f"{nats(comparison.bfloat16_floor_nats)} nats per token: mean KL divergence of the original in bfloat16 "
            f"from itself in float32, both on {comparison.device}, over the same {comparison.floor_tokens} tokens",
        )
    ]


def _model_cells(model: ModelSummary) -> tuple[str, str, str]:
    size = "" if model.stored_bytes is None else f"{model.stored_bytes / 1e6:.1f} MB"
    bits = "" if model.bits_per_parameter is None else f"{model.bits_per_parameter:.3f}"
    return model.name, size, bits
