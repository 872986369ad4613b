import pytest
import torch
from bpwise.checkpoint.model.structure import InputGroup
from bpwise.quantize.rounding import drift
from bpwise.quantize.rounding.drift import InputSums, shifted
from torch import Tensor, nn

ROWS, TOKENS, WIDTH, OUT = 40, 16, 6, 4
CPU = torch.device("cpu")
INSIDE = InputGroup(("linear",))
JOINING = InputGroup(("linear",), adds="norm")


@pytest.fixture(autouse=True)
def all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over every token, as the formulas here have them."""
    monkeypatch.setattr(drift, "subsample_tokens", lambda weights, _rng: (slice(None), weights))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, OUT).requires_grad_(False)


def tokens(width: int, seed: int) -> Tensor:
    return torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def summed(group: InputGroup, module: nn.Linear, inputs: Tensor, target: Tensor, weights: Tensor) -> InputSums:
    sums = InputSums(module, group, CPU)
    for batch in (slice(0, 7), slice(7, 8), slice(8, ROWS)):  # odd cuts: a row's half does not depend on its batch
        sums.add(batch.start, inputs[batch], target[batch], weights[batch])
    return sums


def naive(inputs: Tensor, missing: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Gram matrix and ridge regression of ``missing`` on ``inputs``, in float64."""
    y, m, w = (x.flatten(0, 1).double() for x in (inputs, missing, weights[..., None]))
    gram = (w * y).T @ y / w.sum()
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return gram, torch.linalg.solve(damped, (w * y).T @ m / w.sum())


def test_group_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "RIDGES", (0.7,))
    inputs, weights = tokens(WIDTH, 1), tokens(1, 2)[..., 0].square()
    target = inputs @ (torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH)) + 0.1 * tokens(WIDTH, 3)
    gram, shift = summed(INSIDE, linear(), inputs, target, weights).solved(correct_drift=True)
    expected_gram, expected = naive(inputs, target - inputs, weights, 0.7)
    assert shift is not None
    assert torch.allclose(gram.double(), expected_gram, atol=1e-5)  # float32 sums of 640 products
    assert torch.allclose(shift.double(), expected, atol=1e-5)


def test_group_that_joins_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "RIDGES", (0.2,))
    module, inputs, stream = linear(), tokens(WIDTH, 1), tokens(OUT, 4)
    weights = torch.ones(ROWS, TOKENS)
    target = stream + 1.5 * module(inputs)
    _, shift = summed(JOINING, module, inputs, target - stream, weights).solved(correct_drift=True)
    _, expected = naive(inputs, target - stream - module(inputs), weights, 0.2)
    assert shift is not None
    assert torch.allclose(shift.double(), expected, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 1.0, 6.0])
def test_ridge_is_the_one_that_holds_on_other_rows(noise: float, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.quantize.rounding.drift.FEW_CHANNELS", WIDTH if every == 1 else WIDTH - 1)
    inputs, weights = tokens(WIDTH, 1), tokens(1, 2)[..., 0].square()
    missing = 0.3 * inputs + noise * tokens(WIDTH, 5)
    _, shift = summed(INSIDE, linear(), inputs, inputs + missing, weights).solved(correct_drift=True)

    def error_on_odd_rows(ridge: float) -> float:
        some = inputs[..., ::every]
        _, fitted = naive(some[::2], missing[::2], weights[::2], ridge)
        residual = some[1::2].double() @ fitted - missing[1::2]
        return float((residual.square().sum(dim=-1) * weights[1::2]).sum())

    best = min((0.2, 0.6, 2.0, 6.0), key=error_on_odd_rows)
    if every == 1:
        assert (best == 0.2) == (noise < 6)
    _, expected = naive(inputs, missing, weights, best)
    assert shift is not None
    assert torch.allclose(shift.double(), expected, atol=1e-4)


def test_nothing_to_learn_means_no_shift() -> None:
    inputs, weights = tokens(WIDTH, 1), torch.ones(ROWS, TOKENS)
    # What one half teaches is wrong on the other.
    missing = inputs * torch.tensor([1.0, -1.0]).repeat(ROWS // 2)[:, None, None]
    sums = summed(INSIDE, linear(), inputs, inputs + missing, weights)
    assert sums.solved(correct_drift=True)[1] is None


def test_no_correction_wanted_or_possible() -> None:
    inputs, weights = tokens(WIDTH, 1), torch.ones(ROWS, TOKENS)
    assert summed(INSIDE, linear(), inputs, 2 * inputs, weights).solved(correct_drift=False)[1] is None
    gram, shift = summed(INSIDE, linear(), inputs, 2 * inputs, 0 * weights).solved(correct_drift=True)
    assert shift is None
    assert not gram.any()
    one_row = InputSums(linear(), INSIDE, CPU)
    one_row.add(0, inputs[:1], 2 * inputs[:1], weights[:1])
    gram, shift = one_row.solved(correct_drift=True)
    assert shift is None
    assert torch.allclose(gram, inputs[0].T @ inputs[0] / TOKENS, atol=1e-5)


@pytest.mark.parametrize("joins", [True, False], ids=["joins-the-stream", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_weight_is_shifted_in_slices(joins: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_SLICE_OUTPUTS", 7)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 16, generator=rng).to(dtype)
    shift = torch.randn(16, 20 if joins else 16, generator=rng)
    plain = weight.double().T
    expected = plain + (shift.double() if joins else shift.double() @ plain)
    # float32 sums of 16 products around 1
    torch.testing.assert_close(shifted(weight, shift, joins=joins), expected.float(), rtol=1e-5, atol=1e-5)
    unmoved = shifted(weight, None, joins=joins)
    assert torch.equal(unmoved, plain.float())
    assert unmoved.is_contiguous()
    unmoved.zero_()
    assert bool(weight.any())  # it has memory of its own
