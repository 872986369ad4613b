"""Memory that llama.cpp takes on a GPU beside the weights, all layers on it: cache, activations, runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....checkpoint.model.cache import cache_elements, require_room_for_weights

__all__ = ["room_for_weights"]

_BATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once unless told otherwise (``--ubatch-size``)."""

_PAIR_BYTES = 4
"""A key and a value, in float16: llama.cpp's default."""


def room_for_weights(vram_bytes: int, config: Mapping[str, Any], context_tokens: int) -> int:
    """Return what llama.cpp leaves for the file beside the cache, a batch's activations and logits, and the runtime.

    Args:
        vram_bytes: Memory of the GPU.
        config: The model's config.json.
        context_tokens: Length of the context to keep in it.

    Raises:
        BudgetError: Nothing is left.
    """
    widest = max(config["vocab_size"], config["intermediate_size"])
    batch = 4 * _BATCH_TOKENS * (widest + 4 * config["hidden_size"])
    cache = _PAIR_BYTES * cache_elements(config, context_tokens)
    return vram_bytes - require_room_for_weights(vram_bytes, cache, batch, context_tokens)
