"""Error curves: what a format measures of every linear. Formats hand them in; measuring knows none of them.

Damage of an error ``dW`` is ``0.5 * sum_n F_n (dW^T H dW)_nn``, the second-order KL divergence between the original
and the damaged model, nats per token: F is the Fisher information of a linear's outputs, taken as diagonal, and H its
Hessian, the mean of ``x x^T`` over tokens weighted by what each counts (see ``statistics``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..linalg.hessian import Hessian
    from ..progress import Progress
    from .text.calibration import CalibrationSet

__all__ = ["CurveInputs", "CurveMaker", "CurveSource", "InputsKeeper", "LinearCurves", "TableInputs", "TiedHead"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CurveInputs:
    """The linears of one input group; none of the tensors may be modified.

    Attributes:
        names: Their full names.
        weights: Each linear's weight, floating point, shape (K, out): the transpose of a Hugging Face weight.
        hessian: H, shape (K, K).
        fishers: F of each linear, mean over tokens of (dL/dy)^2, float32, shape (out,).
        damping: First damping of H to try, relative to the mean of its diagonal, dimensionless.
        generalization_ratio: Damage on other tokens than those of H, relative to that on H (see ``heldout``).
    """

    names: tuple[str, ...]
    weights: Sequence[Tensor]
    hessian: Hessian
    fishers: Sequence[Tensor]
    damping: float
    generalization_ratio: float = 1.0

    @property
    def gram(self) -> Tensor:
        """H, float32, shape (K, K)."""
        return self.hessian.gram


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TiedHead:
    """What errors in a table of token embeddings cost as the output head. All tensors are on the CPU.

    Attributes:
        gram: H of its inputs, float32, shape (hidden size, hidden size).
        fisher: F of its outputs, float32, shape (vocabulary,).
        damping: As ``CurveInputs`` has it; finite.
        generalization_ratio: As ``CurveInputs`` has it.
    """

    gram: Tensor
    fisher: Tensor
    damping: float
    generalization_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableInputs:
    """The table of token embeddings, as the input of the first block. All tensors are on the CPU.

    Attributes:
        embeddings: Reads the embeddings of tokens, int64, shape (tokens,): shape (tokens, hidden size).
        uses: What each token of the vocabulary counts, float32, shape (vocabulary,), sum 1.
        fisher: Mean over tokens of (dL/dh)^2 of each element of an embedding h, float32, shape (hidden size,).
        head: The output head, if the table is that too.
    """

    embeddings: Callable[[Tensor], Tensor]
    uses: Tensor
    fisher: Tensor
    head: TiedHead | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearCurves:
    """What a format measured of one linear.

    Attributes:
        tensors: By name, without dots or slashes. ``damage_nats``, nats per token, float32, is among them: its last
            axis runs over the widths or types that the linear can have, and the damage of a linear in one of them is
            the sum over all other axes.
        damping: Relative damping that the factorisation of H took; infinite where none helped, so that rounding will
            go without feedback.
    """

    tensors: Mapping[str, Tensor]
    damping: float


class CurveMaker(Protocol):
    """Measures the curves of one format."""

    @property
    def name(self) -> str:
        """Name of the format; its curves lie under it in a measurement."""

    @property
    def version(self) -> int:
        """Raised when tensors or header change meaning."""

    @property
    def header(self) -> Mapping[str, Any]:
        """What curves depend on beside the model, as plain JSON; its one list names the choices of the last axis."""

    def warm_up(self) -> None:
        """Start, in the background, what takes long whatever the model is; called before the first pass."""
        return

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """Measure the linears of one input group; a pure function of its arguments."""

    def table(self, inputs: TableInputs) -> Mapping[str, Tensor]:
        """Measure the token embeddings; empty for a format that does not quantize them."""


class InputsKeeper(CurveMaker, Protocol):
    """Keeps what curves are made of, for other programs; a ``CurveMaker`` that measures nothing.

    Attributes:
        folder: Where it is kept.
    """

    folder: Path

    def begin(self, provenance: Mapping[str, Any], rows: CalibrationSet) -> None:
        """Take a measurement's provenance and rows, before the passes.

        Raises:
            WorkDirectoryError: The folder holds something else.
        """

    def has(self, linear: str) -> bool:
        """Return whether that of a linear is kept already."""


class CurveSource(Protocol):
    """A model on its way into a format, as far as measuring is concerned; ``Conversion`` is one."""

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Make what the curves depend on, in a work directory or beside a measurement.

        Returns:
            Names and identities of the resume stores that it lies in.
        """

    def curves(self) -> CurveMaker:
        """Return what measures the curves; ``prepare`` was called."""
