"""The time that is left of a run, which corrects itself while the run goes on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from ...progress import ExpectedPart

__all__ = ["TimeLeft"]

_FORECAST_WEIGHT = 0.1
"""Share of a part that weighs as much as its forecast."""


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
