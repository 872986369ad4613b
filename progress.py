"""How the stages report progress: they wrap what they go through in a function that the caller chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["ExpectedPart", "Progress", "RunForecast", "RunProgress", "seconds_by_step", "silent"]


class Progress(Protocol):
    """Wraps the items of a step, as ``tqdm.tqdm`` does."""

    def __call__(self, items: Sequence[Any], step: str) -> Iterable[Any]:
        """Return an iterable over ``items`` that shows how far ``step`` has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPart:
    """A part of a run that is to come.

    Attributes:
        step: The step that it belongs to: ``prepare``, ``calibrate``, ``measure``, ``round``, ``write``, ``evaluate``.
        label: What ``Progress`` is called with; a part that reports no progress has a name of its own.
        seconds: What is left of it, as expected.
        done: Share of its items that an earlier run has finished, 0 to 1.
    """

    step: str
    label: str
    seconds: float
    done: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """What a whole run will take from now on.

    Attributes:
        parts: Its parts, in order.
        memory_bytes: Expected peak of memory; None where it was not forecast.
        disk_bytes: Expected peak of the work directory; likewise.
    """

    parts: tuple[ExpectedPart, ...]
    memory_bytes: int | None = None
    disk_bytes: int | None = None


@runtime_checkable
class RunProgress(Progress, Protocol):
    """Progress that shows how far the whole run is; only for it the device's speed is measured."""

    def expect(self, forecast: RunForecast) -> None:
        """Take what the run will take, once, before its first step."""


def seconds_by_step(parts: Iterable[ExpectedPart]) -> dict[str, float]:
    """Return the expected seconds of each step, in the order of the steps; without those of which nothing is left."""
    steps: dict[str, float] = {}
    for part in parts:
        if part.seconds > 0:
            steps[part.step] = steps.get(part.step, 0.0) + part.seconds
    return steps


def silent(items: Sequence[Any], step: str) -> Iterable[Any]:
    """Show nothing."""
    del step
    return items
