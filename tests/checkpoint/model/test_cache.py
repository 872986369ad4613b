from bpwise.checkpoint.model.cache import cache_elements

LLAMA_3_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def test_keys_of_a_context() -> None:
    assert cache_elements(LLAMA_3_8B, 8192) == 32 * 8 * 128 * 8192
    # SmolLM2-135M: 30 layers, 3 heads of 64.
    small = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert cache_elements(small, 1000) == 30 * 3 * 64 * 1000
    assert cache_elements({**small, "head_dim": 128}, 1000) == 2 * 30 * 3 * 64 * 1000
    del small["num_key_value_heads"]  # as many as there are queries
    assert cache_elements(small, 1000) == 30 * 9 * 64 * 1000
