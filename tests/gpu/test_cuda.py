"""The whole line on a CUDA device against the same line on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.rounding import feedback
from bpwise.convert.opening import verify_model
from bpwise.eval.comparison import EvalConfig
from bpwise.linalg.outputs import OutputFeedback
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_to_file
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model

from ..convert.exl2.test_feedback import Problem
from ..device.row_kernel import same_sums
from ..measured import GGUF, Given, damage_of, gguf_curves_of
from ..quantize.runs import arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}


def options(device: str) -> MeasureConfig:
    return MeasureConfig(calibration=CalibrationConfig(rows=16, row_tokens=128), device=device)


def test_damages_are_those_of_the_cpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("m", **SIZES)
    cpu, cuda = (
        measure_to_file(model, tmp_path / f"{d}.safetensors", options(d), formats={"exl2": Given(Exl2Curves())})
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
    (maker,) = gguf_curves_of(model) or pytest.skip("ggml's library is not installed: pip install '.[gguf]'")
    cpu, cuda = (
        measure_to_file(model, tmp_path / f"{d}.safetensors", options(d), formats={"gguf": Given(maker)})
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
    measure_to_file(model, measurement, options("cpu"), formats={"exl2": Given(Exl2Curves())})
    divergences = {}
    for device in ("cpu", "cuda"):
        config = QuantizeConfig(
            target=Target(bpw=bpw),
            measure=options(device),
            evaluate=EvalConfig(rows=8, row_tokens=128, device="cpu"),
        )
        result = quantize_model(model, tmp_path / device, **arguments(config), measurement=measurement)
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
    result = quantize_model(make_model("m", **SIZES), tmp_path / "out", **arguments(config))
    assert result.comparison is not None
    assert 0 < result.comparison.summary.kl_nats.value < 1
    assert result.measurement is not None
    assert Measurement.load(result.measurement).provenance["device"] == "cuda"


def kernel(rows: int) -> Callable[..., torch.Tensor]:
    found = feedback.row_kernel(torch.device("cuda"), rows)
    assert found is not None, "Triton does not work"
    return found


@pytest.mark.parametrize(("rows", "columns", "rank"), [(32, 4096, 32), (48, 33, 5), (128, 1000, 0)])
def test_the_kernel_computes_what_it_says_bit_for_bit(rows: int, columns: int, rank: int) -> None:
    rng = torch.Generator().manual_seed(0)
    halves = torch.tensor([128.0, 32.0, 16.0, 8.0, 4.0, 2.0]).repeat(columns)[:columns]
    steps = torch.randn(rows, columns, generator=rng) * halves / 2
    factors = (torch.randn(rows, rows, generator=rng) / 4).tril(-1)
    others = torch.randn(rows, rank, generator=rng), torch.randn(rank, columns, generator=rng)
    arguments = (steps, factors, halves, *others)
    found = kernel(rows)(*(each.cuda() for each in arguments))
    assert torch.equal(found.cpu(), same_sums(*arguments))


@pytest.mark.parametrize("rank", [0, 8])
def test_the_kernel_rounds_as_the_loop(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, groups = Problem(192, 600), [RowGroup(8, 64), RowGroup(4, 64), RowGroup(2, 64)]
    assert kernel(64)
    weight, upper, order, fisher = (
        each.cuda() for each in (problem.weight, problem.upper, problem.order, problem.column_weights)
    )
    coupling = torch.randn(600, rank, generator=torch.Generator().manual_seed(0)) / 4
    outputs = OutputFeedback.of(fisher, coupling, 16)
    found, errors = feedback.round_linear(weight, upper, groups, order, fisher, outputs)
    monkeypatch.setattr(feedback, "row_kernel", lambda _device, _rows: None)
    loop, loop_errors = feedback.round_linear(weight, upper, groups, order, fisher, outputs)
    # Sums in another order: hardly one of 115200 weights is near enough to a tie. What comes after one that is, in its
    # output or, with feedback between outputs, in all of them, may differ, and is as good.
    if outputs is None:
        assert int((found.codes != loop.codes).any(dim=0).sum()) <= 600 // 100
    torch.testing.assert_close(errors.sum(), loop_errors.sum(), rtol=0.01, atol=0)
