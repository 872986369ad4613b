import itertools

import numpy as np
import pytest
from bpwise.linalg import knapsack
from bpwise.linalg.knapsack import choose
from numpy.typing import NDArray

Items = tuple[list[NDArray[np.float64]], list[NDArray[np.int64]]]


def items(count: int, options: int, seed: int) -> Items:
    rng = np.random.default_rng(seed)
    sizes = [np.sort(rng.integers(1, 40, options))[::-1].astype(np.int64) * rng.integers(1, 5) for _ in range(count)]
    damages = [rng.random() * np.exp(-size / 20.0) * rng.uniform(0.8, 1.2, options) for size in sizes]
    return damages, sizes


def best_by_enumeration(damages: list[NDArray[np.float64]], sizes: list[NDArray[np.int64]], budget: int) -> float:
    choices = itertools.product(*(range(len(size)) for size in sizes))
    return min(
        sum(damage[o] for damage, o in zip(damages, choice, strict=True))
        for choice in choices
        if sum(size[o] for size, o in zip(sizes, choice, strict=True)) <= budget
    )


def taken(choice: knapsack.Choice, sizes: list[NDArray[np.int64]]) -> int:
    return sum(int(size[o]) for size, o in zip(sizes, choice.options, strict=True))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fill", [0.0, 0.2, 0.5, 0.9, 1.5])
def test_finds_the_best_of_all_choices(seed: int, fill: float) -> None:
    damages, sizes = items(5, 4, seed)
    least, most = sum(int(size.min()) for size in sizes), sum(int(size.max()) for size in sizes)
    budget = int(least + fill * (most - least))
    found = choose(damages, sizes, budget)
    assert taken(found, sizes) <= budget
    assert found.damage == pytest.approx(best_by_enumeration(damages, sizes, budget), rel=1e-9)
    assert found.lower_bound == found.damage
    assert found.damage == pytest.approx(sum(d[o] for d, o in zip(damages, found.options, strict=True)))


def test_never_takes_what_does_not_fit() -> None:
    damages, sizes = items(6, 4, 0)
    for damage in damages:
        damage[1] = np.inf
    found = choose(damages, sizes, sum(int(size.max()) for size in sizes))
    assert 1 not in found.options


def test_options_of_equal_size() -> None:
    damages = [np.array([3.0, 1.0, 2.0])] * 2
    sizes = [np.array([5, 5, 5])] * 2
    assert choose(damages, sizes, 10).options == (1, 1)


def test_a_model_of_hundreds_of_tensors_is_solved_to_the_end() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([8.5, 6.5625, 6.0, 5.5, 5.0, 4.5, 4.25, 3.4375, 2.625])
    weights = rng.choice([576 * 576, 576 * 192, 576 * 1536], 210)
    sizes = [(weight * bits / 8).astype(np.int64) for weight in weights]
    damages = [10 ** rng.uniform(-4, -2) * 4.0**-bits * rng.uniform(0.8, 1.2, len(bits)) for _ in weights]
    found = choose(damages, sizes, int(sum(weights) * 4.6 / 8))
    assert found.lower_bound == found.damage
    assert taken(found, sizes) <= sum(weights) * 4.6 / 8


def test_says_so_where_it_could_not_look_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    damages, sizes = items(12, 6, 1)
    budget = int(sum(int(size.min()) for size in sizes) * 1.7)
    best = choose(damages, sizes, budget)
    monkeypatch.setattr(knapsack, "_MOST_STATES", 3)
    found = choose(damages, sizes, budget)
    assert taken(found, sizes) <= budget
    assert found.lower_bound <= best.damage <= found.damage
