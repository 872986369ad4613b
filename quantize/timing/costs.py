"""Time and memory of each step."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...tables import bytes_text

__all__ = ["StepClock", "StepCost", "cost_line", "cost_section", "minutes"]

_SAMPLING_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Cost of one step.

    Attributes:
        step: Its name.
        seconds: Wall-clock time.
        peak_bytes: Largest resident memory of the process while the step ran: exact where it is the largest of the
            whole run, else the largest of 20 samples a second. Outside Linux, the largest so far.
    """

    step: str
    seconds: float
    peak_bytes: int


def cost_line(cost: StepCost) -> str:
    """Return a step's cost as a line for a terminal."""
    return f"step        {cost.step:18} {cost.seconds:8.1f} s  {bytes_text(cost.peak_bytes):>10}"


def minutes(seconds: float) -> str:
    """Return a time for a terminal."""
    return f"{seconds / 60:.1f} min"


def cost_section(costs: Sequence[StepCost]) -> dict[str, dict[str, str | float]]:
    """Return what a report says of the steps' costs: section -> entry -> value."""
    entries: dict[str, str | float] = {
        cost.step: f"{cost.seconds:.1f} s, {bytes_text(cost.peak_bytes)}" for cost in costs
    }
    return {"Steps (time, peak of memory)": entries}


class StepClock:
    """Collects the costs of steps as they run.

    Attributes:
        costs: The finished steps, in order.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.costs: list[StepCost] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the body as one step; what it freed goes back to the system."""
        sampler = _Sampler()
        before = _highest_bytes()
        started = time.perf_counter()
        sampler.start()
        try:
            yield
        finally:
            sampler.stop()
        highest = _highest_bytes()
        peak = highest if highest > before or not sampler.peak_bytes else sampler.peak_bytes
        self.costs.append(StepCost(step=name, seconds=time.perf_counter() - started, peak_bytes=peak))
        _give_back_freed()


def _give_back_freed() -> None:
    # glibc keeps small blocks that were freed in the heaps of a dozen threads, where the next step may not find them:
    # its peak would come on top of what earlier steps left. Source: malloc_trim(3).
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class _Sampler(threading.Thread):
    """Watches the resident memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = _resident_bytes()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLING_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _highest_bytes() -> int:
    # The kernel's high-water mark. It could be reset for each step, but then `time -v` would report too little.
    highest = _status_bytes("VmHWM")
    if highest:
        return highest
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field: str) -> int:
    # 0 where there is no such file (outside Linux).
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
