"""The linears of a model by name and shape, and those that a pattern means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

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
    for index, block in enumerate(source.structure.structures):
        for name in (f"{source.blocks}.{index}.{each}" for group in block.groups for each in group.linears):
            outputs, inputs = source.shape(f"{name}.weight")
            linears.append(Linear(name, inputs, outputs))
    vocabulary, hidden = source.shape(f"{source.embedding_name}.weight")
    return linears, Linear(source.head_name, hidden, vocabulary)


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the linears that a shell pattern means, with or without ``.weight`` at its end."""
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)}
