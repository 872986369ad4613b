"""Tuning: once every linear is rounded, the decoder's scales are fitted to what the original predicts, group by group.

Rounding has every block follow the original's, one after another. What it cannot make good adds up through the model,
and no block sees what comes of it at the end. A largest scale holds for a whole row group, and there are few (a few
thousand where there are a hundred million weights), so that they can be learned from the calibration rows without
learning these by heart: one step of Adam for every 1024 tokens, down the KL divergence from the original's predictions.
Codes and scale codes stay as they are, and so does the size.
Source: the end-to-end phase of EfficientQAT (Chen et al., arXiv 2407.11062), which learns nothing but the step sizes of
a quantized model; as a distillation, without its labels.

Notes:
    Group g of a linear gets the factor ``exp(t_g)``, so ``y = sum_k x_k exp(t_g(k)) W_k``. The loss is the mean over
    positions of ``KL(p || q_t)``, p the original's predictions and q_t the tuned model's, nats per token. Its gradient
    is ``dL/dt_g = sum over tokens, k in g of x_k exp(t_g) dL/d(x_k exp(t_g))``: what a hook on the linear's scaled
    input sees. Adam's rate at step i of n is ``0.009 sqrt(KL of step 0) min(1, (i + 1) / 5) (1 + cos(pi i / n)) / 2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ....checkpoint.files.resume import ResumeStore
from ....checkpoint.model.structure import BlockStructure, LinearPlace
from ....measure.layers.experts import ExpertProduct, watched_experts
from ....measure.layers.linears import LinearView, linear_of
from ....measure.layers.positionwise import chunked_positionwise
from ....measure.model.batches import TAIL_TOKENS, check_finite
from ....measure.model.stream import StreamedModel
from ....progress import Progress

__all__ = ["STEP_TOKENS", "GroupScales", "tune_scales"]

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


class GroupScales:
    """A factor for every row group of a model's linears, and the gradient of a loss with respect to its logarithm.

    Attributes:
        logs: Logarithms of the factors, float32, shape (all groups,), on the CPU.
        gradient: What backward passes have added up to, for ``logs``, of which it is the ``grad``.
    """

    def __init__(self, groups: Mapping[str, Tensor], device: torch.device) -> None:
        """Start with factors of 1.

        Args:
            groups: For each linear, by full name, the row group of each input feature, int64, shape (K,), on the CPU.
            device: Where the linears run.
        """
        self._places: dict[str, slice] = {}
        first = 0
        for name, of_linear in groups.items():
            count = int(of_linear.max()) + 1
            self._places[name] = slice(first, first + count)
            first += count
        self._groups, self._device = groups, device
        self.logs = torch.zeros(first, requires_grad=True)
        self.gradient = self.logs.grad = torch.zeros(first)

    def factors(self) -> dict[str, Tensor]:
        """Return the factors of each linear's groups, float32, shape (groups,), on the CPU."""
        return {name: self.logs.detach()[place].exp() for name, place in self._places.items()}

    @contextmanager
    def applied(self, block: nn.Module, structure: BlockStructure, linears: Mapping[str, str]) -> Iterator[None]:
        """Scale what enters the linears of a block; a backward pass in this context adds to the gradient.

        Args:
            block: A decoder block whose weights go when the context ends: those of experts are scaled themselves.
            structure: Its structure.
            linears: Full names of its linears, by those in the block; those without groups are left alone.
        """
        experts: dict[str, list[tuple[LinearView, LinearPlace, str]]] = {}
        with ExitStack() as hooks:
            for inner, name in linears.items():
                if name not in self._places:
                    continue
                place = structure.places.get(inner)
                if place is None or place.expert is None:
                    module = block.get_submodule(inner)
                    hooks.enter_context(module.register_forward_pre_hook(self._hook(name)))
                else:
                    linear = linear_of(block, structure, inner)
                    linear.weight.mul_(self._factors(name))
                    experts.setdefault(place.parameter.rpartition(".")[0], []).append((linear, place, name))
            for path, own in experts.items():
                see = partial(self._see_product, path, own)
                hooks.enter_context(watched_experts(block.get_submodule(path), see))
            yield

    def _factors(self, name: str) -> Tensor:
        # Of each input feature.
        return self.logs.detach()[self._places[name]].exp()[self._groups[name]].to(self._device)

    def _see_product(
        self, path: str, linears: Sequence[tuple[LinearView, LinearPlace, str]], product: ExpertProduct
    ) -> None:
        if not product.output.requires_grad:
            return
        inputs = product.inputs.detach()

        def hook(gradient: Tensor) -> None:
            for linear, place, name in linears:
                if (place.parameter, place.expert) == (f"{path}.{product.parameter}", product.expert):
                    first, last = place.rows or (0, gradient.shape[1])
                    self._add(name, gradient[:, first:last] @ linear.weight, inputs)

        product.output.register_hook(hook)

    def _add(self, name: str, gradient: Tensor, inputs: Tensor) -> None:
        # The gradient at the scaled inputs, and these; or the same divided and multiplied by the factors.
        of_features = (gradient * inputs).flatten(0, -2).sum(dim=0)
        # On the CPU, where sums have an order.
        self.gradient[self._places[name]].index_add_(0, self._groups[name], of_features.cpu())

    def _hook(self, name: str) -> Any:
        factors = self._factors(name)

        def scale(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            scaled = args[0] * factors
            if scaled.requires_grad:
                seen = scaled.detach()
                scaled.register_hook(lambda gradient: self._add(name, gradient, seen))
            return (scaled, *args[1:])

        return scale


def tune_scales(
    original: StreamedModel,
    quantized: StreamedModel,
    groups: Mapping[str, Tensor],
    tokens: Tensor,
    wanted: Tensor,
    artifacts: ResumeStore,
    progress: Progress,
) -> dict[str, Tensor]:
    """Fit a factor for every row group to the original's predictions, in one pass over the calibration rows.

    Args:
        original: The original; of it only what follows the blocks is run.
        quantized: The quantized model, on the same device.
        groups: As ``GroupScales`` takes them.
        tokens: Calibration rows, int64, shape (rows, tokens).
        wanted: What the original's last block makes of them, shape (rows, tokens, hidden size), on the CPU.
        artifacts: Where finished steps are kept.
        progress: Wraps the steps.

    Returns:
        The factors of each linear's groups, float32, shape (groups,).

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
