import pytest
from bpwise.convert.exl2.plan.vram import exl2_cache_bytes, exl2_overhead_bytes
from bpwise.errors import BudgetError

from ...checkpoint.model.test_cache import LLAMA_3_8B


def test_caches() -> None:
    # 32 layers, 8 heads of 128. Q4: half a byte an element and 2 bytes for 32 of them, keys and values alike.
    elements = 32 * 8 * 128 * 8192
    scale = elements // 32 * 2
    assert exl2_cache_bytes(LLAMA_3_8B, 8192) == 2 * 2 * elements
    assert exl2_cache_bytes(LLAMA_3_8B, 8192, cache_bits=4) == 2 * (elements // 2 + scale)
    assert exl2_cache_bytes(LLAMA_3_8B, 8192, cache_bits=6) == (elements + scale) + (elements // 2 + scale)
    assert exl2_cache_bytes(LLAMA_3_8B, 8192, cache_bits=8) == 2 * (elements + scale)


def test_beside_the_weights() -> None:
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
