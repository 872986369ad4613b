"""``--json``: one document on stdout, whose numbers are those that files and shapes tell."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bpwise.cli import cli
from bpwise.cli.output import say_json
from bpwise.measure.text.calibration import CalibrationSet
from click.testing import CliRunner
from safetensors.torch import load_file

from ..measured import bare_measurement, exl2_of


def document(*arguments: object, prints: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a command printed on stdout; ``prints`` are parts of stderr."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    for part in prints:
        assert part in result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    assert (parsed["bpwise_document"], parsed["command"]) == (1, arguments[0])
    return parsed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file, written by llama.cpp's own package."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "strange")
    writer.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(300)])
    writer.add_float32("strange.scale", math.nan)
    writer.add_string("general.name", "\x1b[2J\x7f")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 32), dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return tmp_path / "m.gguf"


def test_inspect_a_gguf_file(file: Path) -> None:
    found = document("inspect", file)
    assert found["tensors"] == [
        {"name": "blk.0.attn_q.weight", "shape": [4, 32], "type": "F16", "bpw": 16.0},
        {"name": "output_norm.weight", "shape": [32], "type": "F32", "bpw": 32.0},
    ]
    assert found["types"] == {"F16": 1, "F32": 1}
    assert (found["weights"], found["file_bytes"]) == (4 * 32 + 32, file.stat().st_size)
    assert found["bpw"] == pytest.approx((16 * 128 + 32 * 32) / 160, rel=1e-12)
    assert found["metadata"]["general.name"] == "\x1b[2J\x7f"
    assert found["metadata"]["strange.scale"] is None
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"values": 300}


def test_nothing_in_a_document_acts_on_a_terminal(file: Path) -> None:
    printed = CliRunner().invoke(cli, ["inspect", str(file), "--json"]).stdout
    assert all(line.isprintable() for line in printed.split("\n"))


def test_verify(file: Path) -> None:
    found = document("verify", file, prints=("architecture 'strange' is not known",))
    assert (found["quantized_tensors"], found["other_tensors"], found["compared"]) == (0, 2, False)
    assert found["broken"] is None
    assert found["bpw"] == {"all tensors": pytest.approx(19.2, rel=1e-12)}
    assert len(found["warnings"]) == 1


def test_inspect_a_checkpoint(tiny_model: Path) -> None:
    found = document("inspect", tiny_model)
    stored = load_file(tiny_model / "model.safetensors")
    assert {each["name"]: each["shape"] for each in found["tensors"]} == {
        name: list(tensor.shape) for name, tensor in stored.items()
    }
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["tensors_bytes"] == 4 * found["parameters"]
    assert found["tied_embeddings"] is False


@pytest.fixture
def measurement(tmp_path: Path) -> Path:
    """A made-up measurement of two linears, 64 x 64 and the head."""
    shapes = {"model.layers.0.mlp.up_proj": (64, 64), "lm_head": (64, 96)}
    damages = {name: np.outer([1, 2, 4, 8, 16, 32], [1.0, 0.5]) * 1e-4 for name in shapes}
    orders = {name: np.arange(64, dtype=np.int32) for name in shapes}
    curves = exl2_of({name: each.T for name, each in damages.items()}, orders, group_size=32)
    bare_measurement(shapes, {"exl2": curves}, provenance={"model": "x", "text": "y"}).save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_inspect_a_measurement(measurement: Path) -> None:
    found = document("inspect", measurement)
    first = found["linears"][0]
    assert (first["name"], first["in_features"], first["out_features"]) == ("model.layers.0.mlp.up_proj", 64, 64)
    # Both groups of 32 input channels together: 1.5 times the first's.
    assert first["damage_nats"]["exl2 8"] == pytest.approx(1.5e-4, rel=1e-6)
    assert (found["rows"], found["row_tokens"]) == (1, 4)


def test_inspect_a_calibration_set(tmp_path: Path) -> None:
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    rows = CalibrationSet(tokens=tokens, origins=("web", "web", "code"), description="text", adds_bos=False)
    rows.save(tmp_path / "rows.safetensors")
    found = document("inspect", tmp_path / "rows.safetensors")
    assert (found["rows"], found["row_tokens"]) == (3, 5)
    assert found["rows_by_kind"] == {"web": 2, "code": 1}


def test_plan_and_the_plan_that_it_saves(measurement: Path) -> None:
    (plan,) = document("plan", measurement, "--bpw", 5)["plans"]
    saved = json.loads(measurement.with_name("plan-5.json").read_text())
    assert plan["path"] == str(measurement.with_name("plan-5.json"))
    assert plan["format"] == "exl2"
    assert (
        0
        < plan["damage_nats"]
        == pytest.approx(sum(each["damage_nats"] for each in (*saved["linears"], saved["head"])), rel=1e-9)
    )
    assert 2 < plan["bpw"] <= 5
    inspected = document("inspect", plan["path"])
    assert {key: inspected[key] for key in plan if key != "path"} == {k: v for k, v in plan.items() if k != "path"}


def test_dry_run(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--bpw", "4,6", "--rows", 2, "-l", 32, "--no-eval", "--dry-run")
    found = document("quantize", tiny_model, tmp_path / "out", *options)
    small, large = found["outputs"]
    assert (small["bpw"], large["bpw"]) == (4.0, 6.0)
    assert small["output"].endswith("tiny-4.0bpw-6hb-exl2")
    # 2 blocks of 64 x (64 + 32 + 32 + 64) + 3 * 64 * 96 weights are worth 2 bits more.
    weights = 2 * (64 * 192 + 3 * 64 * 96)
    assert large["output_bytes"] - small["output_bytes"] == pytest.approx(2 * weights / 8, rel=1e-3)
    assert small["original_bytes"] == sum(t.nbytes for t in load_file(tiny_model / "model.safetensors").values())
    assert set(small["seconds"]) >= {"measure", "round"}
    assert not list(tmp_path.iterdir())


def test_a_run_has_its_report(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["quantize", "./no-model", str(tmp_path / "out"), "--bpw", "4", "--json"])
    assert result.exit_code == 2
    assert "--json has no effect without --dry-run" in result.stderr


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    say_json("x", {"a": [math.inf, np.float32(0.5), np.arange(2)], "b": ("c", None, True)})
    parsed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parsed["a"] == [None, 0.5, [0, 1]]
    assert parsed["b"] == ["c", None, True]
