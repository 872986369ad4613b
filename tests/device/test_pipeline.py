"""The whole line on the pretend device against the same line on the CPU: every byte that is written is the same.

The device has no float64 here, as MPS has none; where it is needed, the CPU computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.numerics import fit as tuning
from bpwise.eval.config import EvalConfig
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.result import QuantizeResult
from bpwise.quantize.run import quantize_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from ..families.judge import tensors_of
from ..families.models import build_family, family_names
from ..quantize.runs import arguments
from ..tiny_models import save_family
from .pretend import NAME, counted, without_float64

DEVICES = ("cpu", NAME)


def run(model: Path, output: Path, device: str, bpw: float, options: Any) -> QuantizeResult:
    config = QuantizeConfig(
        target=Target(bpw=bpw),
        options=options,
        measure=MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device=device),
        evaluate=EvalConfig(rows=2, row_tokens=32, device=device),
    )
    with without_float64(), counted() as counts:
        result = quantize_model(model, output, **arguments(config))
    assert (counts.launches.total() > 1000) == (device == NAME)  # it ran there
    return result


def assert_same_run(one: QuantizeResult, other: QuantizeResult) -> None:
    """What was measured, planned and found is the same to the last bit, if not where."""
    assert one.measurement is not None
    assert other.measurement is not None
    first, second = (Measurement.load(each.measurement) for each in (one, other) if each.measurement is not None)
    assert first.curves.keys() == second.curves.keys()
    for ours, theirs in zip((*first.linears, first.head), (*second.linears, second.head), strict=True):
        for field in ("fisher", "input_power", "coupling", "token_weights"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=f"{ours.name} {field}")
        for name, curves in first.curves.items():
            for key, values in curves.linears[ours.name].items():
                np.testing.assert_array_equal(values, second.curves[name].linears[ours.name][key], err_msg=ours.name)
    assert one.plan.identity()[1:] == other.plan.identity()[1:]  # the first says which measurement
    assert one.comparison is not None
    assert other.comparison is not None
    assert one.comparison.summary == other.comparison.summary
    assert one.comparison.floor_nats == other.comparison.floor_nats


@pytest.fixture
def tuned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few calibration rows here are one step of tuning: it is a large one, so that scales move."""
    monkeypatch.setattr(tuning, "_WARM_STEPS", 1)
    monkeypatch.setattr(tuning, "_RATE", 1.0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("mixtral", {"num_hidden_layers": 1, "num_local_experts": 3}, id="mixtral"),
        pytest.param("gemma2", {}, id="gemma2", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", {}, id="qwen2_moe", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("tuned_at_once")
def test_exl2(family: str, changes: dict[str, Any], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", family, byte_tokenizer, **changes)
    options = Exl2Options(effort="high")
    on_cpu, on_device = (run(model, tmp_path / device, device, 4.5, options) for device in DEVICES)
    expected, found = (load_file(each.output / "output.safetensors") for each in (on_cpu, on_device))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert_same_run(on_cpu, on_device)


def to_gguf(model: Path, work: Path, types: tuple[str, ...], converter: Path) -> list[QuantizeResult]:
    """Convert a model, and quantize that to types that its sizes fit, on both devices."""
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    make_base(Checkpoint.open(model), work / "base.gguf", llama_cpp=converter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpwise.convert.gguf.engine.gate._library", lambda: None)
        patch.setattr("bpwise.convert.gguf.conversion.measured_types", lambda: tuple(TYPES[name] for name in types))
        options = GgufOptions(base=work / "base.gguf")
        return [run(model, work / f"{device}.gguf", device, 7.0, options) for device in DEVICES]


def assert_same_files(on_cpu: QuantizeResult, on_device: QuantizeResult) -> None:
    expected, found = (tensors_of(each.output) for each in (on_cpu, on_device))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].data, tensor.data, err_msg=name)
    assert_same_run(on_cpu, on_device)


@pytest.mark.parametrize(
    ("family", "changes", "types"),
    [
        pytest.param(
            "llama",
            {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
            ("Q8_0", "Q4_K", "IQ4_XS", "IQ3_S"),
            id="llama-k-types",
        ),
        pytest.param("mixtral", {}, ("Q8_0", "Q5_1", "IQ4_NL"), id="mixtral", marks=pytest.mark.slow),
    ],
)
def test_gguf(
    family: str,
    changes: dict[str, Any],
    types: tuple[str, ...],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    llama_cpp: Path,
) -> None:
    model = save_family(tmp_path / "model", family, byte_tokenizer, **changes)
    assert_same_files(*to_gguf(model, tmp_path, types, llama_cpp))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "lfm2" else pytest.mark.families) for name in family_names()]
)
@pytest.mark.filterwarnings("ignore::bpwise.errors.BpwiseWarning")  # of what a file holds beside measured linears
def test_families(family: str, tmp_path: Path, llama_cpp: Path) -> None:
    model = build_family(family, tmp_path / "model")
    assert_same_files(*to_gguf(model, tmp_path, ("Q8_0", "Q4_0"), llama_cpp))
