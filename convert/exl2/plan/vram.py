"""Memory that ExLlamaV2 takes on a GPU beside the weights, all layers on it: cache, activations, runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....checkpoint.model.cache import cache_elements, head_dim, key_value_heads, require_room_for_weights

__all__ = ["CACHE_BITS", "exl2_cache_bytes", "exl2_overhead_bytes"]

_BATCH_TOKENS = 2048
"""Tokens that ExLlamaV2 computes at once unless told otherwise (config.py: ``max_input_len``)."""

_UNPACKED_WEIGHTS = 512 << 20
"""Most weights that ExLlamaV2 decodes at once (config.py: ``max_dq_size``)."""

_CACHED_PAIR_BITS = {16: 32, 8: 8 + 8 + 1, 6: 8 + 4 + 1, 4: 4 + 4 + 1}
"""Bits of a key and a value together in each of ExLlamaV2's caches (cache.py: float16, Q8, Q6, Q4): the quantized ones
have a float16 scale for 32 elements, and Q6 keeps keys in 8 and values in 4 bits."""

CACHE_BITS = tuple(_CACHED_PAIR_BITS)
"""Bits by which ExLlamaV2's caches are called."""


def exl2_cache_bytes(config: Mapping[str, Any], context_tokens: int, *, cache_bits: int = 16) -> int:
    """Return the size of the keys and values of a whole context.

    Args:
        config: The model's config.json.
        context_tokens: Length of the context.
        cache_bits: 16 for float16, or ExLlamaV2's caches of 8, 6 or 4 bits.
    """
    return cache_elements(config, context_tokens) * _CACHED_PAIR_BITS[cache_bits] // 8


def exl2_overhead_bytes(
    vram_bytes: int, config: Mapping[str, Any], context_tokens: int, *, cache_bits: int = 16
) -> int:
    """Return what ExLlamaV2 takes beside the weights: the cache, what its loader reserves, and the runtime.

    Source: ExLlamaV2 0.3.2, ``set_device_map`` in model.py and the ``temp_*_size`` functions of attn.py, mlp.py and
    linear.py, for one sequence and with flash attention.

    Args:
        vram_bytes: Memory of the GPU.
        config: The model's config.json.
        context_tokens: Length of the context to keep in it.
        cache_bits: As in ``exl2_cache_bytes``.

    Raises:
        BudgetError: Nothing is left for weights.
    """
    hidden, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, queries = config["num_attention_heads"], config["num_attention_heads"] * head_dim(config)
    keys = key_value_heads(config) * head_dim(config)
    batch = min(_BATCH_TOKENS, context_tokens)
    cache = exl2_cache_bytes(config, context_tokens, cache_bits=cache_bits)
    if cache_bits != 16:  # keys and values of one layer, decoded
        cache += 2 * 2 * keys * context_tokens
    expanded = 2 * queries * context_tokens if queries != keys else 0
    attention = batch * (max(queries, hidden) + queries + 2 * keys) + expanded + _unpacked(hidden * queries)
    mlp = batch * (hidden + 2 * max(hidden, inner)) + _unpacked(hidden * inner)
    elements = (
        2 * head_dim(config) * context_tokens  # sines and cosines
        + batch * hidden
        + batch**2  # the mask
        + max(attention, mlp, _unpacked(hidden * vocabulary))
        + 2 * 190 * _BATCH_TOKENS * heads  # attention itself: 190 is attn.py's
    )
    return require_room_for_weights(vram_bytes, cache, 2 * elements, context_tokens)


def _unpacked(weights: int) -> int:
    return min(weights, _UNPACKED_WEIGHTS)
