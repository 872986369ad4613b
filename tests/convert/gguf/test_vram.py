import pytest
from bpwise.convert.gguf.llama_cpp.vram import room_for_weights
from bpwise.errors import BudgetError

from ...checkpoint.model.test_cache import LLAMA_3_8B


def test_what_is_left() -> None:
    room = room_for_weights(8 << 30, LLAMA_3_8B, 8192)
    # 7 GiB less 300 MiB and half a GiB of logits and activations at most.
    assert (6 << 30) < room < (7 << 30) - (300 << 20)
    # Twice the context takes another GiB: llama.cpp prints "KV self size = 1024.00 MiB" at 8192 in f16.
    assert room_for_weights(8 << 30, LLAMA_3_8B, 16384) == room - (1 << 30)
    with pytest.raises(BudgetError, match="shorter context"):
        room_for_weights(8 << 30, LLAMA_3_8B, 1 << 20)
