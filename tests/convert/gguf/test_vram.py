from typing import Any

import pytest
from bpwise.convert.gguf.llama_cpp.vram import room_for_weights
from bpwise.errors import BudgetError

from ...checkpoint.model.test_cache import LLAMA_3_8B

VRAM = 64 << 30


def cache_bytes(config: dict[str, Any], context_tokens: int) -> int:
    """What a context takes beside one of no token."""
    return room_for_weights(VRAM, config, 0) - room_for_weights(VRAM, config, context_tokens)


def test_what_is_left() -> None:
    room = room_for_weights(8 << 30, LLAMA_3_8B, 8192)
    # 7 GiB less 300 MiB and half a GiB of logits and activations at most.
    assert (6 << 30) < room < (7 << 30) - (300 << 20)
    # Twice the context takes another GiB: llama.cpp prints "KV self size = 1024.00 MiB" at 8192 in f16.
    assert room_for_weights(8 << 30, LLAMA_3_8B, 16384) == room - (1 << 30)
    with pytest.raises(BudgetError, match="shorter context"):
        room_for_weights(8 << 30, LLAMA_3_8B, 1 << 20)


SHAPE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000}
PAIR = 2 * 8 * 128 * 2
"""Bytes of a token's keys and values in one block."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, 2 * 10000 * PAIR),
        ({"layer_types": ["mamba", "attention", "mamba", "mamba"]}, 10000 * PAIR),
        ({"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}, 10000 * PAIR),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, 10000 * PAIR),
        # llama.cpp: GGML_PAD(n_swa + n_ubatch, 256).
        (
            {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 1000},
            (3 * 1536 + 10000) * PAIR,
        ),
        ({"num_kv_shared_layers": 1}, 3 * 10000 * PAIR),
        (
            {"layer_types": ["full_attention"] * 4, "global_head_dim": 512, "num_global_key_value_heads": 2},
            4 * 10000 * PAIR,
        ),
        # DeepSeek-V3: 576 elements a token and block, no values.
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 10000 * 576 * 2),
    ],
    ids=["linear attention", "mamba", "Nemotron-H", "Jamba", "window", "shared", "global heads", "MLA"],
)
def test_blocks_that_keep_less(changes: dict[str, Any], expected: int) -> None:
    assert cache_bytes({**SHAPE, "num_hidden_layers": 4, **changes}, 10000) == expected


def test_a_model_without_attention_keeps_nothing() -> None:
    assert cache_bytes({"hidden_size": 4096, "num_hidden_layers": 4, "vocab_size": 32000}, 10000) == 0


def test_widths_by_block() -> None:
    wide = {**SHAPE, "num_hidden_layers": 2, "intermediate_size": [100, 64000]}
    assert room_for_weights(VRAM, wide, 100) == room_for_weights(VRAM, {**wide, "intermediate_size": 64000}, 100)
