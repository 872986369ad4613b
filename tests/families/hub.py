"""What files on the Hub have and Transformers does not write."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def _gemma3(tensors: Tensors) -> Tensors:
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}


def _gemma3n(tensors: Tensors) -> Tensors:
    # The blocks that read the keys and values of others hold matrices for them all the same.
    unused = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"model\.layers\.([0-4])\.self_attn\.(k_proj|v_proj|k_norm)\.weight", name)
        if block:
            unused[f"model.layers.2{block[1]}.self_attn.{block[2]}.weight"] = tensor.flip(0).contiguous()
    return tensors | unused


def _qwen3_5(tensors: Tensors) -> Tensors:
    block = _like(tensors, "model.language_model.layers.3.", "mtp.layers.0.")
    norm = block["mtp.layers.0.input_layernorm.weight"]
    norms = {f"mtp.{name}.weight": norm.clone() for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return tensors | block | norms | {"mtp.fc.weight": _joint(norm)}


def _glm4_moe(tensors: Tensors) -> Tensors:
    block = _like(tensors, "model.layers.1.", "model.layers.2.")
    norm = block["model.layers.2.input_layernorm.weight"]
    parts = {name: norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")} | {"eh_proj": _joint(norm)}
    parts |= {"embed_tokens": tensors["model.embed_tokens.weight"].clone()}
    parts |= {"shared_head.head": tensors["lm_head.weight"].clone()}
    return tensors | block | {f"model.layers.2.{name}.weight": tensor for name, tensor in parts.items()}


def _like(tensors: Tensors, prefix: str, other: str) -> Tensors:
    """Return the tensors of a block under other names, with other values."""
    block = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.replace(prefix, other): tensor.flip(0).contiguous() for name, tensor in block.items()}


def _joint(norm: Tensor) -> Tensor:
    """Return a matrix from the embedding of a token beside the hidden state to one hidden state."""
    width = len(norm)
    drawn = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(width))
    return (drawn / (2 * width) ** 0.5).to(norm.dtype)


AS_ON_THE_HUB: dict[str, Callable[[Tensors], Tensors]] = {
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "glm4_moe": _glm4_moe,
    "qwen3_5": _qwen3_5,
}
"""By family, tensors as in its files from those that Transformers writes: names, and heads for the token after next."""
