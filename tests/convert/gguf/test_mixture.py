"""Whole runs to one of llama.cpp's fixed mixtures."""

from pathlib import Path
from typing import Any

import pytest
from bpwise.cli import cli
from bpwise.convert.gguf import base as gguf_base
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.options import GgufOptions
from bpwise.errors import CalibrationError, FormatError
from bpwise.eval.comparison import EvalConfig
from bpwise.quantize import judge
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from click.testing import CliRunner

from ...quantize.runs import arguments

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")


def test_from_the_command_line(converted: Any, tmp_path: Path) -> None:
    command = [
        "quantize",
        str(converted["qwen2"].directory),
        str(tmp_path / "x.gguf"),
        "--type",
        "q8_0",
        "--no-eval",
    ]
    run = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "; all tensors 8." in run.output
    assert read_gguf_header(tmp_path / "x.gguf").metadata["general.file_type"] == 7
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "x.recipe.yaml", "x.gguf.work"}
    assert [path.name for path in (tmp_path / "x.gguf.work").iterdir()] == ["finished.json"]


def test_text_that_it_cannot_be_evaluated_on_is_refused_before_it_is_made(
    converted: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "load_tokenizer", lambda _: byte_tokenizer)  # the model's own needs more packages
    monkeypatch.setattr(gguf_base, "make_base", lambda *_, **__: pytest.fail("was converted"))
    text = tmp_path / "short.txt"
    text.write_text("short")
    config = QuantizeConfig(options=GgufOptions(mixture="Q8_0"), evaluate=EvalConfig(text=str(text), device="cpu"))
    with pytest.raises(CalibrationError):
        quantize_model(converted["mistral"].directory, tmp_path / "x.gguf", **arguments(config))


def test_it_is_evaluated_and_has_a_card(
    converted: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "load_tokenizer", lambda _: byte_tokenizer)  # the model's own needs more packages
    model = converted["mistral"]
    config = QuantizeConfig(
        options=GgufOptions(mixture="Q8_0", base=model.file, card=True),
        evaluate=EvalConfig(rows=2, row_tokens=32, device="cpu"),
    )
    result = quantize_model(model.directory, tmp_path / "x.gguf", **arguments(config))
    assert result.measurement is None
    assert result.comparison is not None
    assert (tmp_path / "x.report.json").is_file()
    assert "quantized to a GGUF file with bpwise" in (tmp_path / "x.README.md").read_text()


def test_importances_that_cannot_be_read_are_refused_before_it_is_made(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_base, "make_base", lambda *_, **__: pytest.fail("was converted"))
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(b"no matrix")
    config = QuantizeConfig(options=GgufOptions(mixture="Q4_K_M", imatrix=matrix), evaluate=None)
    with pytest.raises(FormatError):
        quantize_model(converted["mistral"].directory, tmp_path / "x.gguf", **arguments(config))
