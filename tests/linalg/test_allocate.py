import itertools

import numpy as np
import pytest
from bpwise.linalg.allocate import Allocation, allocate
from numpy.typing import NDArray

WIDTHS = np.array([8, 6, 4, 3, 2])
CURVES = ["convex", "monotone", "any"]


def instance(seed: int, curve: str, groups: int) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Damage, bits and a budget between the smallest and the largest possible."""
    rng = np.random.default_rng(seed)
    shape = (groups, len(WIDTHS))
    if curve == "convex":  # a factor of about four per bit, as rounding errors have
        damage = rng.random((groups, 1)) * 4.0**-WIDTHS * rng.uniform(0.9, 1.1, shape)
    elif curve == "monotone":
        damage = np.sort(rng.random(shape), axis=1)
    else:
        damage = rng.random(shape)
    bits = rng.integers(1, 5, (groups, 1)) * 32 * WIDTHS
    return damage, bits, int(rng.integers(bits.min(axis=1).sum(), bits.max(axis=1).sum() + 1))


def brute_force(damage: NDArray[np.float64], bits: NDArray[np.int64], budget: int) -> float:
    rows = range(len(damage))
    return min(
        sum(damage[row, option] for row, option in zip(rows, choice, strict=True))
        for choice in itertools.product(range(damage.shape[1]), repeat=len(damage))
        if sum(int(bits[row, option]) for row, option in zip(rows, choice, strict=True)) <= budget
    )


def assert_consistent(found: Allocation, damage: NDArray[np.float64], bits: NDArray[np.int64], budget: int) -> None:
    chosen = [(row, int(option)) for row, option in enumerate(found.choice)]
    assert len(chosen) == len(damage)
    assert found.bits == sum(int(bits[place]) for place in chosen) <= budget
    assert found.damage == pytest.approx(sum(damage[place] for place in chosen))


@pytest.mark.parametrize("curve", CURVES)
def test_against_brute_force(curve: str) -> None:
    exact = 0
    for seed in range(60):
        damage, bits, budget = instance(seed, curve, groups=1 + seed % 5)
        found = allocate(damage, bits, budget)
        assert_consistent(found, damage, bits, budget)
        best = brute_force(damage, bits, budget)
        slack = 1e-12 * damage.max()  # float64 sums in another order
        assert found.lower_bound <= best + slack
        assert best <= found.damage + slack
        # The relaxation differs from a choice in one step of one group, which can at most save all that group has.
        assert found.damage <= found.lower_bound + (damage.max(axis=1) - damage.min(axis=1)).max() + slack
        exact += found.damage <= best + slack
    # A knapsack of so few and large pieces is not always solved by the best saving per bit, but mostly.
    assert exact >= 42


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("reverse", [False, True], ids=["widths-falling", "widths-rising"])
def test_many_groups_come_close_to_the_bound(curve: str, reverse: bool) -> None:
    damage, bits, budget = instance(0, curve, groups=3000)
    if reverse:
        damage, bits = damage[:, ::-1], bits[:, ::-1]
    found = allocate(damage, bits, budget)
    assert_consistent(found, damage, bits, budget)
    # One step of 3000 is left over at most; the bound holds by duality, as the test above proves where it can.
    assert found.lower_bound <= found.damage <= 1.001 * found.lower_bound


def test_order_of_options_does_not_matter() -> None:
    damage, bits, budget = instance(5, "any", groups=50)
    one = allocate(damage, bits, budget)
    other = allocate(damage[:, ::-1], bits[:, ::-1], budget)
    assert np.array_equal(one.choice, len(WIDTHS) - 1 - other.choice)
    assert one.lower_bound == pytest.approx(other.lower_bound)


def test_budget_for_the_smallest_only() -> None:
    damage, bits, _ = instance(1, "monotone", groups=20)
    found = allocate(damage, bits, int(bits.min(axis=1).sum()))
    assert np.array_equal(found.choice, np.full(20, 4))
    assert found.lower_bound <= found.damage


@pytest.mark.parametrize("curve", CURVES)
def test_options_that_may_not_be_taken(curve: str) -> None:
    exact = 0
    for seed in range(60):
        damage, bits, _ = instance(seed, curve, groups=1 + seed % 5)
        rng = np.random.default_rng(seed)
        allowed = rng.random(damage.shape) < 0.6
        allowed[np.arange(len(damage)), rng.integers(0, len(WIDTHS), len(damage))] = True
        damage = np.where(allowed, damage, np.inf)
        least = np.where(allowed, bits, bits.max()).min(axis=1).sum()
        most = np.where(allowed, bits, 0).max(axis=1).sum()
        budget = int(rng.integers(least, most + 1))
        found = allocate(damage, bits, budget)
        assert_consistent(found, damage, bits, budget)
        best = brute_force(damage, bits, budget)
        assert found.lower_bound <= best + 1e-12
        assert best <= found.damage + 1e-12 < np.inf
        exact += found.damage <= best + 1e-12
    assert exact >= 42


@pytest.mark.parametrize("curve", CURVES)
def test_more_than_enough_budget(curve: str) -> None:
    damage, bits, _ = instance(2, curve, groups=20)
    found = allocate(damage, bits, 10 * int(bits.max(axis=1).sum()))
    assert np.array_equal(found.choice, damage.argmin(axis=1))
    assert found.damage == pytest.approx(found.lower_bound)
    # Bits that save nothing are not spent.
    assert found.bits == int(bits[np.arange(20), damage.argmin(axis=1)].sum())


def test_bits_that_save_nothing_are_not_spent() -> None:
    damage = np.array([[1.0, 1.0, 1.0], [5.0, 2.0, 3.0]])
    bits = np.array([[80, 60, 20], [80, 60, 20]])
    found = allocate(damage, bits, 160)
    assert found.choice.tolist() == [2, 1]
    assert found.bits == 80


def test_dent_in_a_curve_is_stepped_over() -> None:
    # 3 bits save hardly anything over 2, 4 bits much: the hull goes from 2 to 4 at once.
    damage = np.array([[0.1, 0.95, 1.0], [0.1, 0.95, 1.0]])
    bits = np.array([[40, 30, 20], [40, 30, 20]])
    assert sorted(allocate(damage, bits, 60).choice.tolist()) == [0, 2]
    # What is left over still buys a point that is not on the hull.
    assert sorted(allocate(damage, bits, 70).choice.tolist()) == [0, 1]
    assert allocate(damage, bits, 50).choice.tolist() in ([1, 2], [2, 1])


def test_step_that_does_not_fit_does_not_stop_smaller_ones() -> None:
    # The large group saves most per bit, but there is no room for it.
    damage = np.array([[0.0, 1000.0], [0.0, 1.0], [0.0, 1.0]])
    bits = np.array([[200, 100], [4, 2], [4, 2]])
    found = allocate(damage, bits, 108)
    assert found.choice.tolist() == [1, 0, 0]
    assert found.lower_bound <= 1000.0


def test_arguments_are_left_alone() -> None:
    damage, bits, budget = instance(3, "any", groups=10)
    before = damage.copy(), bits.copy()
    allocate(damage, bits, budget)
    assert np.array_equal(damage, before[0])
    assert np.array_equal(bits, before[1])


def test_all_zero_damage() -> None:
    found = allocate(np.zeros((3, 5)), np.tile(WIDTHS * 32, (3, 1)), 1000)
    assert found.damage == found.lower_bound == 0
    assert found.choice.tolist() == [4, 4, 4]
