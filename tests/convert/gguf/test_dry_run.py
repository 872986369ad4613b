"""Dry runs of GGUF files tell sizes from headers: the converter is neither run nor fetched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bpwise.cli import cli
from bpwise.convert.gguf import base, conversion
from bpwise.convert.gguf.llama_cpp import fetch
from click.testing import CliRunner

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")


@pytest.fixture
def model(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two blocks whose rows are whole blocks of 256 weights; whatever converts fails the test."""
    for module, name in ((base, "make_base"), (conversion, "find_converter"), (fetch, "fetched_converter")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the converter was asked for"))
    return make_model("m", hidden_size=256, intermediate_size=512)


def outputs(model: Path, *options: object) -> list[dict[str, Any]]:
    line = ["quantize", model, model.with_name("x.gguf"), *options, "--no-eval", "--dry-run", "--json"]
    result = CliRunner().invoke(cli, list(map(str, line)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["outputs"]
    return found


NORMS_BYTES = 4 * 5 * 256
WEIGHTS = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512) + 2 * 264 * 256


@pytest.mark.parametrize(
    ("mixture", "six_bits"),
    [
        # llama.cpp's rules: the head, and in the last of two blocks values and down projection, have 6 bits.
        pytest.param("Q4_K_M", 264 * 256 + 128 * 256 + 256 * 512, id="Q4_K_M"),
        pytest.param("Q4_0", 264 * 256, id="Q4_0"),  # the head alone
    ],
)
def test_a_mixture_of_several_types(model: Path, mixture: str, six_bits: int) -> None:
    (found,) = outputs(model, "--type", mixture)
    # 4 bits take 18 bytes for 32 weights (144 for 256), 6 bits 210 for 256.
    assert found["output_bytes"] == (WEIGHTS - six_bits) * 18 // 32 + six_bits * 210 // 256 + NORMS_BYTES
    assert found["bpw"] == pytest.approx(8 * found["output_bytes"] / (WEIGHTS + 5 * 256), rel=1e-12)
    assert found["facts"] == []


def test_a_size_of_ones_own(model: Path) -> None:
    (found,) = outputs(model, "--bpw", "4.5")
    assert found["output_bytes"] == pytest.approx(4.5 / 8 * (WEIGHTS + 5 * 256), rel=1e-3)
    assert found["lowest_bpw"] < 2.5


def test_names_that_are_not_known_leave_an_estimate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.convert.gguf.mixture.gguf_name", lambda _name: None)
    (found,) = outputs(model, "--type", "Q4_K_M")
    assert found["facts"] == ["roughly: all types show once the model is converted"]
    assert found["output_bytes"] == pytest.approx(4.5 / 8 * WEIGHTS, rel=0.01)
