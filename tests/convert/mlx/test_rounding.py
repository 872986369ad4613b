"""Rounding onto affine groups, against plain formulas in float64."""

import pytest
import torch
from bpwise.convert.mlx.grid.rounding import Affine, expected_rounding, round_affine, round_plainly
from bpwise.convert.mlx.grid.schemes import Scheme
from bpwise.linalg.hessian import factor_hessian
from bpwise.linalg.outputs import OutputFeedback

SCHEMES = [Scheme(2, 32), Scheme(3, 64), Scheme(4, 64), Scheme(5, 128), Scheme(6, 32), Scheme(8, 64)]
K, OUT = 128, 48


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, K, generator=rng) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=rng))
    return torch.randn(K, OUT, generator=rng) * 0.05, inputs.T @ inputs / len(inputs)


def cost(weight: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> float:
    missed = (weight - values).double()
    return float((missed * (gram.double() @ missed)).sum())


def to_nearest(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Minimum to maximum of every group in equal steps, as quantizers without calibration round."""
    groups = weight.unflatten(0, (-1, scheme.group_size))
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = ((high - low) / (2**scheme.bits - 1)).bfloat16().float()
    low = low.bfloat16().float()
    return (((groups - low) / step).round().clamp(0, 2**scheme.bits - 1) * step + low).flatten(0, 1)


def check_grid(found: Affine, scheme: Scheme, dtype: torch.dtype) -> None:
    assert torch.equal(found.codes, found.codes.round())
    assert 0 <= float(found.codes.min()) <= float(found.codes.max()) < 2**scheme.bits
    for values in (found.scales, found.biases):
        assert values.shape == (K // scheme.group_size, OUT)
        assert torch.equal(values, values.to(dtype).float()), "not what the file can hold"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda each: each.name)
def test_beats_rounding_to_nearest(
    problem: tuple[torch.Tensor, torch.Tensor], scheme: Scheme, dtype: torch.dtype
) -> None:
    weight, gram = problem
    upper = factor_hessian(gram, 0.01).upper
    found = round_affine(weight, upper, scheme, dtype)
    check_grid(found, scheme, dtype)
    assert cost(weight, found.decoded(), gram) < 0.6 * cost(weight, to_nearest(weight, scheme), gram)


def test_outputs_that_act_together_make_up_for_each_other(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, gram = problem
    scheme, upper = Scheme(3, 32), factor_hessian(gram, 0.01).upper
    coupling = torch.full((OUT, 1), 0.9)  # all outputs push the loss the same way
    sets = OutputFeedback.of(torch.ones(OUT), coupling, 4)
    together = round_affine(weight, upper, scheme, torch.bfloat16, sets)
    check_grid(together, scheme, torch.bfloat16)

    def joint(found: Affine) -> float:
        missed = (weight - found.decoded()).double() @ coupling.double()
        return float(missed.T @ gram.double() @ missed)

    assert joint(together) < 0.5 * joint(round_affine(weight, upper, scheme, torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda each: each.name)
def test_expected_errors_are_those_of_groups_by_themselves(
    problem: tuple[torch.Tensor, torch.Tensor], scheme: Scheme
) -> None:
    weight, gram = problem
    upper = factor_hessian(gram, 0.01).upper
    errors, missed = expected_rounding(weight, upper, scheme, torch.bfloat16)
    total = torch.zeros(OUT, dtype=torch.float64)
    for first in range(0, K, scheme.group_size):
        rows = slice(first, first + scheme.group_size)
        root, own = upper[rows, rows].double(), missed[rows].double()
        total += ((root.T @ own) ** 2).sum(dim=0)
    assert errors.double() == pytest.approx(total, rel=1e-3)
    real = cost(weight, round_affine(weight, upper, scheme, torch.bfloat16).decoded(), gram)
    assert 0.6 * float(errors.sum()) < real < 1.3 * float(errors.sum())


def test_embeddings_are_rounded_by_what_their_channels_cost() -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(K, OUT, generator=rng)
    weight[::32] *= 6  # outliers in channels that cost nothing
    costs = torch.ones(K)
    costs[::32] = 0
    scheme = Scheme(3, 32)
    found = round_plainly(weight, costs, scheme, torch.bfloat16)
    check_grid(found, scheme, torch.bfloat16)

    def missed(values: torch.Tensor) -> float:
        return float(costs @ (weight - values).square().sum(dim=1))

    assert missed(found.decoded()) < 0.8 * missed(to_nearest(weight, scheme))


@pytest.mark.parametrize("value", [0.0, 0.37, -5.0])
def test_groups_of_one_value_are_that_value(value: float) -> None:
    weight = torch.full((64, 3), value)
    found = round_affine(weight, torch.eye(64), Scheme(4, 32), torch.float32)
    assert torch.allclose(found.decoded(), weight, atol=1e-7)
