"""llama-perplexity's table: its averages, their errors and percentiles, line by line as it prints them.

Errors take tokens as independent, as llama-perplexity does; those of bpwise's own reports are by row, and larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .statistics import TokenComparison

__all__ = ["final_line", "table_lines"]

_Floats = npt.NDArray[np.float32]
_LEAST_TOKENS = 10
"""Tokens for which llama-perplexity tells an error."""

_HIGH = (("99.9%", 0.999), ("99.0%", 0.99), ("95.0%", 0.95), ("90.0%", 0.9))
_LOW = (("10.0%", 0.1), (" 5.0%", 0.05), (" 1.0%", 0.01), (" 0.1%", 0.001))
_MEDIAN = ("Median", 0.5)
_KL_SHARES = (*_HIGH, _MEDIAN, *_LOW)
_CHANGE_SHARES = (*_HIGH, ("75.0%", 0.75), _MEDIAN, ("25.0%", 0.25), *_LOW)


@dataclass(frozen=True, slots=True)
class _Mean:
    value: np.float64
    error: np.float64


def final_line(nll_nats: Tensor) -> str:
    """Return the line that llama-perplexity ends with where it compares nothing.

    Args:
        nll_nats: Negative log-likelihood of each token, float32.
    """
    values = nll_nats.double().numpy()
    mean = _mean(values, values**2)
    perplexity = np.exp(mean.value)
    return f"Final estimate: PPL = {perplexity:.4f} +/- {perplexity * mean.error:.5f}"


def table_lines(tokens: TokenComparison) -> list[str]:
    """Return llama-perplexity's statistics of a comparison."""
    with np.errstate(divide="ignore", invalid="ignore"):  # of two equal models some numbers are 0 / 0: it prints nan
        return [*_perplexity_lines(tokens), "", *_kl_lines(tokens), "", *_change_lines(tokens)]


def _perplexity_lines(tokens: TokenComparison) -> list[str]:
    model, base = tokens.nll_nats.numpy(), tokens.base_nll_nats.numpy()
    ours, theirs = _mean(model, model * model), _mean(base, base * base)
    covariance = _covariance(model, base)
    ratio = ours.value - theirs.value
    ratio_error = np.sqrt(ours.error**2 + theirs.error**2 - 2 * covariance)
    perplexity, base_perplexity = np.exp(ours.value), np.exp(theirs.value)
    error, base_error = perplexity * ours.error, base_perplexity * theirs.error
    difference_error = np.sqrt(error**2 + base_error**2 - 2 * perplexity * base_perplexity * covariance)
    correlation = 100 * covariance / (ours.error * theirs.error)
    return [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {perplexity:10.6f} ± {error:10.6f}",
        f"Mean PPL(base)                : {base_perplexity:10.6f} ± {base_error:10.6f}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {correlation:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {ratio:10.6f} ± {ratio_error:10.6f}",
        f"Mean PPL(Q)/PPL(base)         : {np.exp(ratio):10.6f} ± {np.exp(ratio) * ratio_error:10.6f}",
        f"Mean PPL(Q)-PPL(base)         : {perplexity - base_perplexity:10.6f} ± {difference_error:10.6f}",
    ]


def _kl_lines(tokens: TokenComparison) -> list[str]:
    values = tokens.kl_nats.numpy()
    mean = _mean(values, values * values)
    shown = _percentiles(values.astype(np.float32), _KL_SHARES)
    return [
        "====== KL divergence statistics ======",
        f"Mean    KLD: {mean.value:10.6f} ± {mean.error:10.6f}",
        *(f"{name:7} KLD: {value:10.6f}" for name, value in shown),
    ]


def _change_lines(tokens: TokenComparison) -> list[str]:
    values = tokens.probability_change.numpy()
    squares = (values * values).astype(np.float64)
    mean, mean_square = _mean(values, squares), _mean(squares, squares**2)
    rms = np.sqrt(mean_square.value)
    same = tokens.same_top.double().numpy().mean()
    same_error = np.sqrt(same * (1 - same) / (len(values) - 1))
    return [
        "====== Token probability statistics ======",
        f"Mean    Δp: {100 * mean.value:6.3f} ± {100 * mean.error:5.3f} %",
        *(f"{name:7} Δp: {100 * value:6.3f}%" for name, value in _percentiles(values, _CHANGE_SHARES)),
        f"RMS Δp    : {100 * rms:6.3f} ± {100 * (0.5 / rms * mean_square.error):5.3f} %",
        f"Same top p: {100 * same:6.3f} ± {100 * same_error:5.3f} %",
    ]


def _mean(values: npt.NDArray[np.floating], squares: npt.NDArray[np.floating]) -> _Mean:
    count = len(values)
    mean = values.sum(dtype=np.float64) / count
    variance = squares.sum(dtype=np.float64) / count - mean * mean
    error = np.sqrt(variance / (count - 1)) if variance > 0 and count > _LEAST_TOKENS else np.float64(0)
    return _Mean(mean, error)


def _covariance(first: _Floats, second: _Floats) -> np.float64:
    count = len(first)
    if count < _LEAST_TOKENS:
        return np.float64(0)
    means = first.sum(dtype=np.float64) / count * (second.sum(dtype=np.float64) / count)
    covariance: np.float64 = ((first * second).sum(dtype=np.float64) / count - means) / (count - 1)
    return covariance


def _percentiles(values: _Floats, shares: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    ordered = np.sort(values)
    found = [(name, float(_percentile(ordered, share))) for name, share in shares]
    return [("Maximum", float(ordered[-1])), *found, ("Minimum", float(ordered[0]))]


def _percentile(ordered: _Floats, share: float) -> np.float32:
    # All in float32, the place too; the median is the mean of the two in the middle.
    if share == 0.5:
        return np.float32(0.5 * (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]))
    place = np.float32(share) * np.float32(len(ordered) - 1)
    below = int(place)
    rest = place - np.float32(below)
    above = ordered[min(below + 1, len(ordered) - 1)]
    return np.float32((1 - rest) * ordered[below] + rest * above)
