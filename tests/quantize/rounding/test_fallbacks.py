"""Linears that no damping helps: in words wherever a run tells of them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.options import GgufOptions
from bpwise.eval.comparison import EvalConfig
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize import judge
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.rounding.fallbacks import fallback_entries, fallback_lines
from bpwise.quantize.run import quantize_model
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ..runs import arguments

DOWN = "model.layers.0.mlp.down_proj"
WORDS = "rounded without error feedback"
FOUND = {"a.q_proj": 5.0, "b.down_proj": math.inf}


def test_numbers_and_words() -> None:
    assert fallback_lines(FOUND) == [
        "fallback    a.q_proj: damping raised to 5",
        "fallback    b.down_proj: rounded without error feedback",
    ]
    entries = fallback_entries(FOUND)
    assert entries == {"damping of a.q_proj": 5.0, "damping of b.down_proj": WORDS}
    json.dumps(entries, allow_nan=False)


def test_exl2_reports_a_linear_without_input(save_model: Any, tmp_path: Path) -> None:
    def kill(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.zero_()

    model, output = save_model(tmp_path / "model", change=kill), tmp_path / "out"
    command = ["quantize", model, output, "--bpw", 4.5, "-r", 4, "-l", 32, "--eval-rows", 2, "--eval-row-tokens", 32]
    run = CliRunner().invoke(cli, [*map(str, command), "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert f"fallback    {DOWN}: {WORDS}" in run.output
    report = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["details"]["Plan"][f"damping of {DOWN}"] == WORDS
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert WORDS in text, name
        assert "inf</td>" not in text and "| inf" not in text, name
    assert (output / "README.md").exists()


def test_gguf_reports_it_and_keeps_to_types_that_fit(
    converted: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    monkeypatch.setattr(judge, "load_tokenizer", lambda _: byte_tokenizer)  # the model's own needs more packages
    # Nothing enters one down projection, and the other is zero, which drift correction moves. Widths of 64 and 96 fit
    # no block of 256.
    zero = {"model.layers.0.mlp.up_proj": "blk.0.ffn_up", "model.layers.1.mlp.down_proj": "blk.1.ffn_down"}
    model, base = tmp_path / "model", tmp_path / "base.gguf"
    shutil.copytree(converted["mistral"].directory, model)
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.zero_() if name.removesuffix(".weight") in zero else tensor for name, tensor in tensors.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    shutil.copyfile(converted["mistral"].file, base)
    header = read_gguf_header(base)
    with base.open("r+b") as file:
        for name in zero.values():
            tensor = header.tensors[f"{name}.weight"]
            file.seek(tensor.offset_bytes)
            file.write(bytes(tensor.size_bytes))
    ids = torch.randint(0, 320, (12, 32), generator=torch.Generator().manual_seed(1))
    rows = CalibrationSet(tokens=ids, origins=("random",) * 12, description="random ids", adds_bos=False)
    config = QuantizeConfig(
        target=Target(bpw=5.5),
        options=GgufOptions(base=base),
        evaluate=EvalConfig(rows=2, row_tokens=32, device="cpu"),
    )
    result = quantize_model(model, tmp_path / "out.gguf", **arguments(config), calibration=rows)
    assert {tensor.kind.block_weights for tensor in result.plan.tensors} <= {1, 32}
    assert result.fallbacks == {DOWN: math.inf}
    assert f"fallback    {DOWN}: {WORDS}" in result.summary_lines()
    report = json.loads((tmp_path / "out.report.json").read_text(), parse_constant=pytest.fail)
    assert report["details"]["Plan"][f"damping of {DOWN}"] == WORDS
