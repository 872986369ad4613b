"""The whole line on a CUDA device against the same line on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.opening import verify_model
from bpwise.eval.comparison import EvalConfig
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_model
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model

from ..measured import GGUF, Given, damage_of, gguf_curves_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}


def options(device: str) -> MeasureConfig:
    return MeasureConfig(calibration=CalibrationConfig(rows=16, row_tokens=128), device=device)


def test_damages_are_those_of_the_cpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("m", **SIZES)
    cpu, cuda = (
        measure_model(model, tmp_path / f"{d}.safetensors", options(d), formats={"exl2": Given(Exl2Curves())})
        for d in ("cpu", "cuda")
    )
    assert [linear.name for linear in cuda.linears] == [linear.name for linear in cpu.linears]
    # The head's Fisher information is exact; what differs is rounding at ties, in float32 sums of another order.
    np.testing.assert_allclose(*(damage_of(x, "lm_head").sum(0) for x in (cuda, cpu)), rtol=0.01)
    for ours, reference in zip(cuda.linears, cpu.linears, strict=True):
        np.testing.assert_allclose(ours.input_power, reference.input_power, rtol=1e-3, err_msg=ours.name)
        # The same probes; which tokens sums are thinned to hangs on the last bits of their weights.
        totals = [damage_of(x, ours.name).sum(0) for x in (cuda, cpu)]
        np.testing.assert_allclose(*totals, rtol=0.15, err_msg=ours.name)


def test_damages_in_ggml_types_are_those_of_the_cpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("m", **SIZES)
    (maker,) = gguf_curves_of(model) or pytest.skip("ggml's library is not installed: pip install 'bpwise[gguf]'")
    cpu, cuda = (
        measure_model(model, tmp_path / f"{d}.safetensors", options(d), formats={"gguf": Given(maker)})
        for d in ("cpu", "cuda")
    )
    for ours, reference in zip((*cuda.linears, cuda.head), (*cpu.linears, cpu.head), strict=True):
        # Infinite where a type's blocks do not fit.
        damages = (np.nan_to_num(damage_of(x, ours.name, GGUF).sum(0), posinf=0.0) for x in (cuda, cpu))
        np.testing.assert_allclose(*damages, rtol=0.15, err_msg=reference.name)
    np.testing.assert_allclose(*(x.curves[GGUF].table["damage_nats"] for x in (cuda, cpu)), rtol=0.01)


@pytest.mark.parametrize("bpw", [6.0, 3.5])
def test_the_output_verifies_and_is_as_good(make_model: Callable[..., Path], tmp_path: Path, bpw: float) -> None:
    model = make_model("m", **SIZES)
    measurement = tmp_path / "measurement.safetensors"
    measure_model(model, measurement, options("cpu"), formats={"exl2": Given(Exl2Curves())})
    divergences = {}
    for device in ("cpu", "cuda"):
        config = QuantizeConfig(
            target=Target(bpw=bpw),
            measure=options(device),
            evaluate=EvalConfig(rows=8, row_tokens=128, device="cpu"),
        )
        result = quantize_model(model, tmp_path / device, config, measurement=measurement)
        verified = verify_model(tmp_path / device)
        assert verified.compared
        assert verified.bpw <= bpw
        assert result.comparison is not None
        divergences[device] = result.comparison.summary.kl_nats.value
    # One plan, one text: the same but for ties in rounding, whose effects error feedback carries on.
    assert divergences["cuda"] == pytest.approx(divergences["cpu"], rel=0.1)


def test_a_run_from_nothing_works(make_model: Callable[..., Path], tmp_path: Path) -> None:
    config = QuantizeConfig(
        target=Target(bpw=4.5),
        measure=options("cuda"),
        evaluate=EvalConfig(rows=4, row_tokens=128, device="cuda"),
    )
    result = quantize_model(make_model("m", **SIZES), tmp_path / "out", config)
    assert result.comparison is not None
    assert 0 < result.comparison.summary.kl_nats.value < 1
    assert result.measurement is not None
    assert Measurement.load(result.measurement).provenance["device"] == "cuda"
