"""How large a GGUF file may be so that the model runs on a GPU of a given size, all layers on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BudgetError

__all__ = ["cache_bytes", "room_for_weights"]

_BATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once unless told otherwise (``--ubatch-size``)."""

_CACHE_ELEMENT_BYTES = 2
"""Keys and values are kept in float16 unless told otherwise (``--cache-type-k``)."""

_RUNTIME_BYTES = 300 << 20
"""What the driver and its kernels take, roughly: it differs from card to card."""


def cache_bytes(config: Mapping[str, Any], context_tokens: int) -> int:
    """Return the size of the keys and values of a whole context, in llama.cpp's default type.

    Args:
        config: The model's config.json.
        context_tokens: Length of the context.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    width = (config.get("num_key_value_heads") or heads) * head_dim
    return int(2 * config["num_hidden_layers"] * width * context_tokens * _CACHE_ELEMENT_BYTES)


def room_for_weights(vram_bytes: int, config: Mapping[str, Any], context_tokens: int) -> int:
    """Return what is left for the file beside the cache, a batch's activations and logits, and the runtime.

    Args:
        vram_bytes: Memory of the GPU.
        config: The model's config.json.
        context_tokens: Length of the context to keep in it.

    Raises:
        BudgetError: Nothing is left.
    """
    widest = max(config["vocab_size"], config["intermediate_size"])
    batch = 4 * _BATCH_TOKENS * (widest + 4 * config["hidden_size"])
    taken = cache_bytes(config, context_tokens) + batch + _RUNTIME_BYTES
    if taken >= vram_bytes:
        raise BudgetError(
            f"{vram_bytes} bytes of GPU memory leave no room for weights: a context of {context_tokens} tokens takes "
            f"{cache_bytes(config, context_tokens)}, batches and runtime {batch + _RUNTIME_BYTES}. Ask for a shorter "
            "context."
        )
    return int(vram_bytes - taken)
