import importlib.util
import json
from pathlib import Path

import click
import pytest
from bpwise.measure.text.calibration import CalibrationSet
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLE = Path(__file__).parents[2] / "examples" / "build_calibration_set.py"


@pytest.fixture
def main() -> click.Command:
    spec = importlib.util.spec_from_file_location("build_calibration_set", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    words = ["<unk>", *(f"w{number}" for number in range(50))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
    return directory


def run(main: click.Command, *arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_own_text(main: click.Command, model: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "words.txt", tmp_path / "out.safetensors"
    text.write_text(" ".join(f"w{number % 50}" for number in range(500)))
    result = run(main, model, output, "--source", text, "--rows", 4, "--row-tokens", 20)
    assert result.exit_code == 0, result.output
    calibration = CalibrationSet.load(output)
    assert calibration.tokens.shape == (4, 20)
    assert "4 rows  words.txt" in result.output
    assert calibration.fingerprint in result.output
    first = " ".join(f"w{number - 1}" for number in calibration.tokens[0].tolist())
    assert first[:60] in result.output


def test_builtin_text(main: click.Command, model: Path, tmp_path: Path) -> None:
    result = run(main, model, tmp_path / "out.safetensors", "--rows", 8, "--row-tokens", 16)
    assert result.exit_code == 0, result.output
    for kind in ("web", "python code", "random token ids"):
        assert kind in result.output


def test_multimodal_config(main: click.Command, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 51}}))
    assert run(main, model, tmp_path / "o.safetensors", "--rows", 2, "--row-tokens", 4).exit_code == 0


@pytest.mark.parametrize("config", [None, "{}"], ids=["missing", "no-vocab-size"])
def test_errors_are_messages(main: click.Command, model: Path, tmp_path: Path, config: str | None) -> None:
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_text(config)
    result = run(main, model, tmp_path / "o.safetensors", "--rows", 2, "--row-tokens", 4)
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "config.json" in result.output
    assert not (tmp_path / "o.safetensors").exists()
