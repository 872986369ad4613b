"""What the output head sees of the calibration text, and the gradient that its probes send back to the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model.batches import TAIL_TOKENS, check_finite
from .model.stream import StreamedModel
from .statistics.inputs import InputStatistics, tapped_inputs, tapped_outputs
from .statistics.probes import probe_logits, slopes_of_logits

__all__ = ["probed_head"]


def probed_head(
    model: StreamedModel, head: Any, tokens: Tensor, hidden: Tensor, *, seed: int
) -> tuple[InputStatistics, Tensor]:
    """Probe the logits of all tokens.

    Args:
        model: The model; its tail is held.
        head: What the tail yields.
        tokens: The calibration rows, shape (rows, tokens).
        hidden: What leaves the last block, shape (rows, tokens, hidden size), on the CPU.
        seed: Seed of the random signs that probe the Fisher information.

    Returns:
        Statistics of the head, and the gradient of the probes at the last block's output, shaped as ``hidden``.

    Raises:
        NumericalError: NaN or infinity in the gradient.
    """
    rng = np.random.default_rng(seed)
    gradient = model.new_state(tokens, hidden.shape[-1])
    flat, into = hidden.flatten(0, 1), gradient.view(-1, hidden.shape[-1])
    sums = InputStatistics(head.in_features, tokens.shape[1], model.device)
    errors = torch.empty(TAIL_TOKENS, head.out_features, device=model.device)
    with tapped_inputs(head, [""]) as taps, tapped_outputs(head, [""]) as raw:
        for first in range(0, len(flat), TAIL_TOKENS):
            part = flat[None, first : first + TAIL_TOKENS].to(model.device).requires_grad_()
            logits = model.logits(part)
            sums.see_inputs(taps[""])
            error, squares = probe_logits(logits.detach()[0], rng, slopes_of_logits(logits, raw[""]), errors)
            sums.see_sums(model.source.head_name, *squares)
            sums.end_batch()
            logits.backward(error[None])
            assert part.grad is not None
            into[first : first + TAIL_TOKENS] = part.grad[0].cpu()
    check_finite(gradient, "output head", "gradients")
    return sums, gradient
