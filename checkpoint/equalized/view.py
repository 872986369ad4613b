"""A checkpoint whose channels are equalized while it is read: the same function, with weights that round better.

A channel that one layer writes and others read can be divided by any factor where it is written and multiplied by it
where it is read (cross-layer equalization: Nagel et al. 2019, section 4.1, `arXiv:1906.04721`). Formats whose weights
share scales along the input channels lose least where all channels have weights of one size. Three kinds of pairs are
known: a norm and all linears that read it, values and the output projection of attention, and the up and down
projections of a gated MLP. Factors follow from the weights alone, so a view of the same model always has the same.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ..loading.listed import StoredRows
from ..source.checkpoint import Checkpoint, TensorSource
from ..source.language import LanguageModel
from ..source.views import CheckpointView
from .pairs import Pair, find_pairs

__all__ = [
    "EQUALIZED",
    "EQUALIZED_NOTE",
    "EqualizedView",
    "column_factors",
    "equalized",
    "equalized_as",
    "original_of",
]

_VERSION = 1
"""Of the rules by which factors are chosen."""

EQUALIZED = "equalized"
"""Entry of ``Checkpoint.changes`` that tells of it."""

EQUALIZED_NOTE = "equalized: LoRA adapters that were trained on the original do not fit"
"""What model cards say of it."""

_STEPS = 8
"""Factors are powers of two, to so many parts: what is summed in another order gives the same ones."""

_LARGEST = 4.0
"""Largest factor, as a power of two; the smallest is its inverse."""

_PIECE_VALUES = 1 << 24


class EqualizedView(CheckpointView):
    """A checkpoint that computes the same from channels of equal size, up to rounding to the stored dtypes.

    Norms are exact: their factors are chosen so that what is stored is the quotient.

    Attributes:
        pairs: What writes channels, and what reads them.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Find the pairs; reads no weights.

        Args:
            base: The checkpoint.

        Raises:
            UnsupportedModelError: Transformers does not run it as a decoder.
            CheckpointError: The stored tensors are not those of the sizes in config.json.
        """
        super().__init__(base)
        self.pairs = find_pairs(base)
        self._written: dict[str, list[tuple[int, StoredRows]]] = {}
        self._read: dict[str, list[tuple[int, StoredRows]]] = {}
        for number, pair in enumerate(self.pairs):
            for place in (*pair.writers, *(StoredRows(name, None) for name in pair.norm)):
                self._written.setdefault(place.name, []).append((number, place))
            for place in pair.readers:
                self._read.setdefault(place.name, []).append((number, place))
        self._factors: dict[int, Tensor] = {}

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, of the base's fingerprint and the rules."""
        return hashlib.sha256(f"{self._base.fingerprint} {EQUALIZED} {_VERSION}".encode()).hexdigest()[:32]

    @property
    def changes(self) -> dict[str, Any]:
        """The base's changes, and the version of the rules."""
        return {**self._base.changes, EQUALIZED: _VERSION}

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding: as of the base."""
        return self._base.tied_embeddings

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, equalized, in the dtype in which it is stored; see ``Checkpoint.tensor``."""
        tensor = self._base.tensor(name)
        written, read = self._written.get(name, ()), self._read.get(name, ())
        if not written and not read:
            return tensor
        made = tensor.float()
        for number, place in written:
            pair, factors = self.pairs[number], self._factors_of(number)
            if name in pair.norm[:1]:
                made = (made + pair.offset) / factors - pair.offset
            else:
                rows = place.rows or slice(None)
                made[rows] /= factors if made.ndim == 1 else factors[:, None]
        for number, place in read:
            factors = self.pairs[number].spread(self._factors_of(number))
            made[place.rows or slice(None)] *= factors[:, None] if place.turned else factors
        return made.to(tensor.dtype)

    def entry(self, name: str, index: int) -> Tensor:
        """Load one entry of a tensor's first dimension; see ``Checkpoint.entry``."""
        changed = name in self._written or name in self._read
        return super().entry(name, index) if changed else self._base.entry(name, index)

    def column_factors(self, place: StoredRows) -> Tensor | None:
        """Return what the columns of a weight are multiplied with, float32, shape (K,); None if they are as stored.

        Args:
            place: The stored tensor that is the weight, or the rows of it that are.
        """
        for number, own in self._read.get(place.name, ()):
            if own == place:
                return self.pairs[number].spread(self._factors_of(number))
        return None

    def _factors_of(self, number: int) -> Tensor:
        # By which readers multiply, float32, shape (channels,).
        if number not in self._factors:
            pair = self.pairs[number]
            found = _factors(pair.gathered(self._squares(pair)))
            self._factors[number] = self._storable(pair, found) if pair.norm else found
        return self._factors[number]

    def _squares(self, pair: Pair) -> Tensor:
        # The mean square of every column's weights, relative to that of the linear, summed over the linears.
        total = torch.tensor(0.0, dtype=torch.float64)
        for place in pair.readers:
            stored = self._base.tensor(place.name)[place.rows or slice(None)]
            weight = (stored.mT if place.turned else stored).flatten(0, -2)
            pieces = weight.split(max(1, _PIECE_VALUES // weight.shape[1]))
            squares = torch.stack([piece.double().square().sum(dim=0) for piece in pieces]).sum(dim=0)
            total = total + squares / squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return total

    def _storable(self, pair: Pair, factors: Tensor) -> Tensor:
        # Such that the norm's weight over its factor is a number of the dtype that holds it.
        stored = self._base.tensor(pair.norm[0])
        weight = stored.float() + pair.offset
        quotient = (weight / factors - pair.offset).to(stored.dtype).float() + pair.offset
        exact = weight / quotient
        usable = exact.isfinite() & (exact > 0) & ((exact / factors).log2().abs() < 1 / _STEPS)
        return torch.where(usable, exact, 1.0)


def equalized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with equalized channels; itself where nothing is known that could be equalized.

    Args:
        checkpoint: The model; one that is equalized already is returned as it is.
    """
    if EQUALIZED in checkpoint.changes:
        return checkpoint
    try:
        view = EqualizedView(checkpoint)
    except (CheckpointError, UnsupportedModelError):  # whatever needs the model says so
        return checkpoint
    return view if view.pairs else checkpoint


def equalized_as(original: TensorSource, version: object, path: Path) -> TensorSource:
    """Return an original as a quantized model was made of it.

    Args:
        original: The original.
        version: What the quantized model says of ``EQUALIZED``; None where channels were left as they are.
        path: The quantized model.

    Raises:
        CheckpointError: The rules were others, or the original is not an unquantized model.
    """
    if version is None:
        return original
    if str(version) != str(_VERSION) or not isinstance(original, Checkpoint):
        raise CheckpointError(
            f"{path}: cannot be read beside {original.directory}. Got channels equalized by rules {version!s:.20}. "
            f"Expected rules {_VERSION}, and an unquantized original. Use the version of bpwise that made it."
        )
    return equalized(original)


def column_factors(checkpoint: Checkpoint, model: LanguageModel, linear: str) -> Tensor | None:
    """Return what equalization multiplied the columns of a linear's weight with, float32, shape (K,); None for nothing.

    Args:
        checkpoint: The checkpoint, equalized or not.
        model: The language model in it.
        linear: Full name of the linear.
    """
    if not isinstance(checkpoint, EqualizedView):
        return None
    place = model.stored_rows(f"{linear}.weight")
    return None if place is None else checkpoint.column_factors(place)


def original_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint that an equalized one is a view of; any other as it is."""
    return checkpoint.base if isinstance(checkpoint, EqualizedView) else checkpoint


def _factors(squares: Tensor) -> Tensor:
    # Their geometric mean is 1, up to steps and limits.
    squares = squares.clamp(min=float(squares.mean()) * 1e-6)
    powers = -squares.log2() / 2
    powers = ((powers - powers.mean()) * _STEPS).round() / _STEPS
    return powers.clamp(-_LARGEST, _LARGEST).exp2().float()
