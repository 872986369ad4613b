"""Work and the rates of a device: sums, what runs side by side, and a clock that is told the time."""

import threading
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from bpwise.linalg.work import Elements, Factors, FreshElements, Kind, Products, Rates, Sample, Solves, Work

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@dataclass(frozen=True)
class Waiting(Kind):
    """Takes 0.02 s for 4 units; every third time 5 s."""

    name: str

    def sample(self, device: torch.device) -> Sample:
        runs = iter(range(1000))

        def run() -> None:
            CLOCK.now += 5.0 if next(runs) % 3 == 2 else 0.02

        return Sample(run, 4.0)


def test_works_add_up() -> None:
    first, second = Work({Waiting("a"): 1.0, Waiting("b"): 2.0}), Work({Waiting("b"): 3.0})
    assert (first + second).amounts == {Waiting("a"): 1.0, Waiting("b"): 5.0}
    assert (first * 3).amounts == {Waiting("a"): 3.0, Waiting("b"): 6.0}


def test_side_by_side_on_the_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.linalg.work.cores", lambda: 4)
    work = Work({Waiting("a"): 12.0})
    assert work.beside_others(3, CPU).amounts == {replace(Waiting("a"), side_by_side=3): 4.0}
    assert work.beside_others(20, CPU).amounts == {replace(Waiting("a"), side_by_side=4): 3.0}
    assert work.beside_others(20, torch.device("meta")) == work  # one after another


@dataclass(frozen=True)
class Meeting(Kind):
    """Ends only where another one runs at the same time."""

    def sample(self, device: torch.device) -> Sample:
        return Sample(partial(threading.Barrier(2).wait, 60.0), 1.0)


def test_what_runs_side_by_side_is_timed_so(timed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.linalg.parallel.cores", lambda: 2)
    monkeypatch.setattr("bpwise.linalg.work._SAMPLE_SECONDS", 0.0)  # as often in both
    assert Rates(CPU).seconds(Work({Meeting(side_by_side=2): 1.0})) >= 0


def test_the_quickest_run_counts_and_how_much_longer_all_took(timed: None) -> None:
    rates = Rates(CPU, CLOCK)
    # Runs: one that does not count, then 0.02 and 5 seconds.
    assert rates.seconds(Work({Waiting("a"): 8.0})) == pytest.approx(8 * 0.02 / 4 * 5.02 / 0.04)


def test_every_kind_is_timed_once(timed: None) -> None:
    rates = Rates(CPU, CLOCK)
    rates.learn(Work({Waiting("a"): 8.0}))
    before = CLOCK.now
    rates.learn(Work({Waiting("a"): 1.0}))
    assert CLOCK.now == before


def test_products_of_nearly_the_same_shape_are_one_kind() -> None:
    both = Products.work(1000, 600, 60_000) + Products.work(1024, 577, 49_152)
    assert both.amounts == {Products(1024, 1024, 2048): 2.0 * (1000 * 600 * 60_000 + 1024 * 577 * 49_152)}


def operations(work: Work) -> float:
    return sum(amount for kind, amount in work.amounts.items() if not isinstance(kind, Elements))


@pytest.mark.parametrize("channels", [64, 1024, 6144])
def test_large_factors_and_systems_are_blocks_and_products(channels: int) -> None:
    assert operations(Solves.work(channels, 128)) == pytest.approx(channels**2 * 128)
    beyond = max(0, channels - 1024)
    assert operations(Factors.work(channels)) == pytest.approx(channels**3 / 3 + 256 * channels * beyond)


@pytest.mark.parametrize(
    "kind",
    [
        Products(4, 8, 16),
        Products(4, 8, 16, torch.float64),
        Factors(64),
        Solves(16, 1),
        Solves(64, 64),
        Elements(),
        FreshElements(64),
    ],
    ids=str,
)
def test_the_common_kinds_can_be_timed(kind: Kind, timed: None) -> None:
    rates = Rates(CPU)
    assert 0 < rates.seconds(Work({kind: 1.0})) < 1e-3
    assert 0 < rates.seconds(Work({replace(kind, side_by_side=1): 1.0})) < 1e-3


@dataclass(frozen=True)
class Refused(Kind):
    """A device does not have it."""

    def sample(self, device: torch.device) -> Sample:
        raise NotImplementedError("not on this device")


def test_what_cannot_be_timed_does_not_end_a_run(timed: None) -> None:
    assert Rates(CPU, CLOCK).seconds(Work({Refused(): 5.0, Waiting("a"): 8.0})) > 0
