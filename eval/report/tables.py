"""Tables of a report: made once here, written as Markdown, HTML, CSV or lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...tables import AnyCell, NotedCell, Table, bytes_text
from ...version import __version__
from ..comparison import Comparison
from ..metrics.bootstrap import RESAMPLES, Bootstrapped
from ..metrics.estimate import Estimate, Interval, confidence_interval
from ..metrics.numbers import estimate, nats, percent, perplexity
from ..models import ModelSummary
from .drawings.svg import series_color
from .paired import PairedDifference
from .verdict import beaten_by, verdict

__all__ = [
    "DOMAINS_NOTE",
    "Details",
    "detail_tables",
    "domains_records",
    "domains_table",
    "drift_table",
    "flat",
    "kinds_table",
    "methods_table",
    "models_records",
    "models_table",
    "paired_table",
    "percentiles_table",
    "positions_table",
    "with_bootstrap",
    "with_ends",
]

Details = Mapping[str, Mapping[str, str | float]]
"""More sections of a report: titles, and for each the rows of its table."""

DOMAINS_NOTE = (
    "Beside or beneath each number: its 95 % interval over documents (bootstrap), since the tokens of a document are "
    "alike. Of chats and tool calls only the assistant's answers count; how they are found is told below."
)

_DRIFT_ROWS = 9
"""Blocks that a table shows of the drift, evenly spread; the drawing and JSON show all."""


def models_table(comparisons: Sequence[Comparison], broken: Sequence[str] = ()) -> Table:
    """Return a row for the original and one for each quantized model, in the comparisons' order.

    Args:
        comparisons: At least one; all with the same original on the same text.
        broken: Names of broken models, which come last and have no numbers.
    """
    first = comparisons[0]
    exact = NotedCell("100 %", key=1.0)
    base = first.summary.original_perplexity
    head = ["model", "KL, nats/token", "top-1 agreement", "size", "perplexity", "Δp, RMS"]
    original: tuple[AnyCell, ...] = (
        first.original.name,
        NotedCell("0", key=0.0),
        exact,
        _size(first.original),
        NotedCell(perplexity(base), key=base.value),
        NotedCell("0", key=0.0),
    )
    notes = zip(comparisons, beaten_by(comparisons), strict=True)
    rows = [original, *(_model_row(number, each, better) for number, (each, better) in enumerate(notes))]
    if any(each.tokens_per_second for each in comparisons):
        head.append("tokens/s")
        speeds = [_speed(None), *(_speed(each.tokens_per_second) for each in comparisons)]
        rows = [(*row, speed) for row, speed in zip(rows, speeds, strict=True)]
    rows += [(NotedCell(name, "broken"), *[NotedCell("–", key=-1.0)] * (len(head) - 1)) for name in broken]
    return Table.of(head, rows)


def _speed(tokens_per_second: float | None) -> NotedCell:
    if tokens_per_second is None:
        return NotedCell("–", key=0.0)
    return NotedCell(f"{tokens_per_second:.3g}", key=tokens_per_second)


def _model_row(number: int, comparison: Comparison, better: Comparison | None) -> tuple[AnyCell, ...]:
    summary = comparison.summary
    note = verdict(comparison)
    note += "" if better is None else f"; larger than {better.quantized.name}, and worse"
    interval = confidence_interval(summary.kl_nats, comparison.rows)
    # With very few rows the interval reaches below zero, where no divergence lies.
    reach = "" if interval is None else f"{max(0.0, interval.low):.3g} to {interval.high:.3g}"
    ppl, rms = summary.quantized_perplexity, summary.probability_change_rms
    return (
        NotedCell(comparison.quantized.name, note, color=series_color(number)),
        NotedCell(nats(summary.kl_nats), reach, summary.kl_nats.value),
        NotedCell(
            percent(summary.top1_agreement), f"top-5 {percent(summary.top5_agreement)}", summary.top1_agreement.value
        ),
        _size(comparison.quantized),
        NotedCell(perplexity(ppl), perplexity(summary.perplexity_difference, "+"), ppl.value),
        NotedCell(percent(rms), f"mean {percent(summary.probability_change, '+')}", rms.value),
    )


def _size(model: ModelSummary) -> NotedCell:
    if model.stored_bytes is None:
        return NotedCell("unknown", key=-1.0)
    bits = "" if model.bits_per_parameter is None else f"{model.bits_per_parameter:.3f} bits/parameter"
    return NotedCell(bytes_text(model.stored_bytes), bits, model.stored_bytes)


def models_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return a record for each quantized model, every number with all its digits."""
    return [
        {
            "model": each.quantized.name,
            "stored_bytes": each.quantized.stored_bytes,
            "bits_per_parameter": each.quantized.bits_per_parameter,
            **flat(asdict(each.summary)),
            "floor_nats": each.floor_nats,
            "bfloat16_floor_nats": each.bfloat16_floor_nats,
            "tokens_per_second": each.tokens_per_second,
            "text_fingerprint": each.text_fingerprint,
        }
        for each in comparisons
    ]


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the value and the standard error of estimates as two entries."""
    result: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            result[key], result[f"{key}_standard_error"] = value["value"], value["standard_error"]
        else:
            result[key] = value
    return result


def percentiles_table(comparisons: Sequence[Comparison]) -> Table:
    """Return how the KL divergence of tokens is spread, a row for each model."""
    head = ("median", "90 % below", "99 % below", "99.9 % below", "largest", "floor of the mean", "bfloat16 alone")
    rows = []
    for each in comparisons:
        kl = each.summary
        quantiles = (kl.kl_median_nats, kl.kl_p90_nats, kl.kl_p99_nats, kl.kl_p999_nats, kl.kl_max_nats)
        values = (*quantiles, each.floor_nats, each.bfloat16_floor_nats)
        rows.append((each.quantized.name, *("unknown" if value is None else nats(value) for value in values)))
    return Table.of(("model", *head), rows)


def paired_table(paired: Iterable[PairedDifference]) -> Table:
    """Return differences between models, with their confidence intervals."""
    head = ("first", "second", "KL, nats/token", "perplexity ratio", "top-1 agreement")
    rows = [
        (
            pair.first,
            pair.second,
            _with_interval(pair.kl_nats, pair.kl_interval, "+.3g"),
            _with_interval(pair.perplexity_ratio, pair.perplexity_interval, ".5f"),
            _with_interval(pair.top1_agreement, pair.top1_interval, "+.2f", 100, " %"),
        )
        for pair in paired
    ]
    return Table.of(head, rows)


def _with_interval(
    value: Estimate, interval: Interval | None, form: str, scale: float = 1.0, unit: str = ""
) -> NotedCell:
    note = "" if interval is None else f"{scale * interval.low:{form}} to {scale * interval.high:{form}}"
    return NotedCell(f"{scale * value.value:{form}}{unit}", note)


def positions_table(comparison: Comparison) -> Table:
    """Return the damage by the number of tokens that a prediction sees."""
    head = ("tokens before the predicted one", "KL, nats/token", "top-1 agreement", "perplexity ratio")
    rows = [
        (
            f"{each.first} to {each.last}",
            nats(each.kl_nats),
            percent(each.top1_agreement),
            estimate(each.perplexity_ratio, 4),
            estimate(each.original_perplexity, 4),
        )
        for each in comparison.profile.positions
    ]
    return Table.of((*head, "perplexity, original"), rows)


def kinds_table(comparison: Comparison) -> Table:
    """Return the damage on each kind of text."""
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
    return Table.of(("kind of text", "rows", "KL, nats/token", "top-1 agreement", "perplexity ratio"), rows)


def domains_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return the damage by domain, a row for each model; None if it was not measured."""
    several = len(comparisons) > 1
    rows = [
        (
            damage.domain,
            *([each.quantized.name] if several else []),
            str(damage.documents),
            str(damage.tokens),
            with_bootstrap(damage.kl_nats, ".3g"),
            with_bootstrap(damage.kl_p99_nats, ".3g"),
            with_bootstrap(damage.top1_agreement, ".1f", 100, " %"),
        )
        for damages in zip(*(each.domains for each in comparisons), strict=True)
        for each, damage in zip(comparisons, damages, strict=True)
    ]
    head = ("domain", *(["model"] if several else []), "documents", "tokens", "KL, nats/token", "99 % of tokens below")
    return Table.of((*head, "top-1 agreement"), rows) if rows else None


