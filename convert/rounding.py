"""Rounding: what a format does to single linears, and what the rounding pass leaves of a whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files.resume import ResumeStore
from ..linalg.hessian import Hessian
from ..linalg.work import Elements, Work
from ..measure.measurement import MeasuredLinear, Measurement
from ..measure.model.states import new_state
from ..measure.statistics.heldout import finite_damping
from ..progress import Progress

__all__ = [
    "Drift",
    "FormatWork",
    "Refinement",
    "RoundedModel",
    "Rounder",
    "drift_of",
    "drift_section",
    "rounding_damping",
]

_TINY = 1e-30
"""Keeps states that are zero from being divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Distance of hidden states from the original's, relative to their norm, as root mean squares over tokens.

    Attributes:
        first_token: Of the first token of every row, whose activations are by far the largest in many models.
        other_tokens: Of all others.
    """

    first_token: float
    other_tokens: float


@dataclass(frozen=True, slots=True, eq=False)
class RoundedModel:
    """The encoded linears of a model, on disk until they are asked for.

    Attributes:
        names: Full names of all that is encoded, as ``Rounder.names``.
        blocks: Number of decoder blocks.
        store: Holds the rounder's artifacts by name, and the hidden states.
    """

    names: tuple[str, ...]
    blocks: int
    store: ResumeStore

    def artifact(self, name: str) -> dict[str, Tensor]:
        """Return what the rounder kept of a linear or of the token embeddings."""
        return self.store.load(name)

    def number(self, name: str, key: str) -> float | None:
        """Return the number that the artifact of a linear keeps under a key; None if there is none."""
        return self.store.number(name, key)

    def numbers(self, key: str) -> dict[str, float]:
        """Return the numbers that artifacts keep under a key, by linear; without those that have none."""
        found = ((name, self.number(name, key)) for name in self.names)
        return {name: number for name, number in found if number is not None}

    def drift(self) -> list[Drift]:
        """Return how far the hidden states after every block are from the original's, over the calibration rows."""
        kept = (self.store.load(f"drift-{index}")["drift"].tolist() for index in range(self.blocks))
        return [Drift(first_token=first, other_tokens=others) for first, others in kept]

    def last_states(self, offload_dir: Path | None) -> dict[str, Tensor]:
        """Return what the last blocks of both models make of the calibration rows: ``original`` and ``quantized``.

        Float32, shape (rows, tokens, hidden size), on the CPU.
        """
        return self.store.load(f"state-{self.blocks - 1}", partial(new_state, directory=offload_dir))


class Rounder(ABC):
    """Rounds the linears of one model, one by one, as its plan says.

    Attributes:
        names: Full names of all that is rounded, in the order in which it is written.
        identity: What its artifacts depend on beside model, measurement and plan, as plain JSON.
        unquantized: Linears that stay as they are, in float16.
        table: Name of the token embeddings, if they are rounded too: before all else, since blocks read them.
        on_cpu: Whether the CPU does the work wherever the tensors are: then linears are rounded in parallel.
    """

    names: tuple[str, ...]
    identity: Mapping[str, Any]
    unquantized: frozenset[str] = frozenset()
    table: str | None = None
    on_cpu: bool = False

    @abstractmethod
    def round_linear(self, measured: MeasuredLinear, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        """Round one linear.

        Args:
            measured: What is known of it.
            target: The weight to represent, float32, shape (K, out), contiguous; its memory may be used.
            hessian: Weighted mean of x x^T over the quantized model's inputs, shape (K, K); linears of an input group
                have the same.

        Returns:
            What to keep, by name. A ``damping`` among it is what its Hessian was factored with, relative; infinite
            where it went without error feedback.
        """

    @abstractmethod
    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that a reader makes of what was kept, shape (out, K), on the device of what was kept."""

    def round_table(self) -> dict[str, Tensor]:
        """Round the token embeddings; return what to keep."""
        raise NotImplementedError


class FormatWork:
    """Work of a format, from shapes, beside what is done for every format; see ``bpwise.quantize.timing.counts``.

    A format that says nothing of it is taken to have little.

    Attributes:
        rounds: Whether linears are rounded one by one, by a ``Rounder``.
        on_cpu: As ``Rounder.on_cpu``.
        refining_tokens: Tokens of a step of ``Conversion.refine``, at least a row.
        starting_seconds: What starting other programs takes while a conversion is prepared.
    """

    rounds: bool = True
    on_cpu: bool = False
    refining_tokens: int = 1024
    starting_seconds: float = 0.0

    def preparing(self, weights: int, vocabulary: int) -> Work:
        """Return what ``Conversion.prepare`` does beside that, for a model of so many weights and tokens."""
        return Work()

    def once(self, device: torch.device) -> Work:
        """Return what a process does before its first curves are measured."""
        return Work()

    def curves(self, inputs: int, outputs: Sequence[int], device: torch.device) -> Work:
        """Return what ``CurveMaker.linears`` does for an input group.

        Args:
            inputs: K, input channels of the group.
            outputs: Output channels of each of its linears.
            device: Where it is done.
        """
        return Work()

    def linear(self, inputs: int, outputs: int) -> Work:
        """Return what ``Rounder.round_linear`` does for a linear of these input and output channels."""
        return Work()

    def decoded(self, weights: int) -> Work:
        """Return what it takes to read weights back."""
        return Elements.work(weights)

    def written(self, weights: int) -> Work:
        """Return what writing and verifying weights takes."""
        return Elements.work(2 * weights)


def drift_section(drift: Sequence[Drift]) -> dict[str, dict[str, str | float]]:
    """Return what a report says of the drift: section -> entry -> value; nothing where there is none."""
    entries: dict[str, str | float] = {
        f"block {index}": f"{each.first_token:.2%}, {each.other_tokens:.2%}" for index, each in enumerate(drift)
    }
    return {"Drift of the hidden states (first token, other tokens; relative)": entries} if entries else {}


def drift_of(original: Tensor, quantized: Tensor) -> Tensor:
    """Return how far hidden states are from the original's, as ``Drift`` has it: of first and of other tokens.

    Args:
        original: The original's, shape (rows, tokens, hidden size).
        quantized: The quantized model's.

    Returns:
        Shape (2,), dimensionless.
    """
    errors, sizes = (x.square().sum(dim=-1) for x in (quantized - original, original))
    parts = [(errors[:, :1], sizes[:, :1]), (errors[:, 1:], sizes[:, 1:])]
    return torch.stack([error.sum() / size.sum().clamp(min=_TINY) for error, size in parts]).sqrt()


def rounding_damping(measured: MeasuredLinear) -> float:
    """Return the relative damping to round a linear with: the measured one, or the largest where none was enough."""
    return finite_damping(measured.damping)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """What a rounded model is refined with.

    Attributes:
        measurement: Gives the calibration rows.
        device: Where models run.
        offload_dir: Directory for files with hidden states; None keeps them in memory.
        progress: Wraps the steps.
    """

    measurement: Measurement
    device: torch.device
    offload_dir: Path | None
    progress: Progress
