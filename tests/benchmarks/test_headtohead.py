"""The comparison of GGUF files: its importance matrix, its table, and a run on a small random model."""

import importlib
import json
import pydoc_data.topics as pydoc_topics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def benchmark(load: Any) -> ModuleType:
    module: ModuleType = load("headtohead")
    return module


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_importances_are_mean_squares_of_the_inputs(load: Any, converted: Any, name: str) -> None:
    tokens = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))
    matrix = load("importance").input_mean_squares(Checkpoint.open(converted[name].directory), tokens)
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
    common = {"size_of": "Q4_K_M", "text": "code", "bpw": 4.8, "kl_error": 0.001, "kl_median_nats": 0.0}
    theirs = benchmark.Result(
        maker="llama-quantize",
        file_bytes=900,
        kl_nats=0.04,
        predicted_nats=None,
        perplexity=11.5,
        seconds=1.0,
        **common,
    )
    ours = benchmark.Result(
        maker="bpwise", file_bytes=890, kl_nats=0.01, predicted_nats=0.009, perplexity=11.2, seconds=9.0, **common
    )
    row = benchmark.table([theirs, ours]).splitlines()[-1]
    assert row.startswith("| Q4_K_M | 900 | code | 0.04000 ± 0.00100 | 11.500 | 890 | 0.01000 ± 0.00100 |")
    assert row.endswith(" | 11.200 | 0.25 | 0.00900 | 1, 9 |")


@pytest.mark.slow
def test_every_file_is_judged_once_on_every_text(benchmark: ModuleType, converted: Any, tmp_path: Path) -> None:
    text, work = tmp_path / "kind.txt", tmp_path / "work"
    text.write_text(" ".join(pydoc_topics.topics.values()))
    arguments = [str(converted["mistral"].directory), "--work-dir", str(work), "--text", f"kind={text}"]
    arguments += ["-r", "2", "-l", "32", "--eval-rows", "2", "--eval-row-tokens", "32"]
    arguments += ["--types", "Q4_K_M", "--file", f"theirs={converted['mistral'].file}"]
    first = CliRunner().invoke(benchmark.main, arguments)
    assert first.exit_code == 0, first.output
    lines = (work / "results.jsonl").read_text().splitlines()
    found = {(x["size_of"], x["maker"]): x for x in map(json.loads, lines)}
    assert len(lines) == len(found) == 4
    assert found["theirs", "theirs"]["kl_nats"] < 1e-3  # the unquantized file
    for size_of, maker in (("Q4_K_M", "llama-quantize"), ("theirs", "theirs")):
        ours = found[size_of, "bpwise"]
        assert ours["file_bytes"] <= found[size_of, maker]["file_bytes"]
        assert ours["predicted_nats"] > 0 or size_of == "theirs"  # as large as float16
    assert found["Q4_K_M", "llama-quantize"]["kl_nats"] > found["theirs", "theirs"]["kl_nats"]
    assert (work / "headtohead.png").stat().st_size > 0
    assert not list(work.glob("Q4_K_M*"))
    again = CliRunner().invoke(benchmark.main, arguments)
    assert again.exit_code == 0, again.output
    assert (work / "results.jsonl").read_text().splitlines() == lines
    other = CliRunner().invoke(benchmark.main, [*arguments, "--eval-rows", "3"])
    assert other.exit_code == 1
    assert "another evaluation" in other.output


def test_calibration_text_is_no_held_out_text(benchmark: ModuleType, converted: Any, tmp_path: Path) -> None:
    text = tmp_path / "kind.txt"
    text.write_text(" ".join(pydoc_topics.topics.values())[:3000])
    arguments = [str(converted["mistral"].directory), "--work-dir", str(tmp_path / "work"), "--types", "Q4_K_M"]
    arguments += ["--calibration", str(text), "-r", "12", "-l", "128", "--eval-rows", "12", "--eval-row-tokens", "128"]
    result = CliRunner().invoke(benchmark.main, [*arguments, "--text", f"kind={text}"])
    assert result.exit_code == 1
    assert "are in the calibration text" in result.output


@pytest.mark.parametrize("option", ["--text", "--file"])
@pytest.mark.parametrize("value", ["a", "=a.txt", "Q4_K_M=a.gguf"])
def test_names_are_needed(benchmark: ModuleType, converted: Any, tmp_path: Path, option: str, value: str) -> None:
    arguments = [str(converted["mistral"].directory), "--work-dir", str(tmp_path / "work"), option, value]
    result = CliRunner().invoke(benchmark.main, arguments)
    assert result.exit_code == 1
    assert "Expected NAME=PATH" in result.output
