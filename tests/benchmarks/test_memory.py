"""The memory benchmark: the checkpoints that it makes, and a run on the tiny preset."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.measure.text.tokenizer import load_tokenizer
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("memory")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_checkpoints_are_what_transformers_expects(memory: ModuleType, tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig.from_dict({**memory.PRESETS["tiny"].to_dict(), "tie_word_embeddings": tied})
    parameters = memory.write_checkpoint(tmp_path / "m", config, seed=0)
    checkpoint = Checkpoint.open(tmp_path / "m")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert {name: checkpoint.shape(name) for name in checkpoint.names} == expected
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.total_bytes == 2 * parameters
    weight = checkpoint.tensor("model.layers.1.mlp.up_proj.weight").float()
    # 10240 weights: the standard deviation is known to 0.7 %.
    assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
    assert len(load_tokenizer(tmp_path / "m")("bits").get("input_ids", [])) == 4


@pytest.mark.parametrize(
    ("preset", "billions"), [("llama-3.2-1b", 1.236), ("llama-3-8b", 8.030)], ids=["llama-3.2-1b", "llama-3-8b"]
)
def test_presets_have_the_published_number_of_parameters(memory: ModuleType, preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(memory.PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.slow
def test_a_run_prints_peak_and_forecast(memory: ModuleType, tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--rows", "2", "--row-tokens", "64", "--work-dir", str(tmp_path)]
    result = CliRunner().invoke(memory.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    cells = result.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["tiny-2-layers-seed-0", "2 x 64", "cpu"]
    peak, forecast, seconds = map(float, cells[3:])
    # Python with PyTorch and Transformers takes 200 MiB and more; the tiny model adds next to nothing.
    assert 100 < peak < forecast < 5000
    assert 0 < seconds < 600
