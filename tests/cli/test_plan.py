"""``bpwise plan``: several sizes in one table, and what fits into a GPU."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bpwise.cli import cli
from bpwise.measure.measurement import Measurement
from click.testing import CliRunner, Result

from ..measured import bare_measurement, exl2_of

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A made-up measurement of eight linears, 64 x 64, and the head."""
    shapes = {f"model.layers.{index}.mlp.up_proj": (64, 64) for index in range(8)} | {"lm_head": (64, 96)}
    damages = {name: np.outer([1.0, 0.5], [1, 2, 4, 8, 16, 32]) * 1e-4 for name in shapes}
    orders = {name: np.arange(64, dtype=np.int32) for name in shapes}
    curves = exl2_of(damages, orders, group_size=32)
    bare_measurement(shapes, {"exl2": curves}, config=CONFIG).save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], catch_exceptions=False)


def sizes(lines: Sequence[str]) -> list[float]:
    return [float(line.split()[0]) for line in lines]


def test_several_bitrates(measured: Path) -> None:
    result = plan(measured, "--bpw", "6,5,4")
    assert result.exit_code == 0, result.stderr
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["bpw", "size", "damage,", "nats/token", "plan"]
    assert all(asked - 0.5 < bpw <= asked for asked, bpw in zip((6, 5, 4), sizes(lines), strict=True))
    damages = [float(line.split()[3]) for line in lines]
    assert damages == sorted(damages)
    for rate in (6, 5, 4):
        assert json.loads(measured.with_name(f"plan-{rate}.json").read_text())["target_bpw"] == rate


def test_several_in_a_directory(measured: Path, tmp_path: Path) -> None:
    assert plan(measured, "--bpw", "4,5", "-o", tmp_path / "plans").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == ["plan-4.json", "plan-5.json"]
    assert "several plans need a folder" in plan(measured, "--bpw", "4,5", "-o", measured).stderr
    assert plan(measured, "--bpw", "4,5", "-o", measured / "below").stderr.startswith("Error: ")
    assert "is a directory. Expected a file" in plan(measured, "--bpw", "4", "-o", tmp_path / "plans").stderr


def test_an_impossible_one_of_several_leaves_nothing(measured: Path, tmp_path: Path) -> None:
    result = plan(measured, "--bpw", "4,1.2")
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_more_memory_holds_more_bits_and_a_longer_context_fewer(measured: Path) -> None:
    def bpw(*options: object) -> float:
        result = plan(measured, *options, "--json")
        assert result.exit_code == 0, result.stderr
        return float(json.loads(result.stdout)["plans"][0]["bpw"])

    with pytest.raises(AssertionError, match="leave no room for weights"):
        bpw("--vram", "1MB")
    # What a context of 1024 tokens takes is the difference: a key and a value of 32 elements of 2 bytes in one block.
    from bpwise.convert.exl2.plan.vram import exl2_overhead_bytes

    norms_and_runtime = exl2_overhead_bytes(2**40, CONFIG, 1024)
    head = 64 * 96 * 6 // 8
    weights = 8 * 64 * 64
    vram = norms_and_runtime + head + weights * 6 // 8
    assert 4.5 < bpw("--vram", vram, "--context", "1k") < 6
    assert bpw("--vram", vram + weights // 8, "--context", "1k") > bpw("--vram", vram, "--context", "1k")
    assert bpw("--vram", vram, "--context", "1000") > bpw("--vram", vram, "--context", "1k")


def test_gguf_says_that_it_was_not_measured(measured: Path) -> None:
    assert "not measured" in plan(measured, "--format", "gguf", "--vram", "8GB").stderr


def test_older_measurements_have_no_config(measured: Path) -> None:
    replace(Measurement.load(measured), config={}).save(measured)
    assert "Measure again" in plan(measured, "--vram", "8GB").stderr
    assert plan(measured, "--bpw", "5").exit_code == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--bpw", "4", "--vram", "8GB"), "give only one of --bpw, --max-size and --vram"),
        (("--bpw", "4", "--context", "4k"), "--context has no effect without --vram"),
        (("--bpw", "4", "--cache-bits", "8"), "--cache-bits has no effect without --vram"),
        ((), "give --bpw, --max-size or --vram"),
    ],
)
def test_usage(measured: Path, options: Sequence[str], problem: str) -> None:
    result = plan(measured, *options)
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())
