"""How steps report progress: they wrap what they go through in a function that the caller chooses.

Ready to use: ``ProgressBars``, the default in notebooks; ``silent``, the default elsewhere; ``ProgressEvents``, which
calls a function.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "ExpectedPart",
    "Progress",
    "ProgressBars",
    "ProgressEvent",
    "ProgressEvents",
    "RunForecast",
    "RunProgress",
    "TimeLeft",
    "default_progress",
    "placed",
    "seconds_by_step",
    "silent",
]

_FORECAST_WEIGHT = 0.1
"""Share of a part that weighs as much as its forecast."""


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


class TimeLeft:
    """Counts down the parts of a run.

    What parts of a step have taken, relative to what was expected, scales all that is left of that step; and what parts
    of one label have taken, what is left of them. A tenth of a part weighs as much as the forecast: its first item may
    do what the others need not do again.
    """

    def __init__(self, parts: Sequence[ExpectedPart], clock: Callable[[], float] = time.monotonic) -> None:
        """Take the parts in their order.

        Args:
            parts: What is expected.
            clock: Returns seconds.
        """
        self._parts = parts
        # The parts of a step follow each other; of several outputs each has its steps.
        changes = [before.step != after.step for before, after in itertools.pairwise(parts)]
        self._numbers = list(itertools.accumulate(changes, initial=1)) if parts else []
        self._clock = clock
        self._next = 0
        self._current: ExpectedPart | None = None
        self._share = 0.0
        self._counted = 0.0, 0.0
        self._started = 0.0
        self._expected: dict[Hashable, float] = defaultdict(float)
        self._taken: dict[Hashable, float] = defaultdict(float)

    def begin(self, label: str) -> None:
        """Go on to the next part of a label; parts before it are over. A label that is not expected changes nothing."""
        found = next((i for i in range(self._next, len(self._parts)) if self._parts[i].label == label), None)
        if found is None:
            self._current = None
            return
        self._current, self._next = self._parts[found], found + 1
        self._share, self._counted, self._started = 0.0, (0.0, 0.0), self._clock()

    def advance(self, share: float) -> None:
        """Say how much of the current part is done.

        Args:
            share: Of all its items, 0 to 1, those that an earlier run finished included.
        """
        part = self._current
        if part is None:
            return
        if share <= part.done:  # gone through in no time
            self._started = self._clock()
            return
        self._share = (share - part.done) / (1 - part.done)
        counted = self._share * part.seconds, self._clock() - self._started
        for key in (part.label, (part.step,)):
            self._expected[key] += counted[0] - self._counted[0]
            self._taken[key] += counted[1] - self._counted[1]
        self._counted = counted

    @property
    def place(self) -> str:
        """The step that the run is in, of all its steps, as ``2/5 measure``; empty if none are expected."""
        if not self._parts:
            return ""
        index = max(self._next - 1, 0)
        return f"{self._numbers[index]}/{self._numbers[-1]} {self._parts[index].step}"

    @property
    def seconds(self) -> float:
        """Time left of the whole run, in seconds."""
        left = sum(part.seconds * self._factor(part) for part in self._parts[self._next :])
        if self._current is not None:
            left += self._current.seconds * (1 - self._share) * self._factor(self._current)
        return left

    def _factor(self, part: ExpectedPart) -> float:
        factor = 1.0
        for key in ((part.step,), part.label):
            weight = _FORECAST_WEIGHT * part.seconds
            if self._expected[key] > 0:
                factor = (self._taken[key] + weight * factor) / (self._expected[key] + weight)
        return factor


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """How far a run is; see ``ProgressEvents``.

    Attributes:
        label: What is at work, as ``measure: forward``.
        place: The step that it belongs to, of all steps of the run, as ``2/5 measure``; empty if none are expected.
        done: Finished items of it.
        total: All its items.
        seconds_left: Expected time left of the whole run; None where nothing was forecast.
    """

    label: str
    place: str
    done: int
    total: int
    seconds_left: float | None


class ProgressEvents:
    """Progress that calls a function at the start of every item and at the end of each part; see ``RunProgress``.

    Example:
        >>> from bpwise import ProgressEvents
        >>> bar = ProgressEvents(lambda event: print(event.label, event.done, "of", event.total))
        >>> list(bar(["a", "b"], "measure"))
        measure 0 of 2
        measure 1 of 2
        measure 2 of 2
        ['a', 'b']
    """

    def __init__(self, callback: Callable[[ProgressEvent], object]) -> None:
        """Take the function; what it raises ends the run, which can be resumed."""
        self._callback = callback
        self._left: TimeLeft | None = None

    def expect(self, forecast: RunForecast) -> None:
        """See ``RunProgress``."""
        self._left = TimeLeft(forecast.parts)

    def __call__(self, items: Sequence[Any], step: str) -> Iterator[Any]:
        """See ``Progress``."""
        left, total = self._left, len(items)
        if left is not None:
            left.begin(step)

        def tell(done: int) -> None:
            if left is not None:
                left.advance(done / total if total else 1.0)
            place, seconds = ("", None) if left is None else (left.place, left.seconds)
            self._callback(ProgressEvent(label=step, place=place, done=done, total=total, seconds_left=seconds))

        for done, item in enumerate(items):
            tell(done)
            yield item
        tell(total)


class ProgressBars(ProgressEvents):
    """Progress as bars of ``tqdm.auto``: widgets in a notebook, text elsewhere, with the time left of the run."""

    def __init__(self) -> None:
        """Begin with no bar."""
        super().__init__(self._show)
        self._bar: Any = None

    def _show(self, event: ProgressEvent) -> None:
        from tqdm.auto import tqdm  # noqa: PLC0415 - looks for a notebook when it is imported

        if event.done == 0:
            self._bar = tqdm(total=event.total, desc=placed(event.label, event.place))
        if event.seconds_left is not None:
            self._bar.set_postfix_str(f"{tqdm.format_interval(event.seconds_left)} left of the run")
        self._bar.update(event.done - self._bar.n)
        if event.done == event.total:
            self._bar.close()


def placed(label: str, place: str) -> str:
    """Return a label with the step it belongs to: ``[2/5 measure] forward``.

    Args:
        label: As ``Progress`` takes it.
        place: See ``TimeLeft.place``.
    """
    return f"[{place}] {label.split(': ', 1)[-1]}" if place else label


def default_progress() -> Progress:
    """Return bars in a notebook; elsewhere nothing is shown."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return ProgressBars() if shell is not None and "IPKernelApp" in shell.config else silent
