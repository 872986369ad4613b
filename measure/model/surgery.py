"""Taking apart linears that Transformers keeps in one module and ``LanguageModel`` in several.

The modules that a block calls stay where they are; they call the parts, which stand under the parts' own names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.families import Family
from ...checkpoint.model.names import config_features

__all__ = ["split_block"]


def split_block(block: nn.Module, family: Family | None, config: dict[str, Any]) -> None:
    """Put single linears, without weights, in the place of what a block has fused.

    Args:
        block: A decoder block on the meta device; changed.
        family: Says what is fused; None where nothing is taken apart.
        config: The language model's config, which gives the sizes of the parts.
    """
    for fused, parts in ({} if family is None else family.fused).items():
        whole: Any = block.get_submodule(fused)
        linears = [_linear(whole.in_features, config_features(part, config)[1] or 0, whole) for part in parts]
        for part, linear in zip(parts, linears, strict=True):
            _set_module(block, part, linear)
        _set_module(block, fused, _Joined(linears))


class _Joined(nn.Module):
    """Stands where a fused linear was; its parts are registered elsewhere."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self._parts = tuple(parts)  # in a tuple, modules are not registered here too

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self._parts], dim=-1)


def _linear(inputs: int, outputs: int, like: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)


def _set_module(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    block.get_submodule(parent).add_module(leaf, module)
