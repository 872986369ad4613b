"""Two quantized models of one original, compared in pairs over the rows that both have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ...errors import ConfigError
from ..comparison import Comparison
from ..metrics.estimate import Estimate, Interval, confidence_interval, mean_over_rows

__all__ = ["PairedDifference", "check_comparable", "kl_difference", "paired_differences"]

_LARGEST_EXPONENT = 700.0
"""Its exponential is near the end of float64: the interval of a broken model may reach further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """What the second of two models has more than the first. Intervals hold the true value with 95 % probability.

    Rows that are hard are hard for both, so the differences over rows spread far less than either model's numbers do.
    Intervals are None where there is only one row.

    Attributes:
        first: Name of a model.
        second: Name of the other.
        kl_nats: Mean KL divergence from the original per token, second minus first.
        kl_interval: Interval of it.
        perplexity_ratio: Second over first, dimensionless.
        perplexity_interval: Interval of it.
        top1_agreement: Share of tokens with the original's most likely token, second minus first, -1 to 1.
        top1_interval: Interval of it.
    """

    first: str
    second: str
    kl_nats: Estimate
    kl_interval: Interval | None
    perplexity_ratio: Estimate
    perplexity_interval: Interval | None
    top1_agreement: Estimate
    top1_interval: Interval | None


def check_comparable(comparisons: Sequence[Comparison]) -> None:
    """Check that comparisons can stand in one table.

    Raises:
        ConfigError: There is none, or they differ in original, text, dtype or engine.
    """
    if not comparisons:
        raise ConfigError("report: no comparisons. Expected at least one. Give one.")
    first = comparisons[0]
    for other in comparisons[1:]:
        for what in ("original", "text_fingerprint", "dtype", "engine"):
            got, expected = getattr(other, what), getattr(first, what)
            if got != expected:
                raise ConfigError(
                    f"report: {other.quantized.name} was compared with another {what.replace('_', ' ')} than "
                    f"{first.quantized.name}. Got {got}. Expected {expected}. Evaluate both in one run."
                )


def paired_differences(comparisons: Sequence[Comparison]) -> tuple[PairedDifference, ...]:
    """Compare every model with every other.

    Args:
        comparisons: At least one; all with the same original on the same text.

    Raises:
        ConfigError: They are not.
    """
    check_comparable(comparisons)
    return tuple(_difference(first, second) for first, second in combinations(comparisons, 2))


def kl_difference(first: Comparison, second: Comparison) -> Estimate:
    """Return what the second model's mean KL divergence has more than the first's, paired over the rows."""
    return _mean_difference(first.profile.row_means.kl_nats, second.profile.row_means.kl_nats)


def _difference(first: Comparison, second: Comparison) -> PairedDifference:
    rows = first.rows
    kl, nll, top1 = (
        _mean_difference(getattr(first.profile.row_means, name), getattr(second.profile.row_means, name))
        for name in ("kl_nats", "quantized_nll_nats", "top1_agreement")
    )
    nll_interval = confidence_interval(nll, rows)
    return PairedDifference(
        first=first.quantized.name,
        second=second.quantized.name,
        kl_nats=kl,
        kl_interval=confidence_interval(kl, rows),
        perplexity_ratio=nll.scaled(math.exp(nll.value), math.exp(nll.value)),
        perplexity_interval=nll_interval and Interval(_ratio(nll_interval.low), _ratio(nll_interval.high)),
        top1_agreement=top1,
        top1_interval=confidence_interval(top1, rows),
    )


def _ratio(nll_nats: float) -> float:
    return math.exp(min(nll_nats, _LARGEST_EXPONENT))


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    before, after = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    return mean_over_rows((after - before)[:, None])
