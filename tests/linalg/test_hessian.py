import pytest
import torch
from bpwise.linalg.hessian import inverse_factor
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
    [(1, 8, 0.0), (32, 500, 0.0), (96, 1000, 2.0), (64, 20, 1.0)],
    ids=["one-input", "well-conditioned", "spread", "fewer-tokens-than-inputs"],
)
def test_factor_of_the_damped_inverse(size: int, tokens: int, spread: float, damping: float) -> None:
    gram = correlated_gram(size, tokens=tokens, spread=spread)
    factor = inverse_factor(gram, damping)
    assert factor.damping == damping
    assert factor.upper.dtype == torch.float32
    assert torch.equal(factor.upper, factor.upper.triu())
    assert bool((factor.upper.diagonal() > 0).all())
    upper = factor.upper.double()
    expected = torch.linalg.inv(damped(gram, damping))
    # U is rounded to float32 (6e-8 relative): U^T U, a sum of at most 96 products, is off by less than 1e-5 of its
    # largest entry.
    assert float((upper.T @ upper - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_float32_gram_is_factored_in_float64() -> None:
    gram = correlated_gram(64, tokens=4000, spread=2.5).float()  # condition number about 1e6
    factor = inverse_factor(gram, 1e-6)
    assert factor.damping == 1e-6
    upper = factor.upper.double()
    # In float32 the factorisation would be off by condition number * 6e-8, some percent.
    identity = upper @ damped(gram, 1e-6) @ upper.T
    assert float((identity - torch.eye(64)).abs().max()) < 1e-3


def test_argument_is_left_alone() -> None:
    gram = correlated_gram(32, tokens=100)
    before = gram.clone()
    inverse_factor(gram, 0.02)
    assert torch.equal(gram, before)


def test_zero_gram_gives_no_feedback() -> None:
    factor = inverse_factor(torch.zeros(32, 32), 0.02)
    assert factor.damping == float("inf")
    assert torch.equal(factor.upper, torch.eye(32))


def test_singular_gram_needs_no_more_than_was_asked() -> None:
    column = torch.linspace(-1, 1, 32, dtype=torch.float64)
    factor = inverse_factor(torch.outer(column, column), 0.02)
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
    factor = inverse_factor(gram, 0.02)
    assert factor.damping == pytest.approx(expected)
    upper = factor.upper.double()
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped(gram, expected)), atol=1e-4)


def test_hopeless_gram_falls_back_to_a_diagonal() -> None:
    gram = torch.ones(32, 32) * 3 - 2 * torch.eye(32)  # diagonal 1, others 3: eigenvalues -2
    factor = inverse_factor(gram, 0.02)
    assert factor.damping == float("inf")
    # Without feedback every row stands alone: U_kk^-2 is the damped diagonal, 1.02.
    assert torch.allclose(factor.upper, torch.eye(32) * 1.02**-0.5)


@pytest.mark.parametrize("dead", [[0], [31], [3, 4, 17]], ids=["first", "last", "some"])
def test_dead_inputs(dead: list[int]) -> None:
    gram = correlated_gram(32, tokens=200)
    gram[dead, :] = 0
    gram[:, dead] = 0
    factor = inverse_factor(gram, 0.02)
    assert factor.damping == 0.02
    upper = factor.upper.double()
    # A dead input takes part in no feedback, neither giving nor receiving.
    off = upper - upper.diagonal().diag()
    assert bool((off[dead] == 0).all()) and bool((off[:, dead] == 0).all())
    alive = [k for k in range(32) if k not in dead]
    inner = upper[alive][:, alive]
    expected = torch.linalg.inv(damped(gram, 0.02)[alive][:, alive])
    assert torch.allclose(inner.T @ inner, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
