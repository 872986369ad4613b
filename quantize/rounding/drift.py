"""Cancelling drift: where the weights of an input group should move before they are rounded.

Legend, per input group: X original inputs, Y quantized inputs (tokens, K); W weight (K, out); H = mean y y^T, weighted,
as every mean here, by what each token counts in the end loss (see ``measure.statistics``). With T the original's output
and S what Y makes of the unrounded weight, ``argmin ||Y V - T||^2 + ridge ||V - W||^2`` is
``V = W + (H + ridge)^-1 mean y^T (t - s)``. Inside the block, where t = x W and s = y W, that is ``V = W + shift W``
with ``shift = (H + ridge)^-1 mean y^T (x - y)``, one for all linears of the group. Source: the first step of Qronos
(Zhang et al., arXiv 2505.11695), with the residual stream's own drift included where a group's output joins it.

Where a norm stands between a linear's output o and the stream, what arrives is ``o g / rms(o)`` with the norm's weight
g. With the root mean square of the *original's* o in the place of rms(o) that is linear again: T - S is multiplied by
it, and the columns of V are what the norm's weight makes of the linear's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.model.structure import InputGroup
from ...linalg.hessian import FEW_CHANNELS, damped_solve
from ...linalg.sampling import subsample_tokens
from ...measure.statistics.inputs import WeightedGram, tokens_of_halves

__all__ = ["RIDGES", "TRIED_COLUMNS", "InputSums", "shifted"]

RIDGES = (0.2, 0.6, 2.0, 6.0)
"""Ridges of the drift correction to choose from, relative to the mean of H's diagonal. With a few thousand calibration
tokens 2 is best on held-out text, with tens of thousands 0.5; 0.02, which suits rounding, overfits either."""

_SLICE_OUTPUTS = 16384
"""Outputs that drift is cancelled for together: 256 MiB in float32 for 4096 inputs."""

_LEAST_GAIN = 1e-3
"""Outputs that a norm scales down to less than this, relative to the largest, are not moved to cancel drift."""

TRIED_COLUMNS = 128
"""Columns of the shift, evenly spread, that the ridge is chosen on."""

_TINY = 1e-30
"""Keeps sums that are zero from being divided by."""


class InputSums:
    """Sums over micro-batches of the quantized stream that one input group's rounding is computed from.

    Every second row goes to the second of two halves, so that what is fitted on one can be judged on the other.
    """

    def __init__(self, module: Any, group: InputGroup, device: torch.device, gains: Tensor | None = None) -> None:
        """Start from nothing.

        Args:
            module: The group's linear, unrounded; of several any one, as they share their input.
            group: The input group.
            device: Where the sums are kept.
            gains: What each output is multiplied by before it joins the residual stream, shape (out,); None for 1.
        """
        self._module = module
        self._joins = group.joins_stream
        self._gains = torch.ones(module.out_features, device=device) if gains is None else gains
        columns = module.out_features if self._joins else module.in_features
        self._halves = [_Half(module.in_features, columns, device) for _ in range(2)]

    def add(
        self,
        first_row: int,
        inputs: Tensor,
        target: Tensor,
        weights: Tensor,
        sizes: Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            first_row: Index of its first row among all calibration rows.
            inputs: y, the group's inputs in the quantized stream, shape (rows, tokens, K) or (rows * tokens, K).
            target: The original's input of the group or, where it joins the residual stream, the original's sum there
                less what the output is added to.
            weights: Weight of each token, shape (rows, tokens).
            sizes: What the original's output of each token is divided by before it joins the stream, shape (rows,
                tokens, 1); None for 1.
        """
        inputs = inputs.view(*weights.shape, -1)
        missing = target.to(inputs.device).view(*weights.shape, -1)
        if not self._joins:
            missing = missing - inputs
        if sizes is not None:
            missing = missing * sizes.to(inputs.device)
        if self._joins and self._module.bias is not None:
            missing = missing - self._module.bias * self._gains
        row_tokens = weights.shape[1]
        halves = tokens_of_halves(first_row * row_tokens, weights.numel(), row_tokens)
        for half, tokens in zip(self._halves, halves, strict=True):
            half.add(inputs.flatten(0, 1), missing.flatten(0, 1), weights.flatten(), tokens.to(inputs.device))

    def add_tokens(self, rows: Tensor, inputs: Tensor, target: Tensor, weights: Tensor) -> None:
        """Add single tokens of a group whose output stays inside the block.

        Args:
            rows: Index of each one's row among all calibration rows, int64, shape (tokens,).
            inputs: y, shape (tokens, K).
            target: The original's inputs, shape (tokens, K).
            weights: Shape (tokens,).
        """
        for parity, half in enumerate(self._halves):
            of_half = (rows % 2 == parity).nonzero()[:, 0].to(inputs.device)
            half.add(inputs, target - inputs, weights, of_half)

    def solved(self, *, correct_drift: bool) -> tuple[Tensor, Tensor | None]:
        """Return H, and the shift of the weight that cancels drift, (K, out) for a joining group, else (K, K).

        The ridge is the one whose fit on one half leaves least drift on the other; there is no shift where none of them
        leaves less than there was. Ends the summing.
        """
        weights = [half.gram.weight for half in self._halves]
        shares = [weight / max(sum(weights), _TINY) for weight in weights]
        grams = [half.gram.mean() for half in self._halves]
        missing = [half.missing.div_(max(half.gram.weight, _TINY)) for half in self._halves]
        self._halves.clear()
        # What the unrounded weight makes of y is not missing where that joins the stream: mean y^T (y W) = H W.
        made = self._module.weight.T * self._gains if self._joins else None
        ridge = self._best_ridge(grams, missing, made) if correct_drift and min(weights) > 0 else None
        gram, drift = (_weighted_sum_(parts, shares) for parts in (grams, missing))
        if ridge is None:
            return gram, None
        if made is not None:
            drift.addmm_(gram, made, alpha=-1)
        shift = damped_solve(gram, drift, ridge)
        return gram, shift if not self._joins else _undone(shift, self._gains)

    def _best_ridge(self, grams: Sequence[Tensor], missing: Sequence[Tensor], made: Tensor | None) -> float | None:
        # The one whose fit on the first half leaves least drift on the second; None if none leaves less than there was.
        step = -(-missing[0].shape[1] // TRIED_COLUMNS)
        missing = [part[:, ::step] for part in missing]
        if made is not None:
            columns = made[:, ::step].contiguous()
            missing = [torch.addmm(part, gram, columns, alpha=-1) for part, gram in zip(missing, grams, strict=True)]
        # Every second of many channels decides, at an eighth of the time: on SmolLM2's 1536, as all in 15 blocks of 17.
        every = 1 if len(grams[0]) <= FEW_CHANNELS else 2
        tried = [part[::every].contiguous() for part in missing]
        fit, other = (gram[::every, ::every].contiguous() for gram in grams)
        left = [_drift_left(damped_solve(fit, tried[0], ridge), other, tried[1]) for ridge in RIDGES]
        return RIDGES[left.index(min(left))] if min(left) < 0 else None


def shifted(weight: Tensor, shift: Tensor | None, *, joins: bool) -> Tensor:
    """Return V, the weight to round, float32, shape (K, out), contiguous, in memory of its own.

    Args:
        weight: W as the module has it, any floating dtype, shape (out, K). It gets no second copy in its own dtype.
        shift: As ``InputSums.solved`` returns it; None to leave W where it is.
        joins: Whether the output joins the residual stream: V = W + shift, else V = W + shift W.
    """
    moved = torch.empty(weight.T.shape, device=weight.device)
    for first in range(0, len(weight), _SLICE_OUTPUTS):
        columns = slice(first, first + _SLICE_OUTPUTS)
        plain = weight[columns].float().T
        if shift is not None:
            plain = plain + shift[:, columns] if joins else torch.addmm(plain, shift, plain)
        moved[:, columns] = plain
    return moved


class _Half:
    """Sums over half of the rows."""

    def __init__(self, width: int, columns: int, device: torch.device) -> None:
        self.gram = WeightedGram(width, device)
        self.missing = torch.zeros(width, columns, device=device)
        self._rng = torch.Generator().manual_seed(0)

    def add(self, inputs: Tensor, missing: Tensor, weights: Tensor, tokens: Tensor) -> None:
        # Those of the tokens that are drawn among the half's.
        drawn, weights = subsample_tokens(weights[tokens], self._rng)
        roots, drawn = weights.sqrt()[:, None], tokens[drawn]
        scaled = inputs[drawn].mul_(roots)
        self.gram.add_scaled(scaled, weights)
        self.missing.addmm_(scaled.T, missing[drawn].mul_(roots))


def _weighted_sum_(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    # In the memory of the first of two; the other goes.
    first, second = parts
    parts.clear()
    return first.mul_(weights[0]).add_(second, alpha=weights[1])


def _undone(shift: Tensor, gains: Tensor) -> Tensor:
    # The shift of the linear's own outputs; those that hardly arrive anywhere stay.
    arrives = gains.abs() > _LEAST_GAIN * gains.abs().max()
    return torch.where(arrives, shift / torch.where(arrives, gains, 1), 0)


def _drift_left(shift: Tensor, gram: Tensor, missing: Tensor) -> float:
    # Mean of |y V - m|^2 - |m|^2 over tokens of which only mean y y^T and mean y^T m are known; negative if V helps.
    return float(((gram @ shift - 2 * missing) * shift).sum())
