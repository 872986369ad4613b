"""What readers compute otherwise is refused, or said: before long work, in the result, and in the card, once each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.run import quantize_model
from click.testing import CliRunner
from transformers import MistralConfig

from .runs import arguments, bpwise, gguf

OPTIONS = ("--rows", "2", "--row-tokens", "32", "--device", "cpu", "--no-eval")
WINDOW = "sliding_window 48: every token sees all before it. Rows of more than 48 tokens differ from the original."


@pytest.fixture
def windowed(save_model: Any, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", kind=MistralConfig, sliding_window=48)


@pytest.fixture
def relu(save_model: Any, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", hidden_act="relu")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    for place in ("quantize.output.load_or_measure", "quantize.series.load_or_measure", "convert.gguf.base.make_base"):
        monkeypatch.setattr(f"bpwise.{place}", measured)


def test_a_window_is_said_three_times(windowed: Path, tmp_path: Path) -> None:
    result = bpwise("quantize", windowed, tmp_path / "out", "--bpw", "4.5", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    said = f"warning     EXL2 readers leave out {WINDOW}\n"
    assert (result.stderr.count(said), result.stdout.count(said)) == (1, 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n## Limits\n\n- EXL2 readers leave out {WINDOW}\n\n## How to load it\n" in card
    assert card.count(WINDOW) == 1
    # The card needs neither the original nor a report.
    (tmp_path / "out" / "README.md").unlink()
    assert bpwise("card", tmp_path / "out").exit_code == 0
    assert WINDOW in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("options", [("--bpw", "4.5"), ("--bpw", "4.5,6"), ("--bpw", "4.5", "--dry-run")])
def test_it_is_said_before_long_work(options: tuple[str, ...], windowed: Path, tmp_path: Path) -> None:
    command = ("quantize", windowed, tmp_path / "out", *options, *OPTIONS)
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.stderr.count(WINDOW) == 1
    assert str(result.exception) == ("None" if "--dry-run" in options else "measured")


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("target", ["out", "out.gguf"])
@pytest.mark.parametrize("options", [("--bpw", "4.5"), ("--bpw", "4.5,6")], ids=["one", "series"])
def test_another_model_is_refused_before_long_work(
    target: str, options: tuple[str, ...], relu: Path, tmp_path: Path
) -> None:
    series_of_files = ("--format", "gguf") if target.endswith("gguf") and "," in options[1] else ()
    output = tmp_path / ("out" if series_of_files else target)
    result = bpwise("quantize", relu, output, *options, *series_of_files, *OPTIONS)
    assert result.exit_code == 1
    assert "config.json: hidden_act is 'relu', but " in result.stderr
    assert not output.exists()


@pytest.mark.usefixtures("no_long_work")
def test_another_model_is_no_mixture_either(relu: Path, tmp_path: Path) -> None:
    result = bpwise("quantize", relu, tmp_path / "out.gguf", "--type", "Q8_0", "--no-eval")
    assert result.exit_code == 1
    assert "hidden_act is 'relu', but llama.cpp takes it for 'silu'" in result.stderr


def test_a_forced_model_carries_it_in_its_card(relu: Path, tmp_path: Path) -> None:
    result = bpwise("quantize", relu, tmp_path / "out", "--bpw", "4.5", "--force", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    sentence = "hidden_act is 'relu', but EXL2 readers take it for 'silu'. Rows of any length differ from the original."
    assert f"## Limits\n\n- {sentence}\n" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "relu"


def test_a_gguf_file_carries_it(converted: Any, tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model = tmp_path / "model"
    shutil.copytree(converted["mistral"].directory, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 48}))
    tokens = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(1))
    rows = CalibrationSet(tokens=tokens, origins=("random",) * 4, description="random ids", adds_bos=False)
    # The base is what the converter makes of either config: it drops the window.
    settings = gguf(8.5, feedback=False, card=True, base=converted["mistral"].file)
    result = quantize_model(model, tmp_path / "out.gguf", **arguments(settings), calibration=rows)
    sentence = f"llama.cpp's converter leaves out {WINDOW}"
    assert result.warnings[0] == sentence
    assert "\n".join(result.summary_lines()).count(sentence) == 1
    assert read_gguf_header(result.output).metadata["bpwise.limits"] == sentence
    assert (tmp_path / "out.README.md").read_text().count(f"## Limits\n\n- {sentence}\n") == 1


def test_a_mixture_says_it_twice(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model, base = tmp_path / "model", converted["mistral"].file
    shutil.copytree(converted["mistral"].directory, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 48}))
    monkeypatch.setattr("bpwise.convert.gguf.base.make_base", lambda _, output, **__: shutil.copyfile(base, output))
    monkeypatch.setattr("bpwise.convert.gguf.base.check_base", lambda *_: ["The converter left something out."])
    result = bpwise("quantize", model, tmp_path / "out.gguf", "--type", "Q8_0", "--no-eval")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count(WINDOW) == 1
    assert result.stdout.count(WINDOW) == 1
    assert result.stdout.count("warning     The converter left something out.\n") == 1