def domains_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return a record for each quantized model and domain, every number with all its digits."""
    return [
        {"model": each.quantized.name, **with_ends(asdict(damage))} for each in comparisons for damage in each.domains
    ]


def with_ends(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with a number and the ends of its interval as three entries."""
    result: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            ends = value["interval"] or {}
            result |= {key: value["value"], f"{key}_low": ends.get("low"), f"{key}_high": ends.get("high")}
        else:
            result[key] = value
    return result


def with_bootstrap(number: Bootstrapped, form: str, scale: float = 1.0, unit: str = "") -> NotedCell:
    """Return a number with its interval as a note.

    Args:
        number: Both.
        form: How they are formatted.
        scale: What they are multiplied with before.
        unit: What follows the number.
    """
    ends = number.interval
    note = "" if ends is None else f"{scale * ends.low:{form}} to {scale * ends.high:{form}}"
    return NotedCell(f"{scale * number.value:{form}}{unit}", note, number.value)


def drift_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Return the relative error of hidden states after some blocks; None if it is not known of every model."""
    if not all(each.drift for each in comparisons):
        return None
    count = min(len(each.drift) for each in comparisons)
    names = [""] if len(comparisons) == 1 else [f"{each.quantized.name}, " for each in comparisons]
    head = ["after", *(f"{name}{which}" for name in names for which in ("tokens but the first", "first token"))]
    rows = []
    for number in sorted({round(step * (count - 1) / (_DRIFT_ROWS - 1)) for step in range(_DRIFT_ROWS)}):
        places = [each.drift[number] for each in comparisons]
        block = places[0].block
        cells = [nats(error) for place in places for error in (place.error, place.first_token)]
        rows.append(("the token embeddings" if block is None else f"block {block}", *cells))
    return Table.of(head, rows)


def methods_table(comparisons: Sequence[Comparison], made: Mapping[str, str]) -> Table:
    """Return how it was measured.

    Args:
        comparisons: At least one; all with the same original on the same text.
        made: ``run_facts`` of the process that measured.
    """
    first = comparisons[0]
    window = f"{first.rows} rows of {first.row_tokens} tokens, stride {first.stride}: none sees another"
    facts = [
        ("text", first.text),
        ("fingerprint of the token ids", first.text_fingerprint),
        ("window and stride", window),
        ("BOS", "each row begins with it" if first.adds_bos else "none, as the tokenizer adds none"),
        ("predicted tokens", f"{first.predicted_tokens}: all but the first of each row"),
        ("run by", first.engine),
        ("dtype and device", f"{first.dtype} on {first.device}"),
        ("floor", f"{nats(first.floor_nats)} nats per token: {first.floor_definition}"),
    ]
    if first.bfloat16_floor_nats is not None:
        meaning = (
            "mean KL divergence of the original in bfloat16 from itself in float32, both on "
            f"{first.device}, over the same {first.floor_tokens} tokens"
        )
        facts.append(("bfloat16 alone", f"{nats(first.bfloat16_floor_nats)} nats per token: {meaning}"))
    facts += [
        (f"domain {each.domain}", f"{each.text}; counted: {each.mask}; fingerprint {each.text_fingerprint}")
        for each in first.domains
    ]
    if first.domains:
        drawn = f"of {RESAMPLES} draws of documents with all of their tokens (percentile bootstrap)"
        facts.append(("intervals of domains", f"95 %, {drawn}"))
    facts.append(("original", f"{first.original.name}, fingerprint {first.original.fingerprint}"))
    facts += [("quantized", f"{each.quantized.name}, fingerprint {each.quantized.fingerprint}") for each in comparisons]
    if len(comparisons) == 1:
        facts.append(("time", f"{first.seconds:.1f} s"))
    if any(each.tokens_per_second for each in comparisons):
        facts.append(("speed", "tokens written one after another by llama.cpp on this machine, after a short prompt"))
    files = [each for comparison in comparisons for each in comparison.quantized.sha256.items()]
    facts += [(f"SHA-256 of {name}", digest) for name, digest in files]
    return Table.of_facts([*facts, *made.items(), ("bpwise", __version__)])


def detail_tables(details: Details) -> list[tuple[str, Table]]:
    """Return further sections: their titles, and their tables."""
    return [
        (title, Table.of_facts((name, f"{value:.6g}" if isinstance(value, float) else str(value))
                               for name, value in section.items()))
        for title, section in details.items()
    ]  # fmt: skip
