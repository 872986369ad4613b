import pytest
import torch
from bpwise.linalg.sampling import systematic_sample


def test_sums_over_the_sample_are_those_over_all() -> None:
    weights = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    values = torch.linspace(1, 2, 5000)
    chosen, shares = systematic_sample(weights, 256)
    assert len(chosen) == 256
    assert float(shares.sum()) == pytest.approx(float(weights.sum()), rel=1e-5)
    # Values that change slowly are met by every share: off by half a share's range at most, 1 / 512.
    assert float(values[chosen] @ shares) == pytest.approx(float(values @ weights), rel=1 / 512)


def test_an_item_as_heavy_as_several_shares_is_chosen_once() -> None:
    weights = torch.tensor([1.0] * 50 + [50.0] + [0.0] * 20)
    chosen, shares = systematic_sample(weights, 10)
    assert chosen.tolist().count(50) == 1
    assert float(shares[chosen == 50]) == pytest.approx(50)
    assert not set(chosen.tolist()) & set(range(51, 71))  # what weighs nothing is never chosen


@pytest.mark.parametrize("weights", [torch.rand(8), torch.zeros(300)], ids=["few", "weightless"])
def test_takes_all_where_sampling_makes_no_sense(weights: torch.Tensor) -> None:
    chosen, shares = systematic_sample(weights, 256)
    assert torch.equal(chosen, torch.arange(len(weights)))
    assert torch.equal(shares, weights)
