"""How long each stage took and how much memory it needed."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["StageClock", "StageCost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one stage took.

    Attributes:
        stage: Its name.
        seconds: Wall-clock time.
        peak_bytes: Largest resident memory of the process while the stage ran; where the system cannot reset its
            counter (outside Linux), the largest so far.
    """

    stage: str
    seconds: float
    peak_bytes: int


class StageClock:
    """Collects the costs of stages as they run.

    Attributes:
        costs: The finished stages, in order.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.costs: list[StageCost] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body as one stage."""
        _reset_peak()
        started = time.perf_counter()
        yield
        self.costs.append(StageCost(stage=name, seconds=time.perf_counter() - started, peak_bytes=_peak_bytes()))


def _reset_peak() -> None:
    # Linux: writing 5 resets the high-water mark of resident memory (man 5 proc, clear_refs).
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
