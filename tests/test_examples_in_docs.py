"""The Python examples of docstrings, README, docs and the notebook are run as they stand, on a tiny model."""

import doctest
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpwise
import pytest
import torch
from bpwise import CalibrationConfig, EvalConfig, MeasureConfig, quantize_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.measure.run import measure_to_file
from safetensors.torch import save_file

from .measured import Given, gguf_curves_of

ROOT = Path(bpwise.__file__).parent
FUNCTIONS = [name for name in bpwise.__all__ if inspect.isfunction(getattr(bpwise, name))]


@pytest.fixture(scope="module")
def made(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model ``llama``, a measurement ``m.safetensors`` of it, and ``llama-6bpw``."""
    folder = tmp_path_factory.mktemp("examples")
    measure = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=64))
    model = save_model(folder / "llama")
    formats = {maker.name: Given(maker) for maker in (Exl2Curves(), *gguf_curves_of(model))}
    measure_to_file(model, folder / "m.safetensors", measure, formats=formats)
    evaluate = EvalConfig(rows=2, row_tokens=64)
    quantize_model(model, folder / "llama-6bpw", bpw=6.0, measurement=folder / "m.safetensors", evaluate=evaluate)
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
    assert len(FUNCTIONS) == 13


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_of(name: str, here: Path) -> None:
    test = examples(name)
    assert test.examples, "a public function has an example"
    assert not any(example.options for example in test.examples), "nothing is skipped"
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 0, "".join(told)


def python_of(page: Path) -> str:
    """The one Python example of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


@pytest.fixture
def model(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that llama.cpp's converter takes, with a short context, as ``model`` in the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted["llama3"].directory, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    return tmp_path / "model"


def test_readme(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(python_of(ROOT / "README.md").replace("path/to/model", model.name), {})
    assert "nats per token" in capsys.readouterr().out
    assert model.with_name("model.gguf").is_file()


def test_notebook(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "".join("".join(cell["source"]) + "\n" for cell in cells)
    for released, tiny in (("Qwen/Qwen3-0.6B", "model"), ("[8.0, 6.0, 5.0, 4.5]", "[8.0, 5.5]")):
        assert released in code
        code = code.replace(released, tiny)
    exec(code, {})
    *_, small, large = capsys.readouterr().out.splitlines()
    assert small.startswith("small.gguf: ") and large.startswith("large.gguf: ")


def test_originals(here: Path) -> None:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {f"{prefix}.lora_A.weight": torch.ones(2, 64), f"{prefix}.lora_B.weight": torch.ones(64, 2)}
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "bias": "none"}'
    )
    save_file(halves, here / "adapter" / "adapter_model.safetensors")
    exec(python_of(ROOT / "docs" / "originals.md").replace("path/to/base", "llama"), {})
    assert "merged with the adapter adapter" in (here / "out" / "README.md").read_text(encoding="utf-8")
