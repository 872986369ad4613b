"""Softmax as llama-perplexity computes it: terms in float32, their sum in float64, its logarithm in float32."""

from __future__ import annotations

from torch import Tensor

__all__ = ["float32_exp", "log_sum_exp"]


def float32_exp(values: Tensor) -> Tensor:
    """Return the exponential rounded once, as C's ``expf`` is in all but a few cases in a thousand; torch's is not.

    Args:
        values: float32, on the CPU, any shape.
    """
    return values.double().exp().float()


def log_sum_exp(logits: Tensor, highest: Tensor) -> Tensor:
    """Return ``log(sum(exp(logits - highest)))``, float32, shape (predictions, 1).

    Args:
        logits: float32, shape (predictions, vocabulary), on the CPU.
        highest: The maximum of each row, shape (predictions, 1).
    """
    return float32_exp(logits - highest).double().sum(dim=1, keepdim=True).log().float()
