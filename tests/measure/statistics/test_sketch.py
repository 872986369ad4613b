import pytest
import torch
from bpwise.measure.statistics import sketch
from bpwise.measure.statistics.sketch import COUPLING_RANK, FisherSketch
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over every token, as the formulas have them."""
    monkeypatch.setattr(sketch, "subsample_tokens", lambda weights, _rng: (slice(None), weights))


def gradients(outputs: int, tokens: int = 4000) -> Tensor:
    """Gradients with a spectrum that falls off, as those of attention do."""
    rng = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(outputs, outputs, generator=rng)).Q
    sizes = 0.7 ** torch.arange(outputs)
    return (torch.randn(tokens, outputs, generator=rng) * sizes) @ directions.T


def sketched(seen: Tensor) -> Tensor:
    sums = FisherSketch(seen.shape[1], CPU)
    for batch in seen.split(1000):
        sums.add(batch, batch.square().sum(dim=1))
    return sums.coupling(seen.square().sum(dim=0))


@pytest.mark.usefixtures("all_tokens")
def test_reproduces_a_fisher_matrix_with_few_directions() -> None:
    seen = gradients(200)
    coupling = sketched(seen)
    assert coupling.dtype == torch.float16
    assert coupling.shape == (200, COUPLING_RANK)
    fisher = seen.double().T @ seen.double()
    root = fisher.diagonal().sqrt()
    correlations = fisher / root[:, None] / root
    # The directions left out hold 0.7^64 of the energy; what remains is float16.
    assert torch.allclose(coupling.double() @ coupling.double().T, correlations, atol=5e-3)


@pytest.mark.usefixtures("all_tokens")
def test_narrow_linears_have_as_many_directions_as_outputs() -> None:
    seen = gradients(8)
    coupling = sketched(seen)
    assert coupling.shape == (8, 8)
    fisher = seen.T @ seen
    root = fisher.diagonal().sqrt()
    assert torch.allclose(coupling.float() @ coupling.float().T, fisher / root[:, None] / root, atol=5e-3)


def test_the_leading_directions_of_a_flat_spectrum_stay_within_the_diagonal() -> None:
    seen = torch.randn(5000, 300, generator=torch.Generator().manual_seed(2))
    coupling = sketched(seen).float()
    assert float(coupling.square().sum(dim=1).max()) < 1.0


def test_no_gradient_no_coupling() -> None:
    assert not sketched(torch.zeros(1000, 40)).any()


def test_outputs_without_gradient_are_not_coupled() -> None:
    seen = gradients(50)
    seen[:, 7] = 0
    coupling = sketched(seen)
    assert torch.isfinite(coupling).all()
    assert not coupling[7].any()


def test_does_not_depend_on_the_scale_of_the_loss() -> None:
    seen = gradients(60)
    tiny = sketched(seen * 1e-12).float()
    assert torch.allclose(tiny @ tiny.T, sketched(seen).float() @ sketched(seen).float().T, atol=5e-3)


def test_tokens_that_stand_for_others_count_as_much_as_these() -> None:
    rng = torch.Generator().manual_seed(4)
    # Token weights over three orders of magnitude, so that most tokens are left out.
    seen = gradients(40, 40000) * 10 ** (1.5 * torch.rand(40000, 1, generator=rng))
    fisher = seen.double().T @ seen.double()
    root = fisher.diagonal().sqrt()
    coupling = sketched(seen).double()
    # Ten thousand tokens or more stay: correlations are good to 1 / 100, 5 standard errors.
    assert torch.allclose(coupling @ coupling.T, fisher / root[:, None] / root, atol=0.05)
