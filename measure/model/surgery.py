"""Taking apart what Transformers keeps in one module and ``LanguageModel`` in several: fused linears, experts.

The modules that a block calls stay where they are; they call the parts, which stand under the parts' own names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.families import Experts, Family
from ...checkpoint.model.names import config_features

__all__ = ["Expert", "SplitExperts", "split_block"]


def split_block(block: nn.Module, family: Family, config: dict[str, Any]) -> None:
    """Put single linears, without weights, in the place of what a block has fused.

    Args:
        block: A decoder block on the meta device; changed.
        family: Says what is fused.
        config: The language model's config, which gives the sizes of the parts.
    """
    for fused, parts in family.fused.items():
        whole: Any = block.get_submodule(fused)
        linears = [_linear(whole.in_features, config_features(part, config)[1] or 0, whole) for part in parts]
        for part, linear in zip(parts, linears, strict=True):
            _set_module(block, part, linear)
        _set_module(block, fused, _Joined(linears))
    experts = family.experts
    if experts is not None and _has_module(block, experts.path):
        _set_module(block, experts.path, SplitExperts(block.get_submodule(experts.path), experts))


class _Joined(nn.Module):
    """Stands where a fused linear was; its parts are registered elsewhere."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self._parts = tuple(parts)  # in a tuple, modules are not registered here too

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self._parts], dim=-1)


class Expert(nn.Module):
    """One expert: a gated MLP of three linears, named as in files.

    Attributes:
        tokens: Which tokens of the micro-batch it worked on last, int64, shape (tokens,), rows one after another.
    """

    tokens: Tensor

    def __init__(self, names: Experts, hidden_size: int, neurons: int, activation: nn.Module, like: Tensor) -> None:
        """Make an expert on the meta device.

        Args:
            names: What its linears are called.
            hidden_size: Features that go in and come out.
            neurons: Features in between.
            activation: Of the gate.
            like: Gives the dtype.
        """
        super().__init__()
        self._names = names
        self._activation = (activation,)
        for name in (names.gate, names.up):
            self.add_module(name, nn.Linear(hidden_size, neurons, bias=False, device="meta", dtype=like.dtype))
        self.add_module(names.down, nn.Linear(neurons, hidden_size, bias=False, device="meta", dtype=like.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return its output, shape (tokens, hidden size), for hidden states of the same shape."""
        output: Tensor = self.get_submodule(self._names.down)(self.neurons(hidden))
        return output

    def neurons(self, hidden: Tensor) -> Tensor:
        """Return what the down projection reads, shape (tokens, neurons)."""
        gate, up = (self.get_submodule(name)(hidden) for name in (self._names.gate, self._names.up))
        inputs: Tensor = self._activation[0](gate) * up
        return inputs


class SplitExperts(nn.Module):
    """Experts with linears of their own, in the place of those that Transformers keeps in two tensors."""

    def __init__(self, fused: Any, names: Experts) -> None:
        """Make the experts on the meta device.

        Args:
            fused: The module to replace: ``gate_up_proj`` of shape (experts, 2 neurons, hidden size), ``act_fn``.
            names: What the linears of an expert are called.
        """
        super().__init__()
        count, twice, hidden_size = fused.gate_up_proj.shape
        for number in range(count):
            expert = Expert(names, hidden_size, twice // 2, fused.act_fn, fused.gate_up_proj)
            self.add_module(str(number), expert)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Run every expert on the tokens that chose it.

        Args:
            hidden: Shape (tokens, hidden size).
            chosen: Experts of each token, int64, shape (tokens, chosen).
            weights: What each of them counts, same shape.

        Returns:
            Weighted sum of the experts' outputs, shape (tokens, hidden size).
        """
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            assert isinstance(expert, Expert)
            expert.tokens, place = torch.where(chosen == number)
            if len(expert.tokens):
                made = expert(hidden[expert.tokens]) * weights[expert.tokens, place, None]
                output = output.index_add(0, expert.tokens, made.to(output.dtype))
        return output


def _linear(inputs: int, outputs: int, like: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)


def _has_module(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _set_module(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    block.get_submodule(parent).add_module(leaf, module)
