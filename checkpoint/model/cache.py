"""The cache of a context on a GPU, as bytes; what else readers take there is their formats'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import BudgetError
from ...tables import bytes_text

__all__ = ["RUNTIME_BYTES", "cache_elements", "head_dim", "key_value_heads", "require_room_for_weights"]

RUNTIME_BYTES = 300 << 20
"""What the driver and its kernels take, roughly: it differs from card to card."""


def cache_elements(config: Mapping[str, Any], context_tokens: int) -> int:
    """Return how many keys a whole context has; it has as many values.

    Args:
        config: The model's config.json.
        context_tokens: Length of the context.
    """
    return int(config["num_hidden_layers"] * key_value_heads(config) * head_dim(config) * context_tokens)


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key and value heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def require_room_for_weights(vram_bytes: int, cache_bytes: int, batch_bytes: int, context_tokens: int) -> int:
    """Return what is taken beside the weights.

    Args:
        vram_bytes: Memory of the GPU.
        cache_bytes: Size of the cache.
        batch_bytes: What computing a batch takes.
        context_tokens: Length of the context.

    Raises:
        BudgetError: Nothing is left.
    """
    taken = cache_bytes + batch_bytes + RUNTIME_BYTES
    if taken >= vram_bytes:
        raise BudgetError(
            f"{bytes_text(vram_bytes)} of GPU memory leave no room for weights: a context of {context_tokens} tokens "
            f"takes {bytes_text(cache_bytes)}, batches and runtime {bytes_text(batch_bytes + RUNTIME_BYTES)}. "
            "Ask for a shorter context."
        )
    return taken
