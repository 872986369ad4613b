"""Rows of a saved calibration set meet a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.cli import cli
from bpwise.errors import CalibrationError, ConfigError
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

MakeModel = Callable[..., Path]
CONFIG = CalibrationConfig(rows=2, row_tokens=32)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_given_rows_of_the_same_tokenizer_are_taken(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = open_model(make_model("m"))
    rows = calibration_rows(checkpoint, CONFIG)
    rows.save(tmp_path / "rows.safetensors")
    saved = CalibrationSet.load(tmp_path / "rows.safetensors")
    assert saved.vocabulary is not None
    assert calibration_rows(checkpoint, CONFIG, given=saved) is saved


def test_given_rows_of_another_tokenizer_are_refused(make_model: MakeModel) -> None:
    rows = calibration_rows(open_model(make_model("m")), CONFIG)
    other = make_model("other")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(258)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(other)
    with pytest.raises(CalibrationError, match="made with another tokenizer"):
        calibration_rows(open_model(other), CONFIG, given=rows)


@pytest.mark.parametrize("command", ["measure", "quantize"])
def test_given_rows_beyond_the_vocabulary_are_refused(make_model: MakeModel, tmp_path: Path, command: str) -> None:
    rows = CalibrationSet(tokens=torch.arange(250, 282).view(1, -1), origins=("a",), description="", adds_bos=False)
    rows.save(tmp_path / "rows.safetensors")
    options = ("-o", tmp_path / "out") if command == "measure" else (tmp_path / "out", "--bpw", 4.5, "--no-eval")
    refused = run(command, make_model("m"), *options, "-c", tmp_path / "rows.safetensors")
    assert refused.exit_code == 1
    assert "Got token id 281. Expected ids below the vocabulary size 264" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_given_rows_longer_than_the_context_are_refused(make_model: MakeModel) -> None:
    checkpoint = open_model(make_model("m", max_position_embeddings=32))
    rows = CalibrationSet(tokens=torch.zeros(1, 33, dtype=torch.int64), origins=("a",), description="", adds_bos=False)
    with pytest.raises(ConfigError, match=r"rows of 33 tokens, .* positions for 32\. Ask for shorter rows"):
        calibration_rows(checkpoint, CONFIG, given=rows)


def test_text_with_a_token_beyond_the_embedding(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("m", vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(directory)
    text = tmp_path / "t.txt"
    text.write_text("An <|im_start|> among words. " * 40)
    refused = run("measure", directory, "-o", tmp_path / "out", "-r", 2, "-l", 32, "-c", text)
    lines = refused.stderr.splitlines()
    (warned,), error = [line for line in lines if line.startswith("warning ")], lines[-1]
    assert "'<|im_start|>' (258)" in warned
    assert error.startswith("Error: tokenizer: its ids do not fit the model. Got token id 258")
    assert "the token '<|im_start|>'" in error
