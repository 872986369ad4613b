import numpy as np
import pytest
import torch
from bpwise.convert.exl2.rounding.curves import SAMPLED_COLUMNS, measure_curves
from bpwise.linalg.sampling import subsample_tokens
from bpwise.measure.statistics import inputs as statistics
from bpwise.measure.statistics.inputs import InputStatistics, WeightedGram, tokens_of_halves

from ...measured import group_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 5, 8, 19], ids=lambda width: f"{width}-wide")
def test_gram_is_the_weighted_mean_of_outer_products(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "GRAM_BLOCK", 8)  # so that 19 columns are two blocks and a short one
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(30, width, generator=rng), torch.rand(30, generator=rng)
    gram = WeightedGram(width, CPU)
    gram.add(x[:11], w[:11])
    gram.add(x[11:], w[11:])
    assert gram.weight == pytest.approx(float(w.sum()))
    expected = torch.einsum("t,ti,tj->ij", w.double(), x.double(), x.double()) / w.double().sum()
    got = gram.mean()
    assert torch.equal(got, got.T)
    assert torch.allclose(got.double(), expected, atol=1e-6)  # float32 sums of 30 numbers near 1


def test_gram_is_symmetric_whatever_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if a kernel added up x_i x_j and x_j x_i in different orders, as some do at widths that do not fill a register.
    plain = torch.Tensor.addmm_

    def uneven(self: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        result = plain(self, first, second)
        return result.add_(torch.full_like(result, 1e-6).tril(-1))

    monkeypatch.setattr(torch.Tensor, "addmm_", uneven)
    x = torch.randn(30, 19, generator=torch.Generator().manual_seed(0))
    gram = WeightedGram(19, CPU)
    gram.add(x, torch.ones(30))
    got = gram.mean()
    monkeypatch.undo()
    assert torch.equal(got, got.T)
    assert torch.allclose(got, x.T @ x / 30, atol=1e-6)  # float32 sums of 30 numbers near 1


def test_halves_are_even_and_odd_rows_wherever_they_are_cut() -> None:
    for row_tokens in (1, 3, 7):
        rows = torch.arange(5 * row_tokens).view(5, row_tokens)
        for first in range(row_tokens * 5):
            for last in range(first + 1, row_tokens * 5 + 1):
                even, odd = tokens_of_halves(first, last - first, row_tokens)
                wanted = [[t for t in rows[k::2].flatten().tolist() if first <= t < last] for k in range(2)]
                assert [(even + first).tolist(), (odd + first).tolist()] == wanted


def test_tokens_without_input_count_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 6, 4, generator=rng), torch.randn(2, 6, 3, generator=rng)
    x[:, 2] *= 1e-6
    g[:, 2] *= 1e18
    x[1, 4], g[1, 4] = 0, float("inf")
    sums = InputStatistics(4, 6, CPU)
    sums.see_inputs(x)
    sums.see_gradient("a", g)
    sums.end_batch()
    there = x.norm(dim=-1) > 1e-3
    exact = g[there].double()
    assert sums.fisher["a"].tolist() == pytest.approx(exact.square().sum(dim=0).tolist())
    weights = torch.zeros(2, 6, dtype=torch.float64)
    weights[there] = exact.square().sum(dim=1)
    assert torch.cat(sums.token_weights).tolist() == pytest.approx(weights.flatten().tolist())
    assert torch.isfinite(sums.couplings["a"].coupling(sums.fisher["a"])).all()


def test_gradients_of_rows_are_exact_for_one_output() -> None:
    rng = torch.Generator().manual_seed(0)
    x, g = torch.randn(3, 6, 4, generator=rng), torch.randn(3, 6, 1, generator=rng)
    sums = InputStatistics(4, 6, CPU)
    for rows in (slice(0, 2), slice(2, 3)):
        sums.see_inputs(x[rows].flatten(0, 1))
        sums.see_gradient("a", g[rows].flatten(0, 1))
        sums.end_batch()
    even, odd = sums.row_gradients
    assert [len(even), len(odd)] == [2, 1]
    for row, found in ((0, even[0]), (1, odd[0]), (2, even[1])):
        exact = sum(g[row, token, 0].double() * x[row, token].double() for token in range(6))
        assert torch.allclose((found @ found.T).double(), torch.outer(exact, exact), rtol=1e-5, atol=1e-6)


