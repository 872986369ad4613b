"""How far two models' predictions are apart, token by token: pure tensor maths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ...errors import NumericalError, ShapeError
from .estimate import Estimate, mean_over_rows

__all__ = ["PIECE_ELEMENTS", "TOP_COUNT", "Summary", "TokenStatistics", "token_statistics"]

PIECE_ELEMENTS = 1 << 21
"""Logits of a model that are worked on at once. Temporaries of 8 MiB stay with the allocator; from 16 MiB on they come
from the system each time, in pages that it has to clear: that took twice as long as all else."""

TOP_COUNT = 5
"""Most likely tokens that are kept of each prediction."""

_MAX_NLL_NATS = 300.0
"""Above it the square of the perplexity does not fit a float64; a model that guesses at random is at about 12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the statistics of all tokens come to. Standard errors are clustered by row.

    Attributes:
        original_perplexity: exp of the original's mean negative log-likelihood, dimensionless.
        quantized_perplexity: The same of the quantized model.
        perplexity_ratio: Quantized over original, paired on the same tokens, dimensionless.
        perplexity_difference: Quantized minus original, paired on the same tokens, dimensionless.
        kl_nats: Mean of KL(original || quantized) per token.
        kl_median_nats: Median over tokens.
        kl_p90_nats: 90th percentile over tokens.
        kl_p99_nats: 99th percentile over tokens.
        kl_p999_nats: 99.9th percentile over tokens.
        kl_max_nats: The worst token.
        top1_agreement: Share of tokens for which both models hold the same next token for most likely, 0 to 1.
        top5_agreement: Of the five tokens that the original holds for most likely the share that is also among the
            quantized model's five, in whatever order, averaged over tokens, 0 to 1. With one token in the place of five
            this is ``top1_agreement``.
        probability_change: Mean change of the true token's probability, quantized minus original, -1 to 1; what
            llama.cpp calls the mean of delta p.
        probability_change_rms: Root of the mean square of that change, which does not average out; 0 to 1.
    """

    original_perplexity: Estimate
    quantized_perplexity: Estimate
    perplexity_ratio: Estimate
    perplexity_difference: Estimate
    kl_nats: Estimate
    kl_median_nats: float
    kl_p90_nats: float
    kl_p99_nats: float
    kl_p999_nats: float
    kl_max_nats: float
    top1_agreement: Estimate
    top5_agreement: Estimate
    probability_change: Estimate
    probability_change_rms: Estimate


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenStatistics:
    """Statistics of every predicted token, in the order of the text.

    Tensors have shape (tokens,); those named ``top`` have shape (tokens, 5), or as many columns as the vocabulary has
    tokens if these are fewer, most likely first.

    Attributes:
        kl_nats: KL(original || quantized) of the predictions, float32.
        original_nll_nats: The original's negative log-likelihood of the true token, float32.
        quantized_nll_nats: The same of the quantized model.
        original_top: Ids of the tokens that the original holds for most likely, int32.
        original_top_probabilities: Their probabilities, float32.
        quantized_top: The same of the quantized model.
        quantized_top_probabilities: Their probabilities, as the quantized model has them, float32.
    """

    kl_nats: Tensor
    original_nll_nats: Tensor
    quantized_nll_nats: Tensor
    original_top: Tensor
    original_top_probabilities: Tensor
    quantized_top: Tensor
    quantized_top_probabilities: Tensor

    @property
    def same_top1(self) -> Tensor:
        """Whether both hold the same token for most likely, bool, shape (tokens,)."""
        return self.original_top[:, 0] == self.quantized_top[:, 0]

    @property
    def shared_top5(self) -> Tensor:
        """Share of the original's five most likely tokens among the quantized model's, float64, shape (tokens,)."""
        shared = (self.original_top[:, :, None] == self.quantized_top[:, None, :]).any(dim=2)
        return shared.double().mean(dim=1)

    @property
    def probability_change(self) -> Tensor:
        """Change of the true token's probability, quantized minus original, float64, shape (tokens,)."""
        return (-self.quantized_nll_nats.double()).exp() - (-self.original_nll_nats.double()).exp()

    @classmethod
    def joined(cls, parts: Iterable[TokenStatistics], tokens: int) -> TokenStatistics:
        """Put parts one after another, on the CPU, as they are made.

        Their place is taken at once: small tensors that stay, made between large ones that go, would keep the allocator
        from using the large ones' memory again.

        Args:
            parts: At least one.
            tokens: How many tokens they have together.
        """
        whole: dict[str, Tensor] = {}
        first = 0
        for part in parts:
            count = len(part.kl_nats)
            for field in fields(cls):
                values = getattr(part, field.name)
                if field.name not in whole:
                    whole[field.name] = torch.empty(tokens, *values.shape[1:], dtype=values.dtype)
                whole[field.name][first : first + count] = values
            first += count
        assert first == tokens
        return cls(**whole)

    def summary(self, rows: int) -> Summary:
        """Average over all tokens, in float64.

        Args:
            rows: Number of rows that the tokens are of, one after another and of equal length.

        Raises:
            ShapeError: The tokens do not divide into that many rows.
            NumericalError: A perplexity is too large for a number.
        """
        tokens = len(self.kl_nats)
        if tokens == 0 or tokens % rows:
            raise ShapeError("summary", "token statistics", got=(tokens,), expected=(rows, -1))
        original = self.original_nll_nats.double().view(rows, -1)
        quantized = self.quantized_nll_nats.double().view(rows, -1)
        original_perplexity = _perplexity(original, "original")
        quantized_perplexity = _perplexity(quantized, "quantized")
        ratio = mean_over_rows(quantized - original)
        # The difference's gradient in the two mean log-likelihoods is (perplexity, -perplexity).
        linearised = mean_over_rows(quantized * quantized_perplexity.value - original * original_perplexity.value)
        change = self.probability_change.view(rows, -1)
        mean_square = mean_over_rows(change.square())
        rms = math.sqrt(mean_square.value)
        median, p90, p99, p999 = np.quantile(self.kl_nats.double().cpu().numpy(), (0.5, 0.9, 0.99, 0.999))
        return Summary(
            original_perplexity=original_perplexity,
            quantized_perplexity=quantized_perplexity,
            perplexity_ratio=ratio.scaled(math.exp(ratio.value), math.exp(ratio.value)),
            perplexity_difference=linearised.scaled(quantized_perplexity.value - original_perplexity.value, 1.0),
            kl_nats=mean_over_rows(self.kl_nats.view(rows, -1)),
            kl_median_nats=float(median),
            kl_p90_nats=float(p90),
            kl_p99_nats=float(p99),
            kl_p999_nats=float(p999),
            kl_max_nats=float(self.kl_nats.max()),
            top1_agreement=mean_over_rows(self.same_top1.view(rows, -1)),
            top5_agreement=mean_over_rows(self.shared_top5.view(rows, -1)),
            probability_change=mean_over_rows(change),
            # At 0 the root has no slope, but no spread either: all changes are 0.
            probability_change_rms=mean_square.scaled(rms, 0.5 / rms if rms > 0 else 0.0),
        )


