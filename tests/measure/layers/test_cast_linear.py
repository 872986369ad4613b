"""The sliced output head against a plain linear."""

import pytest
import torch
from bpwise.measure.layers import cast_linear as head
from bpwise.measure.layers.cast_linear import CastOnUseLinear
from torch import Tensor, nn


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_agrees_with_a_linear_in_the_dtype_of_the_run(
    stored: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_SLICE_OUTPUTS", 7)  # the last of three slices is short
    rng = torch.Generator().manual_seed(0)
    plain = nn.Linear(16, 20, bias=bias)
    weight = torch.randn(20, 16, generator=rng).to(stored)
    sliced = CastOnUseLinear(plain)
    sliced.weight = nn.Parameter(weight, requires_grad=False)
    sliced.bias = plain.bias
    plain.weight = nn.Parameter(weight.float())
    inputs = torch.randn(2, 5, 16, generator=rng)
    direction = torch.randn(2, 5, 20, generator=rng)

    def run(linear: nn.Module) -> tuple[Tensor, Tensor]:
        own = inputs.clone().requires_grad_()
        outputs = linear(own)
        outputs.backward(direction)
        assert own.grad is not None
        return outputs.detach(), own.grad

    # float32, other order of summation: 1e-6 of values around 4.
    for got, expected in zip(run(sliced), run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert sliced.weight.dtype == stored