def test_gradients_of_rows_are_right_on_average() -> None:
    rng = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(400, 2, size, generator=rng) for size in (3, 5, 4))
    x, a, b = x[:1].expand(400, -1, -1), a[:1].expand(400, -1, -1), b[:1].expand(400, -1, -1)
    sums = InputStatistics(3, 2, CPU)
    for row in range(400):
        sums.see_inputs(x[row : row + 1])
        sums.see_gradient("a", a[row : row + 1])
        sums.see_gradient("b", b[row : row + 1])
        sums.end_batch()
    found = sum(each @ each.T for half in sums.row_gradients for each in half) / 400
    exact = sum((x[0].T @ g[0]) @ (x[0].T @ g[0]).T for g in (a, b))
    assert torch.allclose(found, exact, atol=0.03 * float(exact.diagonal().max()))


def test_a_stage_without_any_input_keeps_its_gradients() -> None:
    sums = InputStatistics(2, 3, CPU)
    sums.see_inputs(torch.zeros(1, 3, 2))
    sums.see_gradient("a", torch.ones(1, 3, 4))
    sums.end_batch()
    assert sums.fisher["a"].tolist() == [3.0] * 4


def test_gram_without_weight_is_zero() -> None:
    gram = WeightedGram(3, CPU)
    gram.add(torch.ones(2, 3), torch.zeros(2))
    assert not gram.mean().any()


def test_token_weights_are_scaled_to_mean_one() -> None:
    sums = InputStatistics(2, 2, CPU)
    for scale in (1.0, 2.0):
        sums.see_inputs(torch.ones(1, 2, 2))
        sums.see_gradient("a", torch.full((1, 2, 3), scale))
        sums.see_gradient("b", torch.zeros(1, 2, 1))
        sums.end_batch()
    # Squared gradients of 3 and 12 a token, twice each.
    assert sums.scaled_weights().tolist() == pytest.approx([0.4, 0.4, 1.6, 1.6])
    assert sums.fisher["a"].tolist() == pytest.approx([10.0] * 3)
    assert sums.tokens == 4


def test_no_gradient_at_all_weighs_tokens_alike() -> None:
    sums = InputStatistics(2, 3, CPU)
    sums.see_inputs(torch.ones(1, 3, 2))
    sums.see_gradient("a", torch.zeros(1, 3, 4))
    sums.end_batch()
    assert sums.scaled_weights().tolist() == [1.0, 1.0, 1.0]


def test_a_sample_of_the_outputs_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=rng)
    weight = torch.randn(64, 4 * SAMPLED_COLUMNS, generator=rng)
    # Over four orders of magnitude, as real ones are: a few outputs carry most of the damage.
    fisher = 10 ** (4 * torch.rand(4 * SAMPLED_COLUMNS, generator=rng))
    inputs = group_of([weight], x.T @ x / 200, [fisher], damping=0.02)
    sampled = measure_curves(inputs, (8, 4, 2), 32)[0].tensors["damage_nats"]
    monkeypatch.setattr("bpwise.convert.exl2.rounding.curves.SAMPLED_COLUMNS", 1 << 20)
    whole = measure_curves(inputs, (8, 4, 2), 32)[0].tensors["damage_nats"]
    assert sampled.shape == whole.shape == (2, 3)
    # Columns of equal statistics, 512 of them: a spread of some 30 % of their errors averages out to 1.5 %,
    # that of the 128 of the sample to 3 %: up to two and a half deviations, twelve times.
    assert float((sampled / whole - 1).abs().max()) < 0.08


def test_thinned_sums_are_those_of_all_tokens_on_average() -> None:
    rng = torch.Generator().manual_seed(0)
    # Weights over three orders of magnitude: half of the tokens hold 6 % of their sum.
    weights = 10 ** (3 * torch.rand(400, generator=rng))
    values = torch.randn(400, generator=rng)
    draws = []
    for _ in range(2000):
        kept, given = subsample_tokens(weights, rng)
        assert bool((given >= weights.mean()).all())
        draws.append(float((given * values[kept]).sum()))
    mean, error = np.mean(draws), np.std(draws) / len(draws) ** 0.5
    assert abs(mean - float((weights * values).sum())) < 4 * error
    assert 80 < len(kept) < 180


def test_thinning_keeps_the_heaviest_as_they_are() -> None:
    weights = torch.tensor([1.0, 2.0, 100.0, 3.0, 80.0])
    kept, given = subsample_tokens(weights, torch.Generator().manual_seed(0))
    heavy = {int(index): float(weight) for index, weight in zip(kept, given, strict=True) if index in (2, 4)}
    assert heavy == {2: 100.0, 4: 80.0}


@pytest.mark.parametrize(("weights", "kept"), [(torch.full((50,), 0.3), 50), (torch.zeros(50), 0)])
def test_thinning_leaves_equal_weights_alone(weights: torch.Tensor, kept: int) -> None:
    indices, given = subsample_tokens(weights, torch.Generator().manual_seed(0))
    assert indices.tolist() == list(range(kept))
    assert torch.equal(given, weights[:kept])
