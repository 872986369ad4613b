"""Calibration rows in a file: what they have to have been made from to be taken again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.measure import calibrated
from bpwise.measure.calibrated import kept_rows, load_or_make_rows
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.mixture import SELF
from safetensors.torch import load_file, save_file

CONFIG = CalibrationConfig(source="text=2,built-in,self", rows=8, row_tokens=16)


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and text beside it in a folder that sources are named from."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for name in ("one", "two"):
        Path("text", f"{name}.txt").write_text(" ".join(f"{name} {number}" for number in range(200)))
    return make_model("model")


@pytest.fixture
def kept(model: Path, tmp_path: Path) -> Path:
    load_or_make_rows(open_model(model), CONFIG, tmp_path / "rows.safetensors", device="cpu")
    return tmp_path / "rows.safetensors"


def test_rows_come_back_as_they_were_made(model: Path, kept: Path) -> None:
    rows = kept_rows(open_model(model), CONFIG, kept, device="cpu")
    assert rows is not None
    made = calibrated.calibration_rows(open_model(model), CONFIG, device="cpu")
    assert torch.equal(rows.tokens, made.tokens)
    assert (rows.fingerprint, rows.description, rows.vocabulary) == (
        made.fingerprint,
        made.description,
        made.vocabulary,
    )


def no_change(_model: Path) -> None:
    pass


def other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def other_tokenizer(model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "clean_up_tokenization_spaces": True}))


def chat_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_text(_model: Path) -> None:
    Path("text", "two.txt").write_text(Path("text", "two.txt").read_text().replace("7", "8"))


def less_text(_model: Path) -> None:
    Path("text", "two.txt").unlink()


def no_text(_model: Path) -> None:
    for name in ("one", "two"):
        Path("text", f"{name}.txt").unlink()
    Path("text").rmdir()


CHANGES = (other_weights, other_config, other_tokenizer, chat_template, other_text, less_text, no_text)


@pytest.mark.parametrize("change", [no_change, *CHANGES], ids=lambda change: change.__name__)
def test_what_rows_are_made_from(model: Path, kept: Path, change: Callable[[Path], None]) -> None:
    change(model)
    assert (kept_rows(open_model(model), CONFIG, kept, device="cpu") is None) == (change is not no_change)


@pytest.mark.parametrize("options", [{"seed": 1}, {"rows": 9}, {"row_tokens": 17}, {"source": "text,built-in,self"}])
def test_other_options_make_other_rows(
    model: Path, kept: Path, options: dict[str, int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, **options)
    assert kept_rows(open_model(model), config, kept, device="cpu") is None
    made = load_or_make_rows(open_model(model), config, kept, device="cpu")
    assert made.tokens.shape == (config.rows, config.row_tokens)
    monkeypatch.setattr(calibrated, "calibration_rows", lambda *_, **__: pytest.fail("were made again"))
    again = load_or_make_rows(open_model(model), config, kept, device="cpu")
    assert again.fingerprint == made.fingerprint


def test_the_default_length_is_the_length_that_it_stands_for(make_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_model(make_model("model"))  # 128 positions
    load_or_make_rows(checkpoint, CalibrationConfig(rows=2), tmp_path / "rows.safetensors")
    assert kept_rows(checkpoint, CalibrationConfig(rows=2, row_tokens=128), tmp_path / "rows.safetensors") is not None


def test_rows_that_are_given_are_not_taken_for_those_of_an_option(model: Path, tmp_path: Path) -> None:
    given = replace(calibrated.calibration_rows(open_model(model), CONFIG, device="cpu"), description="given")
    path = tmp_path / "rows.safetensors"
    assert load_or_make_rows(open_model(model), CONFIG, path, given=given) is given
    assert CalibrationSet.load(path).description == "given"
    assert kept_rows(open_model(model), CONFIG, path, device="cpu") is None


@pytest.mark.parametrize(("source", "none"), [(SELF, True), ("built-in", False)])
def test_the_device_matters_where_the_model_writes(
    model: Path, tmp_path: Path, source: str, none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CalibrationConfig(source=source, rows=2, row_tokens=16)
    load_or_make_rows(open_model(model), config, tmp_path / "rows.safetensors", device="cpu")
    monkeypatch.setattr(calibrated, "resolve_device", lambda _name: torch.device("meta"))
    assert (kept_rows(open_model(model), config, tmp_path / "rows.safetensors", device="cpu") is None) == none
