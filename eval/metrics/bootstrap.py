"""Confidence intervals by the bootstrap: documents are drawn again, with all of their tokens; pure tensor maths.

The tokens of a document are alike, so documents, not tokens, are taken as independent, whatever their lengths. Source:
Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, the percentile interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimate import CONFIDENCE, Interval

__all__ = ["RESAMPLES", "Bootstrapped", "bootstrapped_mean", "bootstrapped_quantile"]

RESAMPLES = 2000
"""Draws of as many documents as there are: from seed to seed the ends move by some hundredths of the interval."""

_SEED = 0
"""Of the draws, so that the same numbers give the same interval."""


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """A number and where it probably lies.

    Attributes:
        value: The number.
        interval: Holds the true value with 95 % probability; None where a single document leaves it unknown.
    """

    value: float
    interval: Interval | None


def bootstrapped_mean(values: Tensor, lengths: Sequence[int]) -> Bootstrapped:
    """Return the mean over all tokens, with its interval.

    Args:
        values: One number a token, document after document, shape (tokens,), any real dtype.
        lengths: Tokens of each document, each at least 1.
    """
    sums = torch.stack([part.sum() for part in values.double().split(list(lengths))])
    sizes = torch.tensor(lengths, dtype=torch.float64)
    interval = _interval(len(sums), lambda times: (times @ sums) / (times @ sizes))
    return Bootstrapped(float(values.double().mean()), interval)


def bootstrapped_quantile(values: Tensor, lengths: Sequence[int], share: float) -> Bootstrapped:
    """Return the number that a share of all tokens lies below, with its interval.

    Between two tokens it lies in proportion, as NumPy's does by default.

    Args:
        values: As for ``bootstrapped_mean``.
        lengths: As for ``bootstrapped_mean``.
        share: 0 to 1.
    """
    ordered, order = values.double().sort()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[order]

    def of_draws(times: Tensor) -> Tensor:
        return torch.tensor([_quantile(ordered.repeat_interleave(each[documents]), share) for each in times.long()])

    return Bootstrapped(_quantile(ordered, share), _interval(len(lengths), of_draws))


def _quantile(ordered: Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    first, second = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
    return first + (second - first) * (place - low)


def _interval(documents: int, statistic: Callable[[Tensor], Tensor]) -> Interval | None:
    # The statistic takes how often each document is drawn: float64, shape (draws, documents).
    if documents < 2:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(documents, (RESAMPLES, documents), generator=generator)
    times = torch.zeros(RESAMPLES, documents, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    found = statistic(times).double().sort().values
    outside = (1 - CONFIDENCE) / 2
    return Interval(_quantile(found, outside), _quantile(found, 1 - outside))
