"""What a device would pay for, counted: error feedback lets it run on, however many input channels there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.rounding.feedback import errors_by_group, round_linear_
from bpwise.convert.gguf.ggml.kernels import kernels_available
from bpwise.convert.gguf.ggml.rounding import expected_rounding, round_to_type
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.linalg.hessian import factor_hessian
from bpwise.linalg.outputs import OutputFeedback
from torch import Tensor

from .pretend import Counts, counted
from .row_kernel import pretend_kernel

GROUP, OUTPUTS = 32, 48
WIDTHS = (8, 6, 5, 4, 3, 2)


def factored(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight and R, on the device."""
    rng = torch.Generator().manual_seed(channels)
    inputs = torch.randn(4 * channels, channels, generator=rng)
    weight = torch.randn(channels, OUTPUTS, generator=rng)
    return weight.to(device), factor_hessian((inputs.T @ inputs / len(inputs)).to(device), 0.1).upper


def round_exl2(weight: Tensor, upper: Tensor, *, coupled: bool = False) -> None:
    order, ones = torch.arange(len(weight), device=weight.device), torch.ones(OUTPUTS, device=weight.device)
    # Every width occurs, as in a plan of a large linear.
    widths = sorted((WIDTHS[i % len(WIDTHS)] for i in range(len(weight) // GROUP)), reverse=True)
    outputs = OutputFeedback.of(ones, 0.1 * torch.ones(OUTPUTS, 8), 16) if coupled else None
    linear, _ = round_linear_(weight, upper, [RowGroup(bits, GROUP) for bits in widths], order, ones, outputs)
    linear.validate("l")
    linear.dequantize()


def round_exl2_coupled(weight: Tensor, upper: Tensor) -> None:
    round_exl2(weight, upper, coupled=True)


def measure_exl2(weight: Tensor, upper: Tensor) -> None:
    ones = torch.ones(OUTPUTS, device=weight.device)
    errors_by_group(weight, upper, [GROUP] * (len(weight) // GROUP), WIDTHS, ones)


def round_gguf(weight: Tensor, upper: Tensor) -> None:
    round_to_type(weight, upper, TYPES["Q4_0"])


def measure_gguf(weight: Tensor, upper: Tensor) -> None:
    expected_rounding(weight, upper, TYPES["Q4_0"])


def counts_of(work: Callable[[Tensor, Tensor], None], channels: int, device: torch.device) -> Counts:
    weight, upper = factored(channels, device)
    with counted() as counts:
        work(weight, upper)
    return counts


@pytest.mark.parametrize("work", [round_exl2, round_exl2_coupled, measure_exl2, round_gguf, measure_gguf])
def test_no_wait_for_the_device_in_the_loop_over_input_channels(
    work: Callable[[Tensor, Tensor], None], pretend: torch.device
) -> None:
    if work in (round_gguf, measure_gguf) and not kernels_available():
        pytest.skip("ggml's library is not installed: pip install '.[gguf]'")
    few, many = (counts_of(work, channels, pretend) for channels in (192, 384))
    assert many.waits == few.waits
    assert few.waits.total() <= 16


@pytest.mark.parametrize(("work", "most"), [(round_exl2, 9), (round_exl2_coupled, 24), (measure_exl2, 9.5)])
def test_launches_of_every_input_channel(
    work: Callable[[Tensor, Tensor], None], most: float, pretend: torch.device
) -> None:
    # docs/gpu.md builds on them: with more channels, and with more outputs, there is no launch beyond these.
    few, many = (counts_of(work, channels, pretend).launches.total() for channels in (192, 384))
    assert (many - few) / 192 <= most


@pytest.mark.parametrize(("work", "most"), [(round_exl2, 5), (round_exl2_coupled, 7), (measure_exl2, 5.5)])
def test_launches_of_every_input_channel_with_the_kernel(
    work: Callable[[Tensor, Tensor], None], most: float, pretend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpwise.convert.exl2.rounding.feedback.row_kernel", lambda _device, _rows: pretend_kernel)
    few, many = (counts_of(work, channels, pretend) for channels in (192, 384))
    assert (many.launches.total() - few.launches.total()) / 192 <= most
    assert many.waits == few.waits
    # One a row group, or one for each of 16 sets of outputs.
    of_group = 16 if work is round_exl2_coupled else 1
    assert many.launches["round_rows"] - few.launches["round_rows"] == of_group * (384 - 192) / GROUP
