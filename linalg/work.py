"""Amounts of work by kind, and the seconds that they take on a device: what forecasts of time are made of."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from .hessian import factor_hessian
from .parallel import cores, run_all
from .products import float32_products

__all__ = ["Elements", "Factors", "FreshElements", "Kind", "Products", "Rates", "Sample", "Solves", "Work", "rates_of"]

_SAMPLE_FLOPS = 3e8
"""Operations of one sample of products: some milliseconds on one core of a processor."""

_SAMPLE_SECONDS = 0.01
"""A sample runs again until it took as long."""

_LEAST_RUNS = 2
"""It runs at least so often, after once that does not count."""

_LONG_SECONDS = 0.1
"""What takes so long runs only once."""

_LARGEST_SAMPLE = 2048
"""Rows and columns of a sampled product: larger ones are as fast."""

_MOST_CHANNELS = 1024
"""Channels of a sampled Gram matrix or triangular system. Larger ones are taken for blocks of so many on the diagonal,
and products for all else."""

_FACTOR_BLOCK = 256
"""Columns that are factored together (``hessian``)."""

_MOST_FRESH, _FRESH_TENSORS = 1 << 23, 6
"""Elements of the largest new tensor of a sample, and how many are held: more than the allocator keeps."""

_ELEMENTS = 1 << 22
"""Elements of a sample: more than fit into a processor's cache."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A piece of work that can be timed.

    Attributes:
        run: Does it, once.
        units: How much it is, in its kind's units.
    """

    run: Callable[[], object]
    units: float


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of work whose seconds grow with its amount. Subclasses are frozen dataclasses: equal ones are timed once.

    Attributes:
        side_by_side: Tasks of it that ``run_all`` runs at a time, each on one core, where cores share memory and often
            more; 0 for work that has the whole device.
    """

    side_by_side: int = field(default=0, kw_only=True)

    @abstractmethod
    def sample(self, device: torch.device) -> Sample:
        """Return a small piece of it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts of several kinds of work, done one after another.

    Attributes:
        amounts: Units of each kind.
    """

    amounts: Mapping[Kind, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        amounts = dict(self.amounts)
        for kind, amount in other.amounts.items():
            amounts[kind] = amounts.get(kind, 0.0) + amount
        return Work(amounts)

    def __mul__(self, times: float) -> Work:
        """Return it done several times."""
        return Work({kind: times * amount for kind, amount in self.amounts.items()})

    def beside_others(self, tasks: int, device: torch.device) -> Work:
        """Return what it takes of the time, if ``run_all`` does it in so many tasks of equal size."""
        if device.type != "cpu":
            return self
        together = min(tasks, cores())
        return Work({replace(kind, side_by_side=together): amount / together for kind, amount in self.amounts.items()})


class Rates:
    """Seconds of one unit of each kind of work on a device.

    Each kind takes what it took in the quickest of some runs; and all of them together so much longer as all runs took
    longer than that, since something else may be running.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with nothing timed.

        Args:
            device: Where work is done.
            clock: Returns seconds.
        """
        self._device = device
        self._clock = clock
        self._unit_seconds: dict[Kind, float] = {}
        self._quickest = self._taken = 0.0

    def learn(self, work: Work) -> None:
        """Time the kinds of some work that were not timed before."""
        for kind in work.amounts.keys() - self._unit_seconds.keys():
            try:
                with torch.no_grad(), float32_products(self._device):
                    sample = kind.sample(self._device)
                    runs = self._timed(sample.run, kind.side_by_side)
            except (torch.OutOfMemoryError, NotImplementedError):
                self._unit_seconds[kind] = 0.0  # a forecast is not worth the run
                continue
            self._unit_seconds[kind] = min(runs) / sample.units
            self._quickest += min(runs) * len(runs)
            self._taken += sum(runs)

    def seconds(self, work: Work) -> float:
        """Return what some work takes, kinds that were not timed before included."""
        self.learn(work)
        slowdown = self._taken / self._quickest if self._quickest else 1.0
        return slowdown * sum(amount * self._unit_seconds[kind] for kind, amount in work.amounts.items())

    def _timed(self, run: Callable[[], object], side_by_side: int) -> list[float]:
        def once() -> float:
            self._wait()
            start = self._clock()
            run()
            self._wait()
            return self._clock() - start

        def timed() -> list[float]:
            first = once()  # loads kernels, and takes memory
            if first > _LONG_SECONDS:
                return [min(first, once())]
            runs = [once() for _ in range(_LEAST_RUNS)]
            while sum(runs) < _SAMPLE_SECONDS:
                runs.append(once())
            return runs

        return run_all([timed] * side_by_side, self._device)[0] if side_by_side else timed()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


@cache
def rates_of(device: torch.device) -> Rates:
    """Return the rates of a device, which are timed once a process."""
    return Rates(device)


@dataclass(frozen=True)
class Products(Kind):
    """Matrix products; unit: an operation, two for every element of one matrix and column of the other.

    Attributes:
        rows: Rows of the first matrix.
        inner: Its columns.
        columns: Columns of the second.
        dtype: Of both.
    """

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def work(cls, rows: float, inner: float, columns: float, dtype: torch.dtype = torch.float32) -> Work:
        """Return one product of matrices of these sizes."""
        kind = cls(_rounded(rows), _rounded(inner), _rounded(columns), dtype)
        return Work({kind: 2.0 * rows * inner * columns})

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        rows = max(1, min(self.rows, int(_SAMPLE_FLOPS / 2 / self.inner / self.columns)))
        first = torch.ones(rows, self.inner, dtype=self.dtype, device=device)
        second = torch.ones(self.columns, self.inner, dtype=self.dtype, device=device).T
        return Sample(partial(torch.matmul, first, second), 2.0 * rows * self.inner * self.columns)


@dataclass(frozen=True)
class Factors(Kind):
    """Cholesky factors of damped Gram matrices; unit: an operation, K^3 / 3 for K channels.

    Attributes:
        channels: K.
    """

    channels: int

    @classmethod
    def work(cls, channels: int) -> Work:
        """Return one factor."""
        block = min(channels, _MOST_CHANNELS)
        work = Work({cls(block): channels * block**2 / 3})
        if channels == block:
            return work
        rest = channels * (channels**2 - block**2) / 3 + _FACTOR_BLOCK * channels * (channels - block)
        products = Products.work(block, channels, _FACTOR_BLOCK)
        return work + products * (rest / (2.0 * block * channels * _FACTOR_BLOCK)) + Elements.work(4 * channels**2)

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        gram = torch.eye(self.channels, device=device) + 0.1
        return Sample(partial(factor_hessian, gram, 0.1), self.channels**3 / 3)


@dataclass(frozen=True)
class Solves(Kind):
    """Solutions of triangular systems; unit: an operation, K^2 for each column.

    Attributes:
        channels: K.
        columns: Columns.
    """

    channels: int
    columns: int

    @classmethod
    def work(cls, channels: int, columns: int) -> Work:
        """Return one system of K channels and so many columns."""
        block = min(channels, _MOST_CHANNELS)
        work = Work({cls(_rounded(block), min(_rounded(columns), block)): float(channels) * block * columns})
        return work + Products.work(block, channels, columns) * ((channels - block) / 2 / block)

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        size = self.channels
        upper = torch.eye(size, device=device) + torch.ones(size, size, device=device).triu(1) / size
        values = torch.ones(size, self.columns, device=device)
        run = partial(torch.linalg.solve_triangular, upper, values, upper=True)
        return Sample(run, float(size) ** 2 * self.columns)


@dataclass(frozen=True)
class Elements(Kind):
    """Operations on every element of large tensors, as sums, norms and activations are; unit: an element."""

    @classmethod
    def work(cls, elements: float) -> Work:
        """Return one operation on so many elements."""
        return Work({cls(): float(elements)})

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        values = torch.ones(_ELEMENTS, device=device)
        return Sample(partial(torch.mul, values, values, out=torch.empty_like(values)), _ELEMENTS)


@dataclass(frozen=True)
class FreshElements(Kind):
    """Operations on every element of large tensors whose results are new tensors; unit: an element.

    Allocators take the memory of large ones from the system each time, which costs more than the operation.

    Attributes:
        together: Elements of a tensor.
    """

    together: int

    @classmethod
    def work(cls, elements: float, together: int) -> Work:
        """Return one operation on so many elements, some of them together."""
        return Work({cls(min(together, _MOST_FRESH)): float(elements)})

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        values = torch.ones(self.together, device=device)
        return Sample(lambda: [values * values for _ in range(_FRESH_TENSORS)], _FRESH_TENSORS * self.together)


def _rounded(size: float) -> int:
    # To a power of two: shapes that are nearly alike are timed once.
    return min(_LARGEST_SAMPLE, 1 << max(0, round(size) - 1).bit_length())
