"""Bootstrap intervals against resampling by hand."""

import numpy as np
import pytest
import torch
from bpwise.eval.metrics.bootstrap import bootstrapped_mean, bootstrapped_quantile

LENGTHS = (3, 40, 7, 7, 25, 1, 60, 12)


def values_of() -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    level = torch.randn(len(LENGTHS), generator=rng).repeat_interleave(torch.tensor(LENGTHS))
    return level + torch.randn(sum(LENGTHS), generator=rng)


@pytest.mark.parametrize("share", [None, 0.99], ids=["mean", "percentile"])
def test_documents_are_drawn_with_all_of_their_tokens(share: float | None) -> None:
    values = values_of()
    documents = np.split(values.double().numpy(), np.cumsum(LENGTHS)[:-1])
    statistic = np.mean if share is None else lambda drawn: np.quantile(drawn, share)
    rng = np.random.default_rng(1)  # other draws than those under test
    drawn = [statistic(np.concatenate([documents[n] for n in rng.integers(8, size=8)])) for _ in range(4000)]
    got = bootstrapped_mean(values, LENGTHS) if share is None else bootstrapped_quantile(values, LENGTHS, share)
    assert got.value == pytest.approx(statistic(values.double().numpy()))
    assert got.interval is not None
    low, high = np.quantile(drawn, [0.025, 0.975])
    # Ends of 2000 and of 4000 draws differ by some hundredths of the interval.
    assert got.interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert got.interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_the_same_numbers_give_the_same_interval() -> None:
    assert bootstrapped_mean(values_of(), LENGTHS) == bootstrapped_mean(values_of(), LENGTHS)


def test_one_document_has_no_interval() -> None:
    got = bootstrapped_quantile(torch.tensor([1.0, 2.0]), (2,), 0.5)
    assert (got.value, got.interval) == (1.5, None)
