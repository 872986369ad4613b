"""Tuning: once every linear is rounded, factors of its scales are fitted to what the original predicts.

Rounding has every block follow the original's, one after another. What it cannot make good adds up through the model,
and no block sees what comes of it at the end. Where a factor holds for many weights, there are few of them, so that
they can be learned from the calibration rows without learning these by heart: one step of Adam for every 1024 tokens,
down the KL divergence from the original's predictions. Codes stay as they are, and so does the size.
Source: the end-to-end phase of EfficientQAT (Chen et al., arXiv 2407.11062), which learns nothing but the step sizes of
a quantized model; as a distillation, without its labels.

Notes:
    Group g of a linear's inputs gets the factor ``exp(t_g)``, group h of its outputs ``exp(u_h)``, so
    ``y_n = exp(u_h(n)) sum_k x_k exp(t_g(k)) W_nk``. The loss is the mean over positions of ``KL(p || q)``, p the
    original's predictions and q the tuned model's, nats per token. Its gradient is
    ``dL/dt_g = sum over tokens, k in g of x_k exp(t_g) dL/d(x_k exp(t_g))`` and ``dL/du_h = sum over tokens, n in h of
    y_n dL/dy_n``: what hooks on the linear's scaled input and output see. Adam's rate at step i of n is
    ``0.009 sqrt(KL of step 0) min(1, (i + 1) / 5) (1 + cos(pi i / n)) / 2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.language import LanguageModel, WeightOverlay
from ...linalg.products import float32_products
from ...measure.layers.positionwise import chunked_positionwise
from ...measure.model.batches import TAIL_TOKENS, check_finite
from ...measure.model.stream import StreamedModel
from ...progress import Progress
from ..rounding import Refinement, RoundedModel
from .scales import Factors, Groups, GroupScales

__all__ = ["STEP_TOKENS", "fit_factors", "fitted_factors", "tune_scales"]

_RATE = 0.009
"""Adam's largest step for the logarithm of a scale, at a divergence of 1 nat/token. It goes with the root of the
divergence, as rounding errors do. On SmolLM2-135M at 2.5 bits a third of it gains nearly as much."""

_WARM_STEPS = 5
"""Steps until it is reached, so that Adam knows the gradients' size by then; after that it falls as a cosine."""

_DECAYS = (0.9, 0.95)
"""Adam's, the second for tens of steps instead of its usual thousands."""

STEP_TOKENS = 1024
"""Tokens of a step, at least one row: short steps, so that there are many."""

_STATE = "tuning"
"""Piece with what the finished steps have come to."""

_TUNED, _OUTPUTS = "tuned", ", outputs"
"""Artifact with what tuning found, and what the names of outputs' factors end in."""


def fit_factors(
    rounded: RoundedModel,
    source: LanguageModel,
    weights: Mapping[str, Callable[[], Tensor]],
    groups: Mapping[str, Groups],
    refinement: Refinement,
) -> None:
    """Fit factors of a rounded model's linears to what the original predicts, once; ``fitted_factors`` reads them.

    Args:
        rounded: What rounding made; what is found is kept beside it.
        source: The original.
        weights: As ``WeightOverlay`` takes them: what readers make of everything that was rounded.
        groups: Of each linear that gets factors, by full name.
        refinement: Gives calibration rows, the device of both models and a place for their states.

    Raises:
        NumericalError: NaN or infinity in activations or gradients.
    """
    if rounded.store.has(_TUNED):
        return
    device, offload_dir = refinement.device, refinement.offload_dir
    original, quantized = (
        StreamedModel(each, device=device, dtype=torch.float32, offload_dir=offload_dir)
        for each in (source, WeightOverlay(source.base, weights))
    )
    tokens = torch.from_numpy(refinement.measurement.tokens).long()
    targets = rounded.last_states(offload_dir)["original"]
    with float32_products(device):
        found = tune_scales(original, quantized, groups, tokens, targets, rounded.store, refinement.progress)
    outputs = {f"{name}{_OUTPUTS}": each.outputs for name, each in found.items() if each.outputs is not None}
    rounded.store.save(_TUNED, {**{name: each.inputs for name, each in found.items()}, **outputs})


def fitted_factors(rounded: RoundedModel) -> dict[str, Factors]:
    """Return what ``fit_factors`` found, by linear."""
    found = rounded.store.load(_TUNED)
    names = [name for name in found if not name.endswith(_OUTPUTS)]
    return {name: Factors(found[name], found.get(f"{name}{_OUTPUTS}")) for name in names}


