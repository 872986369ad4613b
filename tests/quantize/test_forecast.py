"""The memory forecast: what it grows with."""

from pathlib import Path
from typing import Any

from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.forecast import forecast_run
from bpwise.quantize.options import Effort, QuantizeConfig
from transformers import Qwen3Config


def test_states_in_files_do_not_count(tiny_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    hidden = checkpoint.config["hidden_size"]

    def memory_bytes(rows: int, offload_dir: Path | None) -> int:
        config = MeasureConfig(calibration=CalibrationConfig(rows=rows, row_tokens=1024), offload_dir=offload_dir)
        return forecast_run(checkpoint, bpw=4.0, head_bits=6, group_size=32, config=config).memory_bytes

    # With so many tokens of so small a model, rounding a block needs most. A state is 4 bytes a token and channel.
    state = 1 << 20 << 2
    assert memory_bytes(2048, None) - memory_bytes(1024, None) >= 8 * state * hidden
    assert memory_bytes(2048, Path("files")) == memory_bytes(1024, Path("files"))


def test_wide_queries_count(save_model: Any, tmp_path: Path) -> None:
    # While o is rounded, every pass holds queries, keys and values, and what attention made of them.
    model = save_model(tmp_path / "wide", kind=Qwen3Config, head_dim=64, num_attention_heads=8, num_key_value_heads=2)
    checkpoint = Checkpoint.open(model)

    def memory_bytes(rows: int) -> int:
        config = MeasureConfig(calibration=CalibrationConfig(rows=rows, row_tokens=1024))
        return forecast_run(checkpoint, bpw=4.0, head_bits=6, group_size=32, config=config).memory_bytes

    features = 5 * 64 + 2 * 64 + 8 * 64 + 2 * 2 * 64 + 8 * 64
    assert memory_bytes(2048) - memory_bytes(1024) >= (1 << 20) * features * 4


def test_tuning_holds_what_enters_every_block(save_model: Any, tmp_path: Path) -> None:
    # Of one row, however many rows there are; and of all rows what leaves the last.
    model = save_model(tmp_path / "deep", num_hidden_layers=24, max_position_embeddings=1 << 20)
    checkpoint = Checkpoint.open(model)

    def memory_bytes(rows: int, effort: Effort, offload_dir: Path | None = None) -> int:
        calibration = CalibrationConfig(rows=rows, row_tokens=1 << 20)
        measure = MeasureConfig(calibration=calibration, offload_dir=offload_dir)
        return QuantizeConfig(bpw=4.0, measure=measure, effort=effort).forecast(checkpoint).memory_bytes

    state = (1 << 20) * checkpoint.config["hidden_size"] * 4
    assert memory_bytes(1, "high") >= 25 * state
    assert memory_bytes(1, "high") > memory_bytes(1, "normal")
    assert memory_bytes(100, "high") == memory_bytes(100, "normal")
    assert memory_bytes(1, "high", Path("files")) < memory_bytes(1, "high") - 20 * state
