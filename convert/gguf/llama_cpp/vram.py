"""Memory that llama.cpp takes on a GPU beside the weights, all layers on it: cache, activations, runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....checkpoint.model.cache import head_dim, key_value_heads, require_room_for_weights

__all__ = ["room_for_weights"]

_BATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once unless told otherwise (``--ubatch-size``)."""

_ELEMENT_BYTES = 2
"""Of keys and values, in float16: llama.cpp's default."""

_WHOLE = ("full_attention", "attention", "hybrid")
_WINDOW = "sliding_attention"
"""What ``layer_types`` calls blocks that keep keys and values of the whole context, and of a window. Others keep a
state that does not grow with it, a few MiB, which is not counted."""

_WINDOW_STEP = 256
"""A window's cache is rounded up to so many tokens."""


def room_for_weights(vram_bytes: int, config: Mapping[str, Any], context_tokens: int) -> int:
    """Return what llama.cpp leaves for the file beside the cache, a batch's activations and logits, and the runtime.

    Args:
        vram_bytes: Memory of the GPU.
        config: The language model's config.json, as ``language_config`` completes it.
        context_tokens: Length of the context to keep in it.

    Raises:
        BudgetError: Nothing is left.
    """
    neurons = config.get("intermediate_size") or 4 * config["hidden_size"]  # one for each block, or for all
    widest = max(config["vocab_size"], *(neurons if isinstance(neurons, list) else [neurons]))
    batch = 4 * _BATCH_TOKENS * (widest + 4 * config["hidden_size"])
    cache = _ELEMENT_BYTES * sum(_cached_elements(config, context_tokens))
    return vram_bytes - require_room_for_weights(vram_bytes, cache, batch, context_tokens)


def _cached_elements(config: Mapping[str, Any], context_tokens: int) -> Iterator[int]:
    # Of every block that has a cache of its own. Source: llama.cpp, src/llama-kv-cache.cpp and -iswa.cpp.
    if "num_attention_heads" not in config:
        return
    blocks = config["num_hidden_layers"]
    kinds = config.get("layer_types") or config.get("layers_block_type") or [_WHOLE[0]] * blocks
    if period := config.get("attn_layer_period"):  # Jamba
        kinds = [_WHOLE[0] if index % period == config["attn_layer_offset"] else "mamba" for index in range(blocks)]
    for kind in kinds[: blocks - (config.get("num_kv_shared_layers") or 0)]:
        if kind in _WHOLE:
            yield context_tokens * _token_elements(config, whole=True)
        elif kind == _WINDOW:
            window = (
                -(-((config.get("sliding_window") or context_tokens) + _BATCH_TOKENS) // _WINDOW_STEP) * _WINDOW_STEP
            )
            yield min(window, context_tokens) * _token_elements(config, whole=False)


def _token_elements(config: Mapping[str, Any], *, whole: bool) -> int:
    # A key and a value. MLA keeps one latent vector for all heads, with the part that rope turns.
    if config.get("kv_lora_rank"):
        return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    heads, size = key_value_heads(config), head_dim(config)
    if whole:  # Gemma 4's heads of full attention have sizes of their own
        heads = config.get("num_global_key_value_heads") or heads
        size = config.get("global_head_dim") or size
    return 2 * heads * size
