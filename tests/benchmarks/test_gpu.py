"""The benchmark of a GPU with the CPU in its place: nothing differs, and every step is timed."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bpwise.convert.gguf.ggml.kernels import TYPES
from click.testing import CliRunner

from ..device.row_kernel import same_sums


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("gpu")
    if module.measured_types():  # only some whose tables take no seconds to make
        monkeypatch.setattr(module, "measured_types", lambda: tuple(TYPES[name] for name in ("Q8_0", "Q5_1", "Q4_0")))
    return module


@pytest.mark.slow
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
    assert "The kernel that rounds row groups: not tried" in result.stdout
    assert {"measure: forward", "measure: curves", "round: exl2", "tune: exl2"} < seconds.keys()
    assert seconds["round: exl2"] > 0


def test_kernel_and_loops_are_compared(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, preset = torch.device("cpu"), gpu.PRESETS["tiny"]
    monkeypatch.setattr(gpu.feedback, "row_kernel", lambda _device, _rows: same_sums)
    assert gpu._kernel_agrees(preset, cpu)
    lines = capsys.readouterr().out.splitlines()
    assert f"Of {32 * preset.intermediate_size} codes of a row group 0 are not what the kernel is to compute." in lines
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| rounding", "| curves"))]
    assert [row[0] for row in cells] == ["rounding", "rounding, outputs coupled", "curves"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in cells)

    def rounds_otherwise(*tensors: torch.Tensor) -> torch.Tensor:
        return (same_sums(*tensors) + 1).clamp(-tensors[2], tensors[2] - 1)

    monkeypatch.setattr(gpu.feedback, "row_kernel", lambda _device, _rows: rounds_otherwise)
    assert not gpu._kernel_agrees(preset, cpu)
