"""Allocation of types or schemes to tensors: the problem that plans for GGUF and MLX solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import BudgetError
from ...linalg.knapsack import Choice, choose
from ...tables import bytes_text
from ..plan import shown_range

__all__ = ["TensorCandidate", "TensorsProblem"]


class TensorCandidate(Protocol):
    """A tensor and what it may become."""

    @property
    def weights(self) -> int:
        """Number of its weights."""

    @property
    def costs(self) -> NDArray[np.float64]:
        """Damage of each choice, nats per token, float64, shape (choices,)."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each choice, int64, shape (choices,)."""


_Candidate = TypeVar("_Candidate", bound=TensorCandidate)


@dataclass(frozen=True)
class TensorsProblem(Generic[_Candidate]):
    """What a plan chooses from.

    Attributes:
        candidates: All tensors that may be quantized, in the order of ``TensorsPlan.tensors``.
        other_weights: Weights in all other tensors.
        other_bytes: Size of these.
    """

    candidates: tuple[_Candidate, ...]
    other_weights: int
    other_bytes: int

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return sum(candidate.weights for candidate in self.candidates) + self.other_weights

    @property
    def size_range(self) -> tuple[int, int]:
        """The fewest and the most bytes that all tensors can take."""
        sizes = [candidate.sizes for candidate in self.candidates]
        least, most = (sum(int(edge(size)) for size in sizes) for edge in (np.min, np.max))
        return self.other_bytes + least, self.other_bytes + most

    def target_bytes(self, *, bpw: float | None, tensor_bytes: int | None) -> int:
        """Return the bytes that a target stands for, which may be more than all tensors can take.

        Args:
            bpw: Bits per weight over all tensors.
            tensor_bytes: The same as a number of bytes; one of the two is given.

        Raises:
            BudgetError: No plan is that small.
        """
        assert (bpw is None) != (tensor_bytes is None), "one target"
        weights = self.weights
        # The product may fall just short of the whole number of bytes that it stands for.
        target = int(bpw * weights / 8 + 1e-3) if bpw is not None else tensor_bytes
        assert target is not None
        least, most = self.size_range
        if target < least:
            raise BudgetError(
                f"{bytes_text(target)} of tensors ({8 * target / weights:.4f} bits per weight) cannot be reached: this "
                f"model can have from {bytes_text(least)} to {bytes_text(most)}, that is "
                f"{shown_range(8 * least / weights, 8 * most / weights)} bits per weight. Ask for a size in this range."
            )
        return target

    def best(self, target_bytes: int) -> Choice:
        """Return the choice of least damage, by places in each candidate's ``costs``.

        Args:
            target_bytes: Most bytes that all tensors together may take, as ``target_bytes`` returns it.
        """
        costs, sizes = [x.costs for x in self.candidates], [x.sizes for x in self.candidates]
        return choose(costs, sizes, target_bytes - self.other_bytes)
