import pytest
from bpwise.convert.vram import cache_bytes, exl2_overhead_bytes, room_for_weights
from bpwise.errors import BudgetError

LLAMA_3_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def test_cache_of_llama_3_8b() -> None:
    # llama.cpp prints "KV self size = 1024.00 MiB" for it at a context of 8192 in f16.
    assert cache_bytes(LLAMA_3_8B, 8192) == 1024 << 20
    # SmolLM2-135M: 30 layers, 3 heads of 64, keys and values.
    small = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert cache_bytes(small, 1000) == 30 * 2 * 3 * 64 * 2 * 1000
    assert cache_bytes({**small, "head_dim": 128}, 1000) == 2 * 30 * 2 * 3 * 64 * 2 * 1000


def test_what_is_left() -> None:
    room = room_for_weights(8 << 30, LLAMA_3_8B, 8192)
    # 7 GiB less 300 MiB and half a GiB of logits and activations at most.
    assert (6 << 30) < room < (7 << 30) - (300 << 20)
    assert room_for_weights(8 << 30, LLAMA_3_8B, 16384) == room - (1 << 30)
    with pytest.raises(BudgetError, match="shorter context"):
        room_for_weights(8 << 30, LLAMA_3_8B, 1 << 20)


def test_exllamav2s_caches() -> None:
    # 32 layers, 8 heads of 128. Q4: half a byte an element and 2 bytes for 32 of them, keys and values alike.
    elements = 32 * 8 * 128 * 8192
    scale = elements // 32 * 2
    assert cache_bytes(LLAMA_3_8B, 8192, cache_bits=4) == 2 * (elements // 2 + scale)
    assert cache_bytes(LLAMA_3_8B, 8192, cache_bits=6) == (elements + scale) + (elements // 2 + scale)
    assert cache_bytes(LLAMA_3_8B, 8192, cache_bits=8) == 2 * (elements + scale)


def test_beside_the_weights_in_exllamav2() -> None:
    # Llama-3-8B at 8192 tokens in float16: cache 1 GiB; sines and cosines 2 x 128 x 8192, a state of 2048 x 4096 and a
    # mask of 2048 x 2048 in float16; the head decoded, 4096 x 128256; attention as the loader reserves it; the runtime.
    tables, state, mask = 2 * 2 * 128 * 8192, 2 * 2048 * 4096, 2 * 2048**2
    head = 2 * 4096 * 128256
    attention = 4 * 32 * (2048**2 * 190 // 2048)
    whole = (1 << 30) + tables + state + mask + head + attention + (300 << 20)
    assert exl2_overhead_bytes(24 << 30, LLAMA_3_8B, 8192) == whole
    # A cache of 4 bits takes 9/32 of it, and one layer's keys and values decoded.
    small = (1 << 30) * 9 // 32 + 2 * 2 * 8 * 128 * 8192
    assert exl2_overhead_bytes(24 << 30, LLAMA_3_8B, 8192, cache_bits=4) == whole - (1 << 30) + small
    with pytest.raises(BudgetError, match="shorter context"):
        exl2_overhead_bytes(8 << 30, LLAMA_3_8B, 1 << 20)
