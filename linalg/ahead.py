"""Making what is needed next in a thread of its own, while what was made before is in use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["MadeAhead"]

_Part = TypeVar("_Part")


class MadeAhead(Generic[_Part]):
    """Numbered things, each made part by part; one of them at most is made before it is asked for.

    The thread lives as long as a context of ``making`` and no longer, however that ends.
    """

    def __init__(self, make: Callable[[int], Iterable[_Part]]) -> None:
        """Hold how things are made; nothing is.

        Args:
            make: Makes the parts of one thing by its number, one after another; called in any thread.
        """
        self._make = make
        self._made: _Making[_Part] | None = None

    def take(self, number: int) -> Iterator[_Part]:
        """Return the parts of one thing: as ``making`` has them, else made as they are asked for.

        Args:
            number: Its number. What was made of another one is let go.

        Raises:
            BaseException: As ``make`` raised it, now or in the thread.
        """
        made, self._made = self._made, None
        return iter(self._make(number)) if made is None or made.number != number else made.take()

    @contextmanager
    def making(self, number: int | None) -> Iterator[None]:
        """Make one thing in a thread while the context lasts; the context's end waits for it.

        Args:
            number: Its number; None for no thing and no thread. A thing that was made before is let go.
        """
        self._made = None
        if number is None:
            yield
            return
        making = _Making(number, self._make)
        making.thread.start()
        try:
            yield
            making.thread.join()
            self._made = making
        finally:  # also where the body fails or a key interrupts the waiting
            making.is_needed = False
            making.thread.join()


class _Making(Generic[_Part]):
    """One thing and the thread that makes it."""

    def __init__(self, number: int, make: Callable[[int], Iterable[_Part]]) -> None:
        self.number = number
        self.is_needed = True
        self.thread = threading.Thread(target=self._work, args=(make,), name=f"bpwise ahead {number}")
        self._parts: deque[_Part] = deque()
        self._error: BaseException | None = None

    def take(self) -> Iterator[_Part]:
        # Each part goes as it is taken.
        if self._error is not None:
            raise self._error
        while self._parts:
            yield self._parts.popleft()

    def _work(self, make: Callable[[int], Iterable[_Part]]) -> None:
        try:
            for part in make(self.number):
                self._parts.append(part)
                if not self.is_needed:
                    return
        except BaseException as error:  # whatever it is, the thread that asks for the thing gets it
            self._error = error