def token_statistics(original: Tensor, quantized: Tensor, targets: Tensor) -> TokenStatistics:
    """Compare the predictions of two models for the same tokens.

    Everything is computed in float32 from the logits as they are. The divergence is summed as
    ``q - p - p log(q / p)`` over the vocabulary: equal to ``sum p log(p / q)``, because p and q both sum to one, but
    no term is negative, so rounding the logits by e changes it by e^2, not by e. Nothing is clamped; rounding can
    leave a single term, and so a divergence of nearly zero, a little below zero.

    Args:
        original: The original's logits, shape (tokens, vocabulary), floating point, on any device.
        quantized: The quantized model's, same shape and device.
        targets: Ids of the true next tokens, int64, shape (tokens,), same device.

    Returns:
        Statistics on the same device. Where logits are NaN or infinite, so are they.

    Raises:
        ShapeError: The shapes disagree.
    """
    if original.ndim != 2 or quantized.shape != original.shape:
        raise ShapeError(
            "token statistics", "quantized logits", got=tuple(quantized.shape), expected=tuple(original.shape)
        )
    if targets.shape != original.shape[:1]:
        raise ShapeError("token statistics", "targets", got=tuple(targets.shape), expected=(len(original),))
    parts = []
    positions = max(1, PIECE_ELEMENTS // original.shape[1])
    for first in range(0, len(original), positions):
        piece = slice(first, first + positions)
        parts.append(_statistics(original[piece], quantized[piece], targets[piece]))
    return TokenStatistics(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenStatistics)}
    )


def _statistics(original: Tensor, quantized: Tensor, targets: Tensor) -> TokenStatistics:
    log_p = original.float().log_softmax(dim=-1)
    log_q = quantized.float().log_softmax(dim=-1)
    columns = targets[:, None]
    count = min(TOP_COUNT, log_p.shape[1])
    original_top, quantized_top = original.topk(count, dim=-1).indices, quantized.topk(count, dim=-1).indices
    return TokenStatistics(
        kl_nats=_kl_nats(log_p, log_q),
        original_nll_nats=-log_p.gather(1, columns)[:, 0],
        quantized_nll_nats=-log_q.gather(1, columns)[:, 0],
        original_top=original_top.int(),
        original_top_probabilities=log_p.gather(1, original_top).exp(),
        quantized_top=quantized_top.int(),
        quantized_top_probabilities=log_q.gather(1, quantized_top).exp(),
    )


def _kl_nats(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, change = log_p.exp(), log_q - log_p
    # q - p is p * expm1(change), which keeps the digits that q - p loses where the two are close; but where p
    # vanishes beside q that is 0 * inf.
    terms = torch.where(change < 1, p * (change.expm1() - change), log_q.exp() - p - p * change)
    return terms.sum(dim=-1)


def _perplexity(nll_nats: Tensor, role: str) -> Estimate:
    mean = mean_over_rows(nll_nats)
    if not mean.value < _MAX_NLL_NATS:
        raise NumericalError(
            f"{role} model: mean negative log-likelihood {mean.value:.3g} nats per token. Expected less than "
            f"{_MAX_NLL_NATS:.0f}: it predicts worse than at random. Its weights are broken."
        )
    return mean.scaled(math.exp(mean.value), math.exp(mean.value))
