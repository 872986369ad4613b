import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.errors import ConfigError
from bpwise.eval.tasks import needle as needle_module
from bpwise.eval.tasks.needle import DEPTHS, NeedleConfig, evaluate_needle, needle_prompts
from bpwise.measure.text.calibration import CalibrationConfig, build_calibration
from bpwise.measure.text.tokenizer import load_tokenizer
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

MakeModel = Callable[..., Path]
LINE = "a line of text\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINE * 400)
    return path


@pytest.fixture
def models(make_model: MakeModel) -> list[Path]:
    return [make_model("original"), make_model("quantized", noise=0.02)]


def config(text: Path, **changes: Any) -> NeedleConfig:
    return NeedleConfig(**{"lengths": (120, 128), "samples": 2, "text": str(text), "device": "cpu", **changes})


def prompts_of(directory: Path, text: Path, length: int) -> Any:
    tokenizer = load_tokenizer(directory)
    rows = build_calibration(
        tokenizer,
        CalibrationConfig(source=str(text), rows=2, row_tokens=length),
        vocab_size=264,
        part="evaluation",
    )
    return needle_prompts(tokenizer, rows, seed=0)


def test_prompts_are_what_they_say(models: list[Path], text: Path) -> None:
    tokenizer = load_tokenizer(models[0])
    made = prompts_of(models[0], text, 128)
    assert made.tokens.shape == (2 * len(DEPTHS), 128)
    numbers = []
    for index, (row, answer) in enumerate(zip(made.tokens, made.answer_tokens, strict=True)):
        assert int(row[0]) == tokenizer.bos_token_id
        prompt = tokenizer.decode(row[1:].tolist())
        body, _, ending = prompt.rpartition("\nThe secret number of ")
        place, _, number = ending.partition(" is ")
        assert tokenizer.decode(row[-answer:].tolist()) == f" {number}"
        assert number.isdecimal()
        assert len(number) == 7
        before, needle, after = body.partition(f"\nThe secret number of {place} is {number}.\n")
        assert needle
        assert before + after in LINE * 20
        depth = DEPTHS[index % len(DEPTHS)]
        share = len(before) / len(before + after)
        # At most a line before its depth, at the end of one if there is one; at the end of the text anyhow.
        assert share <= depth + 1e-9
        assert depth - share < len(LINE) / len(before + after)
        if depth < 1:
            assert "\n" not in before or before.endswith("\n")
        numbers.append(number)
    assert len(set(numbers)) == 2


