import pytest
from bpwise.errors import BudgetError
from bpwise.quantize.vram import cache_bytes, room_for_weights

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
