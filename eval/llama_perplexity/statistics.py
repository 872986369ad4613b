"""What llama-perplexity computes of each predicted token, in its precision: the KL divergence from a base, and more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .softmax import float32_exp, log_sum_exp

__all__ = ["TokenComparison", "compare_tokens", "token_nll"]

_LEAST_LOG_PROBABILITY = -16.0
"""Tokens that the base holds for less likely are left out of a KL divergence."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenComparison:
    """What is known of every predicted token, in the order of the text; all of shape (tokens,), on the CPU.

    Attributes:
        nll_nats: The model's negative log-likelihood of the true token, float32.
        base_nll_nats: The base's, float32.
        kl_nats: KL(base || model) of the predictions, float64.
        probability_change: Change of the true token's probability, model minus base, float32.
        same_top: Whether both hold the same token for most likely, bool.
    """

    nll_nats: Tensor
    base_nll_nats: Tensor
    kl_nats: Tensor
    probability_change: Tensor
    same_top: Tensor

    @classmethod
    def joined(cls, parts: Iterable[TokenComparison]) -> TokenComparison:
        """Put at least one part after another."""
        several = list(parts)
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in several]) for f in fields(cls)})


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each true token in nats, float32, shape (predictions,).

    Args:
        logits: float32, shape (predictions, vocabulary), on the CPU.
        targets: Ids of the true tokens, int64, shape (predictions,).
    """
    highest = logits.amax(dim=1, keepdim=True)
    return (highest + log_sum_exp(logits, highest) - logits.gather(1, targets[:, None]))[:, 0]


def compare_tokens(logits: Tensor, base: Tensor, targets: Tensor) -> TokenComparison:
    """Compare a model's predictions with those of a base.

    Args:
        logits: The model's, float32, shape (predictions, vocabulary), on the CPU.
        base: Log-probabilities of the base as its file gives them, float32, same shape.
        targets: Ids of the true tokens, int64, shape (predictions,).
    """
    highest = logits.amax(dim=1, keepdim=True)
    normalizer = highest + log_sum_exp(logits, highest)
    terms = torch.where(base > _LEAST_LOG_PROBABILITY, float32_exp(base) * (base - logits + normalizer), 0.0)
    nll, base_nll = token_nll(logits, targets), -base.gather(1, targets[:, None])[:, 0]
    return TokenComparison(
        nll_nats=nll,
        base_nll_nats=base_nll,
        kl_nats=terms.double().sum(dim=1),
        probability_change=float32_exp(-nll) - float32_exp(-base_nll),
        same_top=logits.argmax(dim=1) == base.argmax(dim=1),
    )
