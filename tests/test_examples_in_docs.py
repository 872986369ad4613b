"""The examples in docstrings of public functions and in README are run as they stand, on a tiny model."""

import doctest
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpwise
import pytest
from bpwise import (
    CalibrationConfig,
    EvalConfig,
    MeasureConfig,
    QuantizeConfig,
    Target,
    measure_model,
    quantize_model,
)
from bpwise.convert.exl2.curves import Exl2Curves

from .measured import Given, gguf_curves_of

README = Path(bpwise.__file__).parent / "README.md"
FUNCTIONS = [name for name in bpwise.__all__ if inspect.isfunction(getattr(bpwise, name))]


@pytest.fixture(scope="module")
def made(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model ``llama``, a measurement ``m.safetensors`` of it, and ``llama-6bpw``."""
    folder = tmp_path_factory.mktemp("examples")
    config = QuantizeConfig(
        target=Target(bpw=6.0),
        measure=MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=64)),
        evaluate=EvalConfig(rows=2, row_tokens=64),
    )
    model = save_model(folder / "llama")
    formats = {maker.name: Given(maker) for maker in (Exl2Curves(), *gguf_curves_of(model))}
    measure_model(model, folder / "m.safetensors", config.measure, formats=formats)
    quantize_model(model, folder / "llama-6bpw", config, measurement=folder / "m.safetensors")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def examples(name: str) -> doctest.DocTest:
    function: Any = getattr(bpwise, name)
    return doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", {}, name, None, None)


def test_public_functions_are_found() -> None:
    assert len(FUNCTIONS) == 12


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_of(name: str, here: Path) -> None:
    test = examples(name)
    assert test.examples, "a public function has an example"
    assert not any(example.options for example in test.examples), "nothing is skipped"
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 0, "".join(told)


def test_readme(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(code.replace("path/to/model", "llama"), {})
    assert "nats per token" in capsys.readouterr().out
