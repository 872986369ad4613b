import pytest
import torch
from bpwise.linalg import hessian
from bpwise.linalg.hessian import damped_solve, factor_hessian, inverse_diagonal, random_signs, solve_transposed
from torch import Tensor


def correlated_gram(size: int, *, tokens: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=rng, dtype=torch.float64) * torch.logspace(0, -spread, size).double()
    inputs = torch.randn(tokens, size, generator=rng, dtype=torch.float64) @ mixing
    return inputs.T @ inputs / tokens


def damped(gram: Tensor, damping: float) -> Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-4, 0.02, 0.5])
@pytest.mark.parametrize(
    ("size", "tokens", "spread"),
    [(1, 8, 0.0), (32, 500, 0.0), (96, 1000, 2.0), (64, 20, 1.0), (300, 900, 1.0), (512, 700, 1.0)],
    ids=["one-input", "well-conditioned", "spread", "fewer-tokens-than-inputs", "two-blocks", "whole-blocks"],
)
def test_factor_of_the_damped_matrix(size: int, tokens: int, spread: float, damping: float) -> None:
    gram = correlated_gram(size, tokens=tokens, spread=spread)
    factor = factor_hessian(gram, damping)
    assert factor.damping == damping
    assert factor.upper.dtype == torch.float32
    assert torch.equal(factor.upper, factor.upper.triu())
    assert bool((factor.upper.diagonal() > 0).all())
    upper = factor.upper.double()
    expected = damped(gram, damping)
    # R is rounded to float32 (6e-8 relative): R R^T is off by less than 1e-6 of its largest entry.
    assert float((upper @ upper.T - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    # 1 / R_kk^2 is what GPTQ has as the squared diagonal of the inverse's factor.
    pivots = torch.linalg.cholesky(torch.linalg.inv(expected), upper=True).diagonal()
    assert torch.allclose(upper.diagonal() * pivots, torch.ones(size, dtype=torch.float64), rtol=1e-3)


def test_rows_in_another_order() -> None:
    gram = correlated_gram(300, tokens=900)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    ordered = factor_hessian(gram[order][:, order].contiguous(), 0.02)
    assert torch.equal(factor_hessian(gram, 0.02, order=order).upper, ordered.upper)


def test_float64_where_the_damping_is_lost_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = correlated_gram(600, tokens=2000) + 3e4  # a massive activation in all channels at once
    reversed_ = damped(gram, 1e-6).flip(0, 1)
    exact = torch.linalg.cholesky(reversed_).diagonal().flip(0)
    errors = []
    for largest in (hessian._LARGEST_ERROR, float("inf")):
        monkeypatch.setattr(hessian, "_LARGEST_ERROR", largest)
        factor = factor_hessian(gram, 1e-6)
        assert factor.damping == 1e-6
        errors.append(float((factor.upper.diagonal() / exact - 1).abs().max()))
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3


def test_random_signs() -> None:
    signs = random_signs(1000, 256, torch.device("cpu"))
    assert torch.equal(signs.abs(), torch.ones(1000, 256))
    # Off the diagonal, means of 256 signs: a standard deviation of 1/16.
    assert float((signs @ signs.T / 256 - torch.eye(1000)).std()) == pytest.approx(1 / 16, rel=0.02)
    assert torch.equal(signs, random_signs(1000, 256, torch.device("cpu")))
    assert not torch.equal(signs, random_signs(1000, 256, torch.device("cpu"), seed=1))


@pytest.mark.parametrize(("few", "error"), [(600, 1e-4), (599, 0.04)], ids=["exact", "random-signs"])
def test_diagonal_of_the_inverse(few: int, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "FEW_CHANNELS", few)
    gram = correlated_gram(600, tokens=1800, spread=1.5)
    found = inverse_diagonal(factor_hessian(gram, 0.02)).double()
    expected = torch.linalg.inv(damped(gram, 0.02)).diagonal()
    assert float((found / expected - 1).abs().mean()) < error


def test_solving_with_the_transposed_factor() -> None:
    gram, values = correlated_gram(96, tokens=300), torch.randn(96, 5)
    upper = factor_hessian(gram, 0.1).upper
    expected = torch.linalg.inv(upper.double().T) @ values.double()
    assert torch.allclose(solve_transposed(upper, values).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [96, 256, 600])  # in one block of channels, and in several
def test_damped_solve(size: int) -> None:
    gram, values = correlated_gram(size, tokens=3 * size).float(), torch.randn(5, size).T
    before = values.clone()
    expected = torch.linalg.solve(damped(gram, 0.6), values.double())
    assert torch.allclose(damped_solve(gram, values, 0.6).double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(values, before)
    assert not damped_solve(torch.zeros(4, 4), torch.ones(4, 2), 0.6).any()


def test_argument_is_left_alone() -> None:
    gram = correlated_gram(32, tokens=100)
    before = gram.clone()
    factor_hessian(gram, 0.02)
    assert torch.equal(gram, before)


def test_zero_gram_gives_no_feedback() -> None:
    factor = factor_hessian(torch.zeros(32, 32), 0.02)
    assert factor.damping == float("inf")
    assert torch.equal(factor.upper, torch.eye(32))


def test_singular_gram_needs_no_more_than_was_asked() -> None:
    column = torch.linspace(-1, 1, 32, dtype=torch.float64)
    factor = factor_hessian(torch.outer(column, column), 0.02)
    assert factor.damping == 0.02
    assert bool(torch.isfinite(factor.upper).all())


@pytest.mark.parametrize(("eigenvalue", "expected"), [(-0.1, 0.2), (-0.5, 1.0)], ids=["ten-times", "fifty-times"])
def test_indefinite_gram_raises_the_damping(eigenvalue: float, expected: float) -> None:
    # Orthogonal basis, all eigenvalues 1 but one; the mean of the diagonal is close to 1.
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=rng, dtype=torch.float64)).Q
    values = torch.ones(64, dtype=torch.float64)
    values[5] = eigenvalue
    gram = basis @ values.diag() @ basis.T
    factor = factor_hessian(gram, 0.02)
    assert factor.damping == pytest.approx(expected)
    upper = factor.upper.double()
    assert torch.allclose(upper @ upper.T, damped(gram, expected), atol=1e-5)


def test_hopeless_gram_falls_back_to_a_diagonal() -> None:
    gram = torch.ones(32, 32) * 3 - 2 * torch.eye(32)  # diagonal 1, others 3: eigenvalues -2
    factor = factor_hessian(gram, 0.02)
    assert factor.damping == float("inf")
    # Without feedback every row stands alone: R_kk^2 is the damped diagonal, 1.02.
    assert torch.allclose(factor.upper, torch.eye(32) * 1.02**0.5)


@pytest.mark.parametrize("dead", [[0], [31], [3, 4, 17]], ids=["first", "last", "some"])
def test_dead_inputs(dead: list[int]) -> None:
    gram = correlated_gram(32, tokens=200)
    gram[dead, :] = 0
    gram[:, dead] = 0
    factor = factor_hessian(gram, 0.02)
    assert factor.damping == 0.02
    upper = factor.upper.double()
    # A dead input takes part in no feedback, neither giving nor receiving.
    off = upper - upper.diagonal().diag()
    assert bool((off[dead] == 0).all()) and bool((off[:, dead] == 0).all())
    alive = [k for k in range(32) if k not in dead]
    inner = upper[alive][:, alive]
    expected = damped(gram, 0.02)[alive][:, alive]
    assert torch.allclose(inner @ inner.T, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
