"""The GGUF benchmark: its importance matrix, its table, and a run on a small random model."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from transformers import AutoModelForCausalLM

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install 'bpwise[gguf]'")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gguf_quality")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_importances_are_mean_squares_of_the_inputs(benchmark: ModuleType, converted: Any, name: str) -> None:
    tokens = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))
    matrix = benchmark.input_mean_squares(Checkpoint.open(converted[name].directory), tokens)
    model = AutoModelForCausalLM.from_pretrained(converted[name].directory, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        return lambda _module, args, _output: seen.__setitem__(key, args[0].detach().square().mean(dim=(0, 1)))

    model.model.layers[1].mlp.down_proj.register_forward_hook(keep("blk.1.ffn_down.weight"))
    model.model.layers[0].self_attn.k_proj.register_forward_hook(keep("blk.0.attn_k.weight"))
    model.lm_head.register_forward_hook(keep("output.weight"))
    model(input_ids=tokens)
    if name == "qwen2":  # one table: llama.cpp's matrix has no entry for it
        del seen["output.weight"]
        assert "output.weight" not in matrix.sums
    for key, expected in seen.items():
        assert torch.allclose(matrix.mean_squares(key).double(), expected, rtol=1e-3)
    assert len(matrix.sums) == 14 + (name == "mistral")


def test_table_puts_makers_side_by_side(benchmark: ModuleType) -> None:
    common = {"mixture": "Q4_K_M", "bpw": 4.8, "kl_error": 0.001, "perplexity": 11.5, "seconds": 1.0}
    theirs = benchmark.Result(maker="llama-quantize", file_bytes=900, kl_nats=0.04, predicted_nats=None, **common)
    ours = benchmark.Result(maker="bpwise", file_bytes=890, kl_nats=0.01, predicted_nats=0.009, **common)
    row = benchmark.table([theirs, ours]).splitlines()[-1]
    assert row == ("| Q4_K_M | 900 | 0.04000 ± 0.00100 | 11.500 | 890 | 0.01000 ± 0.00100 | 11.500 | 0.25 | 0.00900 |")
