"""Hidden states that are zero, or so small that a norm does not bring them to size, or only by blowing them up.

A BOS token without an embedding, or one that was never trained, has such a state; where blocks have no biases a zero
stays one up to the head. A norm divides by the root of the state's mean square (LayerNorm: of its variance) plus
epsilon. What comes out is next to zero, and on its way back the gradient grows by 1 / sqrt(epsilon), a thousand, at
every norm: beside it those of all other positions vanish, and some blocks further it overflows. But where the inputs of
linears are zero no error of a weight shows. So norms take such a state for a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import InputGroup

__all__ = ["hold_small_states", "norms_of_stream"]

_SMALL = 0.05
"""Size up to which a state is held, relative to the median of all. Gradients of states just above are twenty times as
large as usual, their squares 400 times: less than what the other tokens of a row come to."""


def norms_of_stream(model: nn.Module, blocks: str, groups: Iterable[InputGroup]) -> Iterator[nn.Module]:
    """Yield the norms of a model that the residual stream enters, as it is: those of its blocks, and the last.

    What comes out of a linear may pass a norm too; there small values are as good as large ones.

    Args:
        model: A causal language model of Transformers.
        blocks: Name of its list of decoder blocks.
        groups: Input groups of all blocks.
    """
    own = [*model.get_submodule(blocks.rpartition(".")[0]).named_children()]
    for block in model.get_submodule(blocks).children():
        own += block.named_children()
    others = {group.adds for group in groups if group.normed}
    for name, module in own:
        if type(module).__name__.endswith("Norm") and name not in others:
            yield module


def hold_small_states(norm: nn.Module) -> None:
    """Have a norm pass no gradient to states that are small beside the others; its outputs stay as they are."""
    norm.register_forward_pre_hook(_hold)


def _hold(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    states: Tensor = args[0]
    if not states.requires_grad:
        return None
    plain = states.detach()
    if "RMSNorm" not in type(norm).__name__:  # LayerNorm takes the mean off
        plain = plain - plain.mean(dim=-1, keepdim=True)
    sizes = torch.linalg.vector_norm(plain, dim=-1)
    small = sizes <= _SMALL * sizes.median()
    return (torch.where(small[..., None], states.detach(), states), *args[1:]) if bool(small.any()) else None
