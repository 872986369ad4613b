"""How the stages report progress: they wrap what they go through in a function that the caller chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Wraps the items of a step, as ``tqdm.tqdm`` does."""

    def __call__(self, items: Sequence[Any], step: str) -> Iterable[Any]:
        """Return an iterable over ``items`` that shows how far ``step`` has come."""


def silent(items: Sequence[Any], step: str) -> Iterable[Any]:
    """Show nothing."""
    del step
    return items
