"""The benchmark of a GPU with the CPU in its place: nothing differs, and every step is timed."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from bpwise.convert.gguf.ggml.kernels import TYPES
from click.testing import CliRunner


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("gpu")
    if module.measured_types():  # only some whose tables take no seconds to make
        monkeypatch.setattr(module, "measured_types", lambda: tuple(TYPES[name] for name in ("Q8_0", "Q5_1", "Q4_0")))
    return module


def test_the_cpu_is_as_the_cpu(gpu: ModuleType) -> None:
    arguments = ["--device", "cpu", "--preset", "tiny", "--layers", "1", "--rows", "4", "--row-tokens", "32"]
    result = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    cells = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    differences = {row[0]: float(row[1]) for row in cells if row[0].startswith(("largest", "KL"))}
    assert len(differences) >= 2
    assert not any(differences.values())
    assert "14 of 14 linears have the same plan" in result.stdout
    seconds = {row[0]: float(row[1]) for row in cells if row[0].startswith(("measure", "round", "tune", "evaluate"))}
    assert {"measure: forward", "measure: curves", "round: exl2", "tune: exl2"} < seconds.keys()
    assert seconds["round: exl2"] > 0