def tune_scales(
    original: StreamedModel,
    quantized: StreamedModel,
    groups: Mapping[str, Groups],
    tokens: Tensor,
    wanted: Tensor,
    artifacts: ResumeStore,
    progress: Progress,
) -> dict[str, Factors]:
    """Fit a factor for every group to the original's predictions, in one pass over the calibration rows.

    Args:
        original: The original; of it only what follows the blocks is run.
        quantized: The quantized model, on the same device.
        groups: As ``GroupScales`` takes them.
        tokens: Calibration rows, int64, shape (rows, tokens).
        wanted: What the original's last block makes of them, shape (rows, tokens, hidden size), on the CPU.
        artifacts: Where finished steps are kept.
        progress: Wraps the steps.

    Returns:
        The factors of each linear's groups.

    Raises:
        NumericalError: NaN or infinity in activations or gradients.
    """
    scales = GroupScales(groups, quantized.device)
    optimizer = torch.optim.Adam([scales.logs], betas=_DECAYS)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    batches = order.split(max(1, STEP_TOKENS // tokens.shape[1]))
    finished, size = _resume(artifacts, scales.logs, optimizer)
    with original.tail(), quantized.tail():
        for step in progress(range(len(batches)), "quantize: tune"):
            if step < finished:
                continue
            rows = batches[step]
            optimizer.zero_grad(set_to_none=False)
            divergence = _add_gradient(original, quantized, scales, tokens[rows], wanted[rows])
            check_finite(scales.gradient, "gradient of the scales")
            if step == 0:
                size = math.sqrt(max(divergence, 0.0))
            optimizer.param_groups[0]["lr"] = _RATE * size * _share(step, len(batches))
            optimizer.step()
            _keep(artifacts, scales.logs, optimizer, size)
    return scales.factors()


def _share(step: int, steps: int) -> float:
    # Of the largest learning rate.
    return min(1.0, (step + 1) / _WARM_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def _resume(artifacts: ResumeStore, logs: Tensor, optimizer: torch.optim.Adam) -> tuple[int, float]:
    # Finished steps, and the root of the first step's divergence.
    if not artifacts.has(_STATE):
        return 0, 0.0
    state = artifacts.load(_STATE)
    logs.data.copy_(state.pop("logs"))
    size = float(state.pop("size"))
    optimizer.state[logs] = state
    return int(state["step"]), size


def _keep(artifacts: ResumeStore, logs: Tensor, optimizer: torch.optim.Adam, size: float) -> None:
    tensors = {"logs": logs.detach(), "size": torch.tensor(size, dtype=torch.float64)}
    artifacts.save(_STATE, {**tensors, **optimizer.state[logs]})


def _add_gradient(
    original: StreamedModel, quantized: StreamedModel, scales: GroupScales, tokens: Tensor, wanted: Tensor
) -> float:
    # Of one step. Returns its mean divergence, nats per token.
    hidden = quantized.embed(tokens)
    inputs = []
    for index in range(quantized.block_count):
        inputs.append(hidden)
        with torch.no_grad(), _running(quantized, scales, index):
            output = quantized.run_block(index, hidden.to(quantized.device))
        hidden = quantized.new_state(tokens).copy_(output)
        check_finite(hidden, f"{quantized.block_name(index)}, quantized")
    divergence, gradient = _divergence(original, quantized, wanted.flatten(0, 1), hidden.flatten(0, 1))
    check_finite(gradient, "output head, gradient")
    gradient = gradient.view(hidden.shape)
    for index in reversed(range(quantized.block_count)):
        own = inputs.pop().to(quantized.device).requires_grad_()
        with _running(quantized, scales, index):
            quantized.run_block(index, own).backward(gradient)
        assert own.grad is not None
        gradient = own.grad
    return divergence


@contextmanager
def _running(model: StreamedModel, scales: GroupScales, index: int) -> Iterator[None]:
    structure = model.structure(index)
    linears = {
        inner: name
        for group in structure.groups
        for inner, name in zip(group.linears, model.linear_names(index, group), strict=True)
    }
    with (
        model.block(index) as block,  # none is read ahead: weights are decoded on the device, which holds one block
        chunked_positionwise(block, structure),
        scales.applied(block, structure, linears),
    ):
        yield


def _divergence(
    original: StreamedModel, quantized: StreamedModel, wanted: Tensor, hidden: Tensor
) -> tuple[float, Tensor]:
    # Mean KL(original || quantized) of the predictions at some positions, nats per token, and its gradient at the
    # quantized model's last hidden states: both (positions, hidden size), on the CPU and on the device.
    device, total = quantized.device, 0.0
    gradient = torch.empty(hidden.shape, device=device)
    for first in range(0, len(hidden), TAIL_TOKENS):
        positions = slice(first, first + TAIL_TOKENS)
        with torch.no_grad():
            target = log_softmax(original.logits(wanted[None, positions].to(device)).float(), dim=-1)
        own = hidden[None, positions].to(device).requires_grad_()
        predicted = log_softmax(quantized.logits(own).float(), dim=-1)
        loss = kl_div(predicted, target, reduction="sum", log_target=True) / len(hidden)
        gradient[positions] = torch.autograd.grad(loss, own)[0][0]
        total += float(loss.detach())
    return total, gradient