@pytest.mark.parametrize("pass_tokens", [65536, 300], ids=["one-pass", "several-passes"])
def test_agrees_with_transformers(
    models: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr(needle_module, "_PASS_TOKENS", pass_tokens)
    report = evaluate_needle(models[0], models[1:], config(text))
    assert [model.name for model in report.models] == ["original", "quantized"]
    nats = {}
    for directory, model in zip(models, report.models, strict=True):
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        cells = {(cell.length, cell.depth): cell for cell in model.cells}
        assert len(cells) == 2 * len(DEPTHS)
        for length in (120, 128):
            made = prompts_of(models[0], text, length)
            with torch.no_grad():
                logs = whole(made.tokens).logits.double().log_softmax(-1)
            values = torch.zeros(len(made.tokens), dtype=torch.float64)
            for row, answer in enumerate(made.answer_tokens):
                for position in range(length - answer, length):
                    values[row] -= logs[row, position - 1, made.tokens[row, position]]
            nats[model.name, length] = values.view(2, len(DEPTHS))
            for column, depth in enumerate(DEPTHS):
                expected = float(nats[model.name, length][:, column].mean())
                assert cells[length, depth].nats == pytest.approx(expected, rel=1e-4)
                assert cells[length, depth].found == 0  # a random model guesses no number
    first, last = report.models[1].lengths
    for each in (first, last):
        change = (nats["quantized", each.length] - nats["original", each.length]).mean(dim=1)
        assert each.nats_change is not None
        assert each.nats_change.value == pytest.approx(float(change.mean()), rel=1e-3)
        assert each.nats_change.standard_error == pytest.approx(float(change.std()) / math.sqrt(2), rel=1e-2)
    assert report.models[0].lengths[0].nats_change is None


def test_what_is_found_is_found(models: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model that repeats the numbers' tokens at half of the prompts: the score is the share of whole numbers.
    original = needle_module.StreamedModel

    class Knowing(original):
        calls = 0

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            made = prompts_of(models[0], text, 128)
            row = Knowing.calls % len(made.tokens)
            Knowing.calls += 1
            answer = made.answer_tokens[row]
            assert hidden.shape[:2] == (1, answer)
            ids = made.tokens[row, -answer:].clone()
            if row % 2:
                ids[-1] = 0  # all but the last digit does not count
            return torch.nn.functional.one_hot(ids, 264)[None].float()

    monkeypatch.setattr(needle_module, "StreamedModel", Knowing)
    report = evaluate_needle(models[0], [], config(text, lengths=(128,)))
    assert [cell.found for cell in report.models[0].cells] == [0.5] * len(DEPTHS)
    assert report.models[0].lengths[0].found.value == 0.5


def test_longer_than_the_context(models: list[Path], text: Path) -> None:
    with pytest.raises(ConfigError, match="length 129, but original has positions for 128"):
        evaluate_needle(models[0], models[1:], config(text, lengths=(64, 129)))


def test_too_short(models: list[Path], text: Path) -> None:
    with pytest.raises(ConfigError, match=r"80 tokens are too few .* Expected at least"):
        evaluate_needle(models[0], models[1:], config(text, lengths=(80,)))


@pytest.mark.parametrize("length", [80, 129], ids=["too-short", "too-long"])
def test_the_command_refuses_them_before_it_compares(
    length: int, models: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpwise.eval.comparison.evaluate_each", lambda *_, **__: pytest.fail("was compared"))
    run = CliRunner().invoke(cli, ["eval", *map(str, models), "--text", str(text), "--needle", str(length)])
    assert run.exit_code == 1
    assert "needle: " in run.stderr


@pytest.mark.parametrize(
    "changes",
    [{"lengths": ()}, {"lengths": (0,)}, {"samples": 0}, {"dtype": "int8"}],
    ids=lambda each: next(iter(each)),
)
def test_config(text: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(text, **changes)


def test_command(models: list[Path], text: Path, tmp_path: Path) -> None:
    options = ["--text", text, "--rows", 2, "--row-tokens", 60, "--device", "cpu", "-o", tmp_path / "report", "--png"]
    asked = ["--needle", "120,128", "--needle-samples", 1]
    run = CliRunner().invoke(cli, ["eval", *map(str, [*models, *options, *asked])])
    assert run.exit_code == 0, run.output
    folder = tmp_path / "report"
    content = json.loads((folder / "report.json").read_text())["needle"]
    assert [model["name"] for model in content["models"]] == ["original", "quantized"]
    assert re.search(r"^quantized +128 +0\.00", run.stdout, flags=re.MULTILINE)
    assert "## Needle in a haystack" in (folder / "report.md").read_text()
    assert "Needles found — quantized" in (folder / "report.html").read_text()
    assert len((folder / "report.needle.csv").read_text().splitlines()) == 1 + 2 * 2 * len(DEPTHS)
    images = sorted((folder / "report-plots").iterdir())
    assert {"needle-0.png", "needle-1.png", "drift.png"} < {path.name for path in images}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


@pytest.mark.parametrize("value", ["x", "1k,,2k", "0", "4m", "-1"])
def test_command_refuses(models: list[Path], value: str) -> None:
    run = CliRunner().invoke(cli, ["eval", *map(str, models), f"--needle={value}"])
    assert run.exit_code == 2
    assert "is not a valid list of lengths. Use 1k,4k,16k" in run.output
