"""Random probes of the logits: directions whose covariance is the logits' Fisher matrix.

Notes:
    With p the predicted probabilities and z random signs, ``v = sqrt(p) z - p (sqrt(p) . z)`` has mean 0 and covariance
    ``diag(p) - p p^T``, the Fisher matrix of the logits a. For a small change da,
    ``KL ~ 0.5 da^T (diag(p) - p p^T) da``, so ``0.5 E (v . da)^2`` is the divergence in nats. Source: random signs,
    Hutchinson (1990); the Fisher matrix of a softmax and its root, Martens (arXiv 1412.1193).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["probe_logits", "slopes_of_logits"]

_CACHED_TOKENS = 16
"""Positions whose probabilities are worked on together, so that they stay in a processor's cache."""


def slopes_of_logits(logits: Tensor, output: Tensor) -> Tensor | None:
    """Return how much each logit moves with the head's output, where a model scales or caps it; None where not.

    Args:
        logits: Of the model, float32, shape (1, tokens, vocabulary), with gradient.
        output: Of the head, same shape; the same tensor where nothing comes after it.

    Returns:
        float32, shape (tokens, vocabulary).
    """
    if output is logits:
        return None
    (slopes,) = torch.autograd.grad(logits.sum(), output, retain_graph=True)
    return slopes.flatten(0, -2)


def probe_logits(
    logits: Tensor, rng: np.random.Generator, slopes: Tensor | None, out: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Draw a random direction with the Fisher matrix ``F = diag(p) - p p^T`` of each token's logits as its covariance.

    It is ``F p^-1/2 z`` with random signs z. ``p - t`` of a sampled target t has the same covariance, but where the
    model is nearly sure of a token all of its size hangs on the rare draw of another one.

    Args:
        logits: float32, shape (tokens, vocabulary).
        rng: Draws the signs, on the CPU for every device, so that all measure the same.
        slopes: As ``slopes_of_logits`` returns them.
        out: Memory for the directions, shape (at least tokens, vocabulary).

    Returns:
        The directions, in the first rows of ``out``; and the sums over tokens, shape (vocabulary,), and over the
        vocabulary, shape (tokens,), of the mean squares ``p (1 - p)`` at the head's output.
    """
    probe = out[: len(logits)]
    outputs = torch.zeros(logits.shape[1], device=logits.device)
    weights = []
    for first, probabilities in zip(range(0, len(probe), _CACHED_TOKENS), probe.split(_CACHED_TOKENS), strict=True):
        torch.softmax(logits[first : first + _CACHED_TOKENS], dim=-1, out=probabilities)
        squares = torch.addcmul(probabilities, probabilities, probabilities, value=-1)
        if slopes is not None:
            squares *= slopes[first : first + _CACHED_TOKENS].square()
        outputs += squares.sum(dim=0)
        weights.append(squares.sum(dim=1))
        signed = probabilities.sqrt().copysign_(_signs(probabilities.shape, rng).to(logits.device))
        probabilities.mul_(-signed.sum(dim=1, keepdim=True)).add_(signed)
    return probe, (outputs, torch.cat(weights))


def _signs(shape: torch.Size, rng: np.random.Generator) -> Tensor:
    # Numbers of random sign, int8.
    return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))
