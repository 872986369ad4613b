"""The memory forecast: what it grows with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.conversion import Exl2Conversion
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.options import Effort
from bpwise.measure.run import MeasureConfig
from bpwise.quantize.timing.forecast import forecast_run
from transformers import Qwen3Config


def memory(
    checkpoint: Checkpoint, shape: tuple[int, int], *, offload_dir: Path | None = None, effort: Effort = "normal"
) -> int:
    conversion = Exl2Conversion(checkpoint, Exl2Options(effort=effort))
    measure = MeasureConfig(offload_dir=offload_dir)
    return forecast_run(conversion, Target(bpw=4.0), measure, rows_shape=shape).memory_bytes


def test_states_in_files_do_not_count(tiny_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    hidden = checkpoint.config["hidden_size"]

    def memory_bytes(rows: int, offload_dir: Path | None) -> int:
        return memory(checkpoint, (rows, 1024), offload_dir=offload_dir)

    # With so many tokens of so small a model, rounding a block needs most. A state is 4 bytes a token and channel.
    state = 1 << 20 << 2
    assert memory_bytes(2048, None) - memory_bytes(1024, None) >= 8 * state * hidden
    assert memory_bytes(2048, Path("files")) == memory_bytes(1024, Path("files"))


def test_wide_queries_count(save_model: Any, tmp_path: Path) -> None:
    # While o is rounded, every pass holds queries, keys and values, and what attention made of them.
    model = save_model(tmp_path / "wide", kind=Qwen3Config, head_dim=64, num_attention_heads=8, num_key_value_heads=2)
    checkpoint = Checkpoint.open(model)

    def memory_bytes(rows: int) -> int:
        return memory(checkpoint, (rows, 1024))

    features = 5 * 64 + 2 * 64 + 8 * 64 + 2 * 2 * 64 + 8 * 64
    assert memory_bytes(2048) - memory_bytes(1024) >= (1 << 20) * features * 4


def test_tuning_holds_what_enters_every_block(save_model: Any, tmp_path: Path) -> None:
    # Of one row, however many rows there are; and of all rows what leaves the last.
    model = save_model(tmp_path / "deep", num_hidden_layers=24, max_position_embeddings=1 << 20)
    checkpoint = Checkpoint.open(model)

    def memory_bytes(rows: int, effort: Effort, offload_dir: Path | None = None) -> int:
        return memory(checkpoint, (rows, 1 << 20), offload_dir=offload_dir, effort=effort)

    state = (1 << 20) * checkpoint.config["hidden_size"] * 4
    assert memory_bytes(1, "high") >= 25 * state
    assert memory_bytes(1, "high") > memory_bytes(1, "normal")
    assert memory_bytes(100, "high") == memory_bytes(100, "normal")
    assert memory_bytes(1, "high", Path("files")) < memory_bytes(1, "high") - 20 * state


def test_logits_and_both_heads_count(save_model: Any, tmp_path: Path) -> None:
    # With so many tokens in the vocabulary evaluating needs most. The heads of both models have 2 bytes a weight. Of
    # logits, in float32, there are at least those of both models for 256 positions and half a dozen temporaries of 64
    # positions; the reference in float64 and copies are no more than twice that again.
    few, many, hidden = 20_000, 120_000, 64
    first, second = (
        memory(Checkpoint.open(save_model(tmp_path / str(size), vocab_size=size)), (2, 64)) for size in (few, many)
    )
    heads, logits = 2 * 2 * hidden, 4 * (2 * 256 + 6 * 64)
    assert heads + logits <= (second - first) / (many - few) <= heads + 3 * logits


def test_the_library_of_products_counts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    found = {}
    for avx512, amx in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda has=avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        found[avx512, amx] = memory(checkpoint, (2, 64))
    # Only on CPUs with AVX-512 and without AMX do products in float32 go to oneDNN.
    assert found[True, False] - found[False, False] == 500 * 1024**2
    assert found[True, True] == found[False, False]
