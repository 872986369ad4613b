"""Numbers as people read them: with as many digits as their errors allow."""

from __future__ import annotations

import math

from .estimate import Estimate

__all__ = ["estimate", "nats", "percent", "perplexity"]

_SMALL_NATS = 1e-4
"""Below it a divergence is written with an exponent."""


def perplexity(value: Estimate, sign: str = "") -> str:
    """Return a perplexity, or a difference of two.

    Args:
        value: The number.
        sign: ``+`` to show the sign of positive numbers too.
    """
    # Never fewer than 3 decimals: the standard error comes mostly from the choice of the text, which both models share.
    return estimate(value, 3, sign)


def percent(value: Estimate, sign: str = "") -> str:
    """Return a share of 0 to 1 in percent."""
    return f"{estimate(value.scaled(100 * value.value, 100), 2, sign)} %"


def nats(number: Estimate | float) -> str:
    """Return a divergence: three significant digits, with its error if it has one."""
    value, error = (number.value, number.standard_error) if isinstance(number, Estimate) else (number, None)
    if abs(value) >= _SMALL_NATS and error is not None:
        # Three significant digits of the value, or two of the error where that is more.
        return estimate(Estimate(value, error), max(0, 2 - math.floor(math.log10(abs(value)))))
    shown = f"{value:.3g}"
    return shown if error is None else f"{shown} ± {error:.1g}"


def estimate(number: Estimate, decimals: int, sign: str = "") -> str:
    """Return a number and its standard error.

    Args:
        number: Both.
        decimals: Fewest decimals; up to three more are shown for two digits of the error.
        sign: ``+`` to show the sign of positive numbers too.
    """
    value, error = number.value, number.standard_error
    if error is None:
        return f"{value:{sign}.{decimals}f}"
    if error > 0:
        decimals = max(decimals, min(decimals + 3, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"
