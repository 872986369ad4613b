"""Rounding the output head, the last of all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.model.structure import InputGroup
from ...convert.rounding import RoundedModel
from ...linalg.hessian import Hessian
from ...linalg.parallel import run_all
from ...measure.model.stream import StreamedModel
from .drift import InputSums, shifted
from .linears import LinearRounder
from .pausable import run_until

__all__ = ["round_head"]


def round_head(model: StreamedModel, linears: LinearRounder, store: ResumeStore, batches: Sequence[slice]) -> None:
    """Round the output head on what the quantized decoder gives it, and keep it.

    Args:
        model: The original.
        linears: Rounds it.
        store: Holds what leaves the last block.
        batches: The micro-batches.
    """
    with torch.no_grad(), model.tail() as head:
        sums = _sum_inputs(model, head, linears.token_weights(model.source.head_name), store, batches)
        gram, shift = sums.solved(correct_drift=linears.correct_drift)
        target = shifted(head.weight, shift, joins=False)
    # Its own weight has been let go.
    run_all([partial(linears.round_linear, model.source.head_name, target, Hessian(gram))], model.device)


def _sum_inputs(
    model: StreamedModel, head: Any, weights: Tensor, store: ResumeStore, batches: Sequence[slice]
) -> InputSums:
    states = RoundedModel((), model.block_count, store).last_states(model.offload_dir)
    sums = InputSums(head, InputGroup((model.source.head_name,)), model.device)
    for batch in batches:
        target, inputs = (_head_input(model, head, states[key][batch]) for key in ("original", "quantized"))
        sums.add(batch.start, inputs, target, weights[batch])
    return sums


def _head_input(model: StreamedModel, head: Any, hidden: Tensor) -> Tensor:
    return run_until(head, partial(model.logits, hidden.to(model.device)))
