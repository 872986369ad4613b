"""Where the damage lies: along the rows, by kind of text, over the tokens' divergences, and at the worst tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...measure.text.calibration import CalibrationSet
from ...measure.text.tokenizer import Tokenizer
from .divergence import TokenStatistics
from .estimate import Estimate, mean_over_rows

__all__ = ["Choice", "Histogram", "KindDamage", "PositionDamage", "Profile", "RowMeans", "WorstToken", "profile_of"]

_BINS_PER_DECADE = 5
_LOWEST_EXPONENT = -12
"""Divergences below 1e-12 nats are float32 rounding of agreement; they, and those below 0, go into the first bin."""
_HIGHEST_EXPONENT = 3
"""A divergence of 1000 nats would take a probability of exp(-1000), which float32 logits rarely hold."""

_WORST_COUNT = 12
_WORST_PER_ROW = 2
"""One passage that a model cannot make out would fill the list."""

_LARGEST_EXPONENT = 700.0
_CONTEXT_TOKENS = 48
"""Tokens shown before a worst token: two or three lines of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionDamage:
    """Damage to the predictions that see a certain number of tokens.

    Attributes:
        first: Fewest tokens before the predicted one, a power of two.
        last: Most of them.
        kl_nats: Mean KL divergence per token.
        top1_agreement: Share of equal most likely tokens, 0 to 1.
        original_perplexity: The original's, dimensionless: whether it makes anything of so long a context.
        perplexity_ratio: Quantized over original, dimensionless.
    """

    first: int
    last: int
    kl_nats: Estimate
    top1_agreement: Estimate
    original_perplexity: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class KindDamage:
    """Damage on one kind of text.

    Attributes:
        kind: The part of the rows' origins before the first ``: ``.
        rows: Rows of that kind.
        kl_nats: Mean KL divergence per token.
        top1_agreement: Share of equal most likely tokens, 0 to 1.
        perplexity_ratio: Quantized over original, dimensionless.
    """

    kind: str
    rows: int
    kl_nats: Estimate
    top1_agreement: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many tokens have a KL divergence of which magnitude.

    Bin ``i`` holds ``10 ** ((first_bin + i) / bins_per_decade)`` nats and above, up to where the next begins; all
    histograms have the same grid, so that models can be laid over each other.

    Attributes:
        bins_per_decade: Bins for every factor of ten.
        first_bin: Number of the first bin that is kept.
        counts: Tokens in each bin; bins that are empty at either end are left out.
    """

    bins_per_decade: int
    first_bin: int
    counts: tuple[int, ...]

    def edge_nats(self, index: int) -> float:
        """Return where bin ``index`` begins; ``len(counts)`` for the end of the last."""
        return float(10.0 ** ((self.first_bin + index) / self.bins_per_decade))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A token that a model may go on with.

    Attributes:
        id: Its id.
        text: What it decodes to; None without a tokenizer.
        probability: What the model gives it, 0 to 1.
    """

    id: int
    text: str | None
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstToken:
    """One of the predictions that are furthest from the original's.

    Attributes:
        row: Index of the row.
        position: Index of the predicted token in the row.
        origin: What text the token is from.
        kl_nats: KL divergence.
        context_ids: Ids of the tokens before it, at most 48.
        context: What they decode to; None without a tokenizer.
        original: The true token, with the probability that the original gives it.
        quantized: The same of the quantized model.
        original_choices: What the original holds for most likely, at most five.
        quantized_choices: The same of the quantized model.
    """

    row: int
    position: int
    origin: str
    kl_nats: float
    context_ids: tuple[int, ...]
    context: str | None
    original: Choice
    quantized: Choice
    original_choices: tuple[Choice, ...]
    quantized_choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMeans:
    """Averages over the tokens of each row, for pairing with another model's. All have one entry a row.

    Attributes:
        kl_nats: KL divergence.
        original_nll_nats: The original's negative log-likelihood of the true token.
        quantized_nll_nats: The quantized model's.
        top1_agreement: Share of equal most likely tokens, 0 to 1.
    """

    kl_nats: tuple[float, ...]
    original_nll_nats: tuple[float, ...]
    quantized_nll_nats: tuple[float, ...]
    top1_agreement: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the damage lies.

    Attributes:
        histogram: Over the tokens' divergences.
        positions: By the number of tokens that a prediction sees, in powers of two.
        kinds: By kind of text, most rows first.
        worst: The tokens with the largest divergences, largest first, at most two of a row.
        row_means: Of every row.
    """

    histogram: Histogram
    positions: tuple[PositionDamage, ...]
    kinds: tuple[KindDamage, ...]
    worst: tuple[WorstToken, ...]
    row_means: RowMeans


def profile_of(statistics: TokenStatistics, rows: CalibrationSet, tokenizer: Tokenizer | None = None) -> Profile:
    """Say where the damage lies.

    Args:
        statistics: Of all tokens of the rows but the first of each, row after row.
        rows: The text.
        tokenizer: Decodes the worst tokens; None leaves their ids only.
    """
    count = len(rows.tokens)
    kl = statistics.kl_nats.double().view(count, -1)
    same = statistics.same_top1.double().view(count, -1)
    original_nll = statistics.original_nll_nats.double().view(count, -1)
    quantized_nll = statistics.quantized_nll_nats.double().view(count, -1)
    return Profile(
        histogram=_histogram(statistics.kl_nats),
        positions=tuple(
            PositionDamage(
                first=first,
                last=last,
                kl_nats=mean_over_rows(kl[:, first - 1 : last]),
                top1_agreement=mean_over_rows(same[:, first - 1 : last]),
                original_perplexity=_exponential(mean_over_rows(original_nll[:, first - 1 : last])),
                perplexity_ratio=_exponential(mean_over_rows((quantized_nll - original_nll)[:, first - 1 : last])),
            )
            for first, last in _powers_of_two(kl.shape[1])
        ),
        kinds=tuple(
            _kind_damage(kind, kl[members], same[members], (quantized_nll - original_nll)[members])
            for kind, members in _members(rows).items()
        ),
        worst=_worst(statistics, rows, tokenizer),
        row_means=RowMeans(
            kl_nats=tuple(kl.mean(dim=1).tolist()),
            original_nll_nats=tuple(original_nll.mean(dim=1).tolist()),
            quantized_nll_nats=tuple(quantized_nll.mean(dim=1).tolist()),
            top1_agreement=tuple(same.mean(dim=1).tolist()),
        ),
    )


def _powers_of_two(most: int) -> list[tuple[int, int]]:
    return [(1 << power, min((2 << power) - 1, most)) for power in range(most.bit_length())]


def _members(rows: CalibrationSet) -> dict[str, list[int]]:
    return {
        kind: [row for row, origin in enumerate(rows.origins) if origin.split(": ", 1)[0] == kind]
        for kind in rows.rows_per_kind
    }


def _kind_damage(kind: str, kl_nats: Tensor, same_top1: Tensor, nll_change: Tensor) -> KindDamage:
    return KindDamage(
        kind=kind,
        rows=len(kl_nats),
        kl_nats=mean_over_rows(kl_nats),
        top1_agreement=mean_over_rows(same_top1),
        perplexity_ratio=_exponential(mean_over_rows(nll_change)),
    )


def _exponential(nats: Estimate) -> Estimate:
    value = math.exp(min(nats.value, _LARGEST_EXPONENT))  # of a single token it may not fit a number
    return nats.scaled(value, value)


def _histogram(kl_nats: Tensor) -> Histogram:
    lowest, highest = _LOWEST_EXPONENT * _BINS_PER_DECADE, _HIGHEST_EXPONENT * _BINS_PER_DECADE - 1
    magnitudes = kl_nats.double().clamp(min=10.0**_LOWEST_EXPONENT).log10()
    bins = (magnitudes * _BINS_PER_DECADE).floor().clamp(lowest, highest).long()
    counts = torch.bincount(bins - lowest, minlength=highest - lowest + 1)
    filled = counts.nonzero()[:, 0]
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(
        bins_per_decade=_BINS_PER_DECADE,
        first_bin=lowest + first,
        counts=tuple(counts[first : last + 1].tolist()),
    )


def _worst(statistics: TokenStatistics, rows: CalibrationSet, tokenizer: Tokenizer | None) -> tuple[WorstToken, ...]:
    count = len(rows.tokens)
    kl = statistics.kl_nats.view(count, -1)
    columns = kl.topk(min(_WORST_PER_ROW, kl.shape[1])).indices
    indices = (columns + kl.shape[1] * torch.arange(count)[:, None]).flatten()
    order = indices[statistics.kl_nats[indices].argsort(descending=True)][:_WORST_COUNT]
    return tuple(_worst_token(statistics, index, rows, tokenizer) for index in order.tolist())


def _worst_token(
    statistics: TokenStatistics, index: int, rows: CalibrationSet, tokenizer: Tokenizer | None
) -> WorstToken:
    row, column = divmod(index, rows.tokens.shape[1] - 1)
    position = column + 1
    context = rows.tokens[row, max(0, position - _CONTEXT_TOKENS) : position].tolist()
    true_id = int(rows.tokens[row, position])

    def true_token(nll_nats: Tensor) -> Choice:
        return Choice(id=true_id, text=_decoded([true_id], tokenizer), probability=math.exp(-float(nll_nats[index])))

    def choices(ids: Tensor, probabilities: Tensor) -> tuple[Choice, ...]:
        return tuple(
            Choice(id=token, text=_decoded([token], tokenizer), probability=probability)
            for token, probability in zip(ids[index].tolist(), probabilities[index].tolist(), strict=True)
        )

    return WorstToken(
        row=row,
        position=position,
        origin=rows.origin_of(row, position),
        kl_nats=float(statistics.kl_nats[index]),
        context_ids=tuple(context),
        context=_decoded(context, tokenizer),
        original=true_token(statistics.original_nll_nats),
        quantized=true_token(statistics.quantized_nll_nats),
        original_choices=choices(statistics.original_top, statistics.original_top_probabilities),
        quantized_choices=choices(statistics.quantized_top, statistics.quantized_top_probabilities),
    )


def _decoded(ids: Sequence[int], tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.decode(list(ids))
