import importlib.util
import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluate.py"


@pytest.fixture
def main() -> click.Command:
    spec = importlib.util.spec_from_file_location("evaluate_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    """An original and two copies, ever more perturbed, and a text for them."""
    words = ["<unk>", *(f"w{number}" for number in range(50))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=51, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    rng = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("original", "near", "far"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "words.txt").write_text(" ".join(f"w{number * 7 % 50}" for number in range(500)))
    return [tmp_path / name for name in ("original", "near", "far", "words.txt")]


def run(main: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_prints_a_table_and_writes_reports(main: click.Command, directories: list[Path], tmp_path: Path) -> None:
    *models_, text = directories
    options = ("--text", text, "--rows", 4, "--row-tokens", 20, "--device", "cpu", "--report", tmp_path / "reports")
    result = run(main, *models_, *options)
    assert result.exit_code == 0, result.output
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [line[0].split(" (")[0] for line in lines] == ["model", "---", "original", "near", "far"]
    divergences = [
        json.loads((tmp_path / "reports" / number / "report.json").read_text())["comparison"]["summary"]["kl_nats"]
        for number in ("1", "2")
    ]
    together = json.loads((tmp_path / "reports" / "report.json").read_text())
    assert [each["summary"]["kl_nats"] for each in together["comparisons"]] == divergences
    assert (tmp_path / "reports" / "report-plots" / "size.svg").is_file()
    assert 0 < divergences[0]["value"] < divergences[1]["value"]
    assert float(lines[3][1].split(" ± ")[0]) == pytest.approx(divergences[0]["value"], rel=0.01)
    assert "4 rows" in result.stdout


def test_errors_are_messages(main: click.Command, directories: list[Path], tmp_path: Path) -> None:
    result = run(main, directories[0], tmp_path / "absent", "--device", "cpu")
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "absent" in result.output
