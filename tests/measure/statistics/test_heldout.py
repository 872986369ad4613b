import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.rounding.feedback import round_linear
from bpwise.measure.statistics.heldout import DAMPINGS, HeldOut, cross_validate_damping
from torch import Tensor

ROWS, OUTPUTS = 96, 40


def tokens(count: int, seed: int) -> Tensor:
    """Inputs that lie near a few directions, as activations do."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(9))
    mixing *= torch.logspace(0, -1.5, ROWS)[:, None]
    return torch.randn(count, ROWS, generator=rng) @ mixing


def gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def judged(count: int, **options: tuple[float, ...]) -> HeldOut:
    weight = torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(3)) * 0.05
    halves = [gram(tokens(count // 2, seed)) for seed in (1, 2)]
    fishers = [torch.ones(10), torch.ones(30)]
    return cross_validate_damping([weight[:, :10], weight[:, 10:]], halves, fishers, **options)


def damage(fit: Tensor, other: Tensor, damping: float) -> tuple[float, float]:
    """Damage of rounding on one Gram matrix, by its definition: as the damped matrix has it, and on another one."""
    weight = torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(3)) * 0.05
    damped = fit.double() + damping * fit.diagonal().mean() * torch.eye(ROWS)
    order = fit.diagonal().argsort(descending=True)
    upper = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)).float()
    linear, _ = round_linear(weight, upper, [RowGroup(4, 32)] * 3, order, torch.ones(OUTPUTS))
    change = linear.dequantize().T.double() - weight
    return tuple(float((change * (matrix @ change)).sum()) for matrix in (damped, other.double()))


def test_fewer_tokens_need_more_damping_and_are_trusted_less() -> None:
    assert judged(60).damping > judged(20000).damping == DAMPINGS[0]
    few, many = (judged(count, dampings=(0.02,)) for count in (60, 20000))
    assert few.generalization_ratio > 1.5
    assert many.generalization_ratio < 1  # what is reported includes the damping


def test_the_choice_is_the_best_on_the_other_half() -> None:
    first, second = (gram(tokens(60, seed)) for seed in (1, 2))
    costs = {damping: damage(first, second, damping)[1] for damping in DAMPINGS}
    assert costs[judged(120).damping] < 1.02 * min(costs.values()) < 0.9 * max(costs.values())


def test_every_second_channel_of_many_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [judged(count) for count in (60, 400)]
    assert whole[0].damping > whole[1].damping
    monkeypatch.setattr("bpwise.measure.statistics.heldout.FEW_CHANNELS", ROWS - 1)
    assert [judged(count).damping for count in (60, 400)] == [each.damping for each in whole]


def test_random_signs_say_what_all_directions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = judged(200)
    monkeypatch.setattr("bpwise.measure.statistics.heldout.FEW_DIRECTIONS", ROWS - 1)
    monkeypatch.setattr("bpwise.measure.statistics.heldout.SIGNS", 20)
    rough = judged(200)
    assert rough.damping == exact.damping
    assert rough.generalization_ratio == pytest.approx(exact.generalization_ratio, rel=0.03)
    assert rough != exact


def test_inflation_is_what_unseen_tokens_show() -> None:
    for count in (60, 100, 200, 400, 1000):
        chosen = judged(count)
        fit = gram(torch.cat([tokens(count // 2, 1), tokens(count // 2, 2)]))
        reported, unseen = damage(fit, gram(tokens(20000, 5)), chosen.damping)
        # One cut of the tokens; and the law holds for small excesses.
        assert chosen.generalization_ratio == pytest.approx(unseen / reported, rel=0.15)


def test_a_given_damping_is_kept() -> None:
    assert judged(60, dampings=(0.33,)).damping == 0.33


@pytest.mark.parametrize("few", [1024, ROWS - 1])
def test_tokens_that_act_together_hurt_more(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.measure.statistics.heldout.FEW_DIRECTIONS", few)
    weight = torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(3)) * 0.05
    halves = [gram(tokens(100, seed)) for seed in (1, 2)]
    alone = cross_validate_damping([weight], halves, [torch.ones(OUTPUTS)])
    # Sequences of four tokens that are the same, with the same gradients, do four times the damage of four tokens.
    rows = [2 * torch.linalg.cholesky(half.double() + 1e-9 * torch.eye(ROWS)).float() for half in halves]
    together = cross_validate_damping([weight], halves, [torch.ones(OUTPUTS)], row_gradients=rows)
    assert together.damping == alone.damping
    assert together.generalization_ratio == pytest.approx(4 * alone.generalization_ratio, rel=1e-3)


def test_nothing_to_hold_out() -> None:
    weight = torch.ones(ROWS, OUTPUTS)
    halves = [gram(tokens(50, 1)), torch.zeros(ROWS, ROWS)]
    assert cross_validate_damping([weight], halves, [torch.ones(OUTPUTS)]) == HeldOut(0.2, 1.0)
    assert cross_validate_damping([weight], halves, [torch.ones(OUTPUTS)], dampings=(0.1,)) == HeldOut(0.1, 1.0)


def test_damage_too_small_for_float32() -> None:
    halves = [1e-10 * gram(tokens(50, seed)) for seed in (1, 2)]
    found = cross_validate_damping([torch.full((ROWS, OUTPUTS), 1e-4)], halves, [torch.full((OUTPUTS,), 1e-37)])
    assert found.generalization_ratio == 1.0
    assert found.damping in DAMPINGS
