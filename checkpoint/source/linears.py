"""The linears of a model by name and shape, and those that a pattern means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from ..model.families import EMBEDDING, HEAD

if TYPE_CHECKING:
    from .language import LanguageModel  # which needs torch; plans do not

__all__ = ["Linear", "Shaped", "matching", "model_linears"]


class Shaped(Protocol):
    """A linear of known shape."""

    @property
    def name(self) -> str:
        """Full name."""

    @property
    def in_features(self) -> int:
        """Number of input features."""

    @property
    def out_features(self) -> int:
        """Number of outputs, padding excluded."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of which only the shape is known; see ``Shaped``."""

    name: str
    in_features: int
    out_features: int


def model_linears(source: LanguageModel) -> tuple[list[Linear], Linear]:
    """Return a model's decoder linears, in model order, and its head.

    Raises:
        CheckpointError: A tensor that the family should have is missing.
    """
    linears = []
    for block in range(source.block_count):
        for group in source.structure.structures[block].groups:
            for name in source.linear_names(block, group):
                columns, rows = source.shape(f"{name}.weight")
                linears.append(Linear(name, rows, columns))
    vocabulary, hidden = source.shape(EMBEDDING)
    return linears, Linear(HEAD, hidden, vocabulary)


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the linears that a shell pattern means, with or without ``.weight`` at its end."""
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)}
