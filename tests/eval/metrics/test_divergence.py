import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from bpwise.cli.allocator import _LARGE_BYTES
from bpwise.errors import NumericalError, ShapeError
from bpwise.eval.metrics.divergence import PIECE_ELEMENTS, TokenStatistics, token_statistics
from bpwise.eval.metrics.estimate import Estimate, confidence_interval, mean_over_rows


def naive(original: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, ...]:
    """KL and both negative log-likelihoods in float64, one token at a time."""
    result = []
    for a, b, target in zip(original.double().numpy(), quantized.double().numpy(), targets.tolist(), strict=True):
        log_p = a - a.max() - np.log(np.exp(a - a.max()).sum())
        log_q = b - b.max() - np.log(np.exp(b - b.max()).sum())
        result.append((np.sum(np.exp(log_p) * (log_p - log_q)), -log_p[target], -log_q[target]))
    return tuple(np.array(column) for column in zip(*result, strict=True))


def logits(tokens: int, vocabulary: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def targets_of(tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(9))


def test_temporaries_stay_with_the_allocator() -> None:
    assert PIECE_ELEMENTS * 4 < _LARGE_BYTES  # of float32; from there on it asks the system each time


class TestTokenStatistics:
    def test_parts_are_put_one_after_another(self) -> None:
        original, quantized, targets = logits(10, 50), logits(10, 50, seed=1), targets_of(10, 50)
        cuts = [slice(0, 3), slice(3, 4), slice(4, 10)]
        parts = (token_statistics(original[cut], quantized[cut], targets[cut]) for cut in cuts)
        joined, whole = TokenStatistics.joined(parts, 10), token_statistics(original, quantized, targets)
        for field in fields(TokenStatistics):
            torch.testing.assert_close(getattr(joined, field.name), getattr(whole, field.name), rtol=0, atol=0)

    @pytest.mark.parametrize("tokens", [1, 64, 131], ids=["one-token", "one-piece", "three-pieces"])
    @pytest.mark.parametrize("noise", [1e-3, 0.3, 5.0], ids=["close", "apart", "far-apart"])
    def test_agrees_with_float64_formulas(self, tokens: int, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bpwise.eval.metrics.divergence.PIECE_ELEMENTS", 64 * 50 + 49)
        original = logits(tokens, 50)
        quantized = original + noise * logits(tokens, 50, spread=1.0, seed=1)
        targets = targets_of(tokens, 50)
        kept = original.clone(), quantized.clone()
        got = token_statistics(original, quantized, targets)
        kl, original_nll, quantized_nll = naive(original, quantized, targets)
        # The logits carry 1e-7 of about 10, so changes of 1e-3 are known to 1e-3 and their squares to 2e-3 at worst.
        np.testing.assert_allclose(got.kl_nats, kl, rtol=5e-3 if noise < 0.01 else 1e-4)
        np.testing.assert_allclose(got.original_nll_nats, original_nll, atol=1e-5)
        np.testing.assert_allclose(got.quantized_nll_nats, quantized_nll, atol=1e-5)
        assert got.same_top1.tolist() == (original.argmax(1) == quantized.argmax(1)).tolist()
        assert got.kl_nats.dtype == torch.float32
        assert got.same_top1.dtype == torch.bool
        assert torch.equal(original, kept[0])
        assert torch.equal(quantized, kept[1])

    @pytest.mark.parametrize("vocabulary", [50, 3], ids=["many", "fewer-than-five"])
    def test_most_likely_tokens(self, vocabulary: int) -> None:
        original = logits(70, vocabulary)
        quantized = original + logits(70, vocabulary, spread=1.0, seed=1)
        got = token_statistics(original, quantized, targets_of(70, vocabulary))
        count = min(5, vocabulary)
        for ours, theirs in ((original, "original"), (quantized, "quantized")):
            p = np.exp(ours.double().numpy())
            p /= p.sum(axis=1, keepdims=True)
            order = np.argsort(-p, axis=1)[:, :count]
            assert getattr(got, f"{theirs}_top").tolist() == order.tolist()
            np.testing.assert_allclose(
                getattr(got, f"{theirs}_top_probabilities"), np.take_along_axis(p, order, axis=1), rtol=1e-5
            )
        pairs = zip(got.original_top.tolist(), got.quantized_top.tolist(), strict=True)
        expected = [len(set(a) & set(b)) / count for a, b in pairs]
        assert got.shared_top5.tolist() == expected
        assert min(expected) < 1 or vocabulary == 3

    def test_change_of_probability(self) -> None:
        original, targets = logits(40, 20), targets_of(40, 20)
        quantized = original + logits(40, 20, spread=1.0, seed=1)
        got = token_statistics(original, quantized, targets).summary(4)
        p, q = (x.double().softmax(1).gather(1, targets[:, None])[:, 0].numpy() for x in (original, quantized))
        assert got.probability_change.value == pytest.approx((q - p).mean(), abs=1e-7)
        assert got.probability_change_rms.value == pytest.approx(np.sqrt(((q - p) ** 2).mean()), rel=1e-5)

    def test_same_logits(self) -> None:
        same = logits(70, 40)
        got = token_statistics(same, same.clone(), targets_of(70, 40))
        assert torch.equal(got.kl_nats, torch.zeros(70))
        assert bool(got.same_top1.all())

    def test_a_shift_of_all_logits_changes_nothing(self) -> None:
        original = logits(8, 1000)
        got = token_statistics(original, original + 100, targets_of(8, 1000))
        # Adding 100 rounds each logit by 4e-6: its square is all that may be left.
        assert float(got.kl_nats.abs().max()) < 1e-10

    def test_probability_that_vanishes(self) -> None:
        # exp(-200) is 0 in float32 and exp(200) infinite: the naive term would be 0 * inf.
        original = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
        quantized = torch.tensor([[-200.0, 0.0], [-200.0, 0.0]])
        got = token_statistics(original, quantized, torch.tensor([0, 1]))
        assert got.kl_nats.tolist() == [200.0, 0.0]
        assert got.quantized_nll_nats.tolist() == [200.0, 0.0]
        assert got.same_top1.tolist() == [False, True]

    def test_half_precision_logits_are_taken_as_they_are(self) -> None:
        original, quantized = logits(5, 30).bfloat16(), logits(5, 30, seed=1).bfloat16()
        targets = targets_of(5, 30)
        got = token_statistics(original, quantized, targets)
        np.testing.assert_allclose(got.kl_nats, naive(original, quantized, targets)[0], rtol=1e-4)

    def test_nan_stays_visible(self) -> None:
        broken = logits(3, 10)
        broken[1, 4] = torch.nan
        got = token_statistics(logits(3, 10), broken, targets_of(3, 10))
        assert got.kl_nats.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("quantized", "targets", "message"),
        [((4, 11), (4,), "quantized logits"), ((4, 10), (3,), "targets"), ((10,), (4,), "quantized logits")],
        ids=["vocabulary", "targets", "rank"],
    )
    def test_refuses_shapes(self, quantized: tuple[int, ...], targets: tuple[int, ...], message: str) -> None:
        with pytest.raises(ShapeError, match=message):
            token_statistics(torch.zeros(4, 10), torch.zeros(quantized), torch.zeros(targets, dtype=torch.int64))


def statistics(rows: int, tokens: int) -> TokenStatistics:
    """Rows that differ more from each other than their tokens do, as rows of text."""
    rng = torch.Generator().manual_seed(3)
    nll = (3 + torch.randn(rows, 1, generator=rng) * 0.5 + torch.randn(rows, tokens, generator=rng) * 0.1).flatten()
    return TokenStatistics(
        kl_nats=torch.rand(rows * tokens, generator=rng) ** 4,
        original_nll_nats=nll,
        quantized_nll_nats=nll + 0.05 + 0.02 * torch.randn(rows * tokens, generator=rng),
        **top(torch.stack([torch.randperm(12, generator=rng) for _ in range(rows * tokens)])),
    )


def top(order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Most likely tokens: the first five of an order are the original's, the quantized model swaps in others."""
    original, quantized = order[:, :5].int(), order[:, :5].int()
    quantized[::3, 4] = order[::3, 7].int()
    quantized[::4] = quantized[::4].roll(1, dims=1)
    probabilities = torch.tensor([0.4, 0.2, 0.1, 0.05, 0.02]).expand(len(order), 5)
    return {
        "original_top": original,
        "original_top_probabilities": probabilities,
        "quantized_top": quantized,
        "quantized_top_probabilities": probabilities,
    }


class TestSummary:
    def test_standard_error_is_clustered_by_row(self) -> None:
        rows, tokens = 5, 30
        values = statistics(rows, tokens).kl_nats
        means = [sum(values[r * tokens + t].item() for t in range(tokens)) / tokens for r in range(rows)]
        mean = sum(means) / rows
        error = math.sqrt(sum((m - mean) ** 2 for m in means) / (rows - 1)) / math.sqrt(rows)
        got = statistics(rows, tokens).summary(rows).kl_nats
        assert got.value == pytest.approx(mean, rel=1e-12)
        assert got.standard_error == pytest.approx(error, rel=1e-12)

    def test_more_tokens_of_the_same_rows_are_no_more_evidence(self) -> None:
        values = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
        assert mean_over_rows(values.repeat(1, 50)) == mean_over_rows(values)

    def test_perplexities_against_the_jackknife(self) -> None:
        rows, tokens = 400, 3
        parts = statistics(rows, tokens)
        original = parts.original_nll_nats.double().view(rows, tokens).numpy()
        quantized = parts.quantized_nll_nats.double().view(rows, tokens).numpy()
        got = parts.summary(rows)
        functions = {
            "original_perplexity": lambda a, b: np.exp(a.mean()),
            "quantized_perplexity": lambda a, b: np.exp(b.mean()),
            "perplexity_ratio": lambda a, b: np.exp(b.mean()) / np.exp(a.mean()),
            "perplexity_difference": lambda a, b: np.exp(b.mean()) - np.exp(a.mean()),
            "probability_change": lambda a, b: (np.exp(-b) - np.exp(-a)).mean(),
            "probability_change_rms": lambda a, b: np.sqrt(((np.exp(-b) - np.exp(-a)) ** 2).mean()),
        }
        for name, function in functions.items():
            left_out = np.array(
                [function(np.delete(original, row, axis=0), np.delete(quantized, row, axis=0)) for row in range(rows)]
            )
            error = math.sqrt((rows - 1) / rows * np.sum((left_out - left_out.mean()) ** 2))
            assert getattr(got, name).value == pytest.approx(function(original, quantized), rel=1e-12)
            # The delta method is the jackknife's first order: they differ by about 1 / rows.
            assert getattr(got, name).standard_error == pytest.approx(error, rel=0.02)

    def test_percentiles_and_agreement(self) -> None:
        parts = statistics(7, 11)
        got = parts.summary(7)
        ordered = sorted(parts.kl_nats.tolist())
        shares = {"kl_median_nats": 0.5, "kl_p90_nats": 0.9, "kl_p99_nats": 0.99, "kl_p999_nats": 0.999}
        for name, share in shares.items():
            place = share * (len(ordered) - 1)
            low = math.floor(place)
            expected = ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])
            assert getattr(got, name) == pytest.approx(expected, rel=1e-9)
        assert got.kl_max_nats == ordered[-1]
        pairs = list(zip(parts.original_top.tolist(), parts.quantized_top.tolist(), strict=True))
        assert got.top1_agreement.value == pytest.approx(sum(a[0] == b[0] for a, b in pairs) / 77)
        assert got.top5_agreement.value == pytest.approx(sum(len(set(a) & set(b)) for a, b in pairs) / 5 / 77)
        assert got.top1_agreement.value < 1 > got.top5_agreement.value

    def test_a_single_row_has_no_standard_error(self) -> None:
        got = statistics(1, 20).summary(1)
        for name in ("original_perplexity", "perplexity_ratio", "perplexity_difference", "kl_nats", "top1_agreement"):
            assert getattr(got, name).standard_error is None
        assert Estimate(1.0, None).scaled(3.0, 2.0) == Estimate(3.0, None)
        assert confidence_interval(got.kl_nats, 1) is None

    @pytest.mark.parametrize("rows", [3, 50], ids=["remainder", "more-rows-than-tokens"])
    def test_refuses_rows_that_do_not_divide(self, rows: int) -> None:
        with pytest.raises(ShapeError, match="token statistics"):
            statistics(4, 5).summary(rows)

    @pytest.mark.parametrize("nll", [800.0, 360.0, math.nan], ids=["huge", "square-overflows", "nan"])
    def test_broken_model(self, nll: float) -> None:
        parts = TokenStatistics(
            kl_nats=torch.zeros(4),
            original_nll_nats=torch.ones(4),
            quantized_nll_nats=torch.full((4,), nll),
            **top(torch.arange(12).expand(4, 12)),
        )
        with pytest.raises(NumericalError, match="quantized model: mean negative log-likelihood"):
            parts.summary(2)


@pytest.mark.parametrize("rows", [2, 3, 6, 16, 61])
def test_confidence_interval_against_the_density(rows: int) -> None:
    # Student's density, integrated numerically from the lower end of the interval to the upper.
    got = confidence_interval(Estimate(3.0, 0.5), rows)
    assert got is not None
    assert (got.low + got.high) / 2 == pytest.approx(3.0)
    n = rows - 1
    reach = (got.high - 3.0) / 0.5
    t = np.linspace(-reach, reach, 400_001)
    scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
    density = scale * (1 + t * t / n) ** (-(n + 1) / 2)
    assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-6)
    assert got.excludes_zero == (got.low > 0)
