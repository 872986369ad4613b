"""Gains by number of blocks rounded and by width: what is rounded, the table, and a run on a small random model."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.views import SourceView
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.eval.comparison import EvalConfig, evaluation_rows
from bpwise.measure.text.tokenizer import load_tokenizer
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("depth_and_width")


@pytest.mark.parametrize(
    ("blocks", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (30, [1, 2, 4, 8, 16, 30]), (4, [1, 2, 4])]
)
def test_depths_are_doubled(benchmark: ModuleType, blocks: int, expected: list[int]) -> None:
    assert benchmark.depths(blocks) == expected


def test_table_has_a_row_where_all_makers_are_done(benchmark: ModuleType) -> None:
    def results(channels: int, blocks: int, *kl: float) -> list[Any]:
        makers = (benchmark.OURS, benchmark.ENCODER, benchmark.LLAMA_QUANTIZE)
        common = {"channels": channels, "blocks": blocks, "kl_error": 0.001, "bpw": 4.5}
        return [
            benchmark.Result(maker=maker, kl_nats=each, predicted_nats=None if maker == makers[2] else 0.02, **common)
            for maker, each in zip(makers, kl, strict=False)
        ]

    rows = benchmark.table(
        [*results(64, 2, 0.03, 0.06, 0.04), *results(64, 4, 0.1, 0.2), *results(32, 2, 0.01, 0.04, 0.02)]
    ).splitlines()[2:]
    assert rows == [
        "| 32 | 2 | 4.500 | 0.01000 ± 0.00100 | 0.02000 | 0.50 | 0.04000 ± 0.00100 | 0.25 | 4.500 | "
        "0.02000 ± 0.00100 | 0.50 |",
        "| 64 | 2 | 4.500 | 0.03000 ± 0.00100 | 0.02000 | 1.50 | 0.06000 ± 0.00100 | 0.50 | 4.500 | "
        "0.04000 ± 0.00100 | 0.75 |",
    ]


def test_the_first_blocks_are_the_quantized_models(benchmark: ModuleType, converted: Any) -> None:
    class Zeros(SourceView):
        def tensor(self, name: str) -> torch.Tensor:
            return torch.zeros(self.shape(name))

    original = open_model(converted["mistral"].directory)
    view = benchmark.FirstBlocks(original, Zeros(original), 1)
    zero = {name for name in view.names if not view.tensor(name).any()}
    assert zero == {name for name in original.names if name.startswith("model.layers.0.")}
    assert len(zero) == 9


@pytest.mark.slow
def test_a_run_on_a_small_model(benchmark: ModuleType, converted: Any, tmp_path: Path) -> None:
    directory, work = converted["mistral"].directory, tmp_path / "work"
    arguments = [str(directory), "--work-dir", str(work), "-r", "2", "-l", "32", "--eval-rows", "2"]
    arguments += ["--eval-row-tokens", "32", "--widths", "32", "--device", "cpu"]
    first = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert len(first.stdout[first.stdout.index("| channels") :].splitlines()) == 2 + 4
    files = [work / name / "results.jsonl" for name in ("whole", "32")]
    results = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    found = {(each["channels"], each["maker"], each["blocks"]): each for each in results}
    makers = (benchmark.OURS, benchmark.ENCODER, benchmark.LLAMA_QUANTIZE)
    assert set(found) == {(width, maker, blocks) for width in (64, 32) for maker in makers for blocks in (1, 2)}

    # KL by hand, in float64: Transformers' own model with the blocks' weights replaced by those of the file.
    checkpoint = open_model(directory)
    rows = evaluation_rows(load_tokenizer(directory), EvalConfig(rows=2, row_tokens=32), vocab_size=320).tokens
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    model.requires_grad_(requires_grad=False)
    before = model(input_ids=rows).logits[:, :-1].log_softmax(dim=-1)
    quantized = GgufModel.open(work / "whole" / "bpwise.gguf").beside(checkpoint)
    for blocks in (1, 2):
        for name, weight in model.named_parameters():
            if name.startswith(f"model.layers.{blocks - 1}."):
                weight.copy_(quantized.tensor(name))
        after = model(input_ids=rows).logits[:, :-1].log_softmax(dim=-1)
        kl = (before.exp() * (before - after)).sum(dim=-1).mean()
        ours = found[64, benchmark.OURS, blocks]
        # The benchmark runs in float32.
        assert ours["kl_nats"] == pytest.approx(float(kl), rel=1e-3)
        assert 0 < ours["predicted_nats"] == found[64, benchmark.ENCODER, blocks]["predicted_nats"]
        assert ours["bpw"] == found[64, benchmark.ENCODER, blocks]["bpw"]
    for width in (64, 32):
        ours, theirs = (found[width, maker, 2]["bpw"] for maker in (benchmark.OURS, benchmark.LLAMA_QUANTIZE))
        assert 0.9 * theirs < ours <= theirs + 0.02  # metadata are of other lengths
        assert found[width, benchmark.OURS, 1]["predicted_nats"] < found[width, benchmark.OURS, 2]["predicted_nats"]

    again = CliRunner().invoke(benchmark.main, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-6:] == first.stdout.splitlines()[-6:]
    assert sum(len(path.read_text().splitlines()) for path in files) == 12
    other = CliRunner().invoke(benchmark.main, [*arguments, "--eval-rows", "3"])
    assert "another evaluation" in other.output
