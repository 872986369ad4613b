"""A checkpoint whose channels are equalized while it is read: the same function, with weights that round better.

A channel that one layer writes and others read can be divided by any factor where it is written and multiplied by it
where it is read (cross-layer equalization: Nagel et al. 2019, section 4.1, `arXiv:1906.04721`). Formats whose weights
share scales along the input channels lose least where all channels have weights of one size. Three kinds of pairs are
known: a norm and all linears that read it, values and the output projection of attention, and the up and down
projections of a gated MLP. Factors follow from the weights alone, so a view of the same model always has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ..model.families import Family
from .checkpoint import Checkpoint, TensorSource
from .language import LanguageModel, StoredRows
from .views import CheckpointView

__all__ = ["EQUALIZED", "EQUALIZED_NOTE", "EqualizedView", "column_factors", "equalized", "equalized_as"]

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

_FINAL_NORM = "model.norm"

_GATED = 2
"""Linears of an input group that make the neurons of a gated MLP: the gate, and what it is multiplied with."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Channels that are written once and read by one linear or several.

    Attributes:
        norm: The stored tensors of a norm that writes them, weight first; empty for linears.
        offset: What is added to the norm's stored weight when it runs.
        writers: Rows of stored tensors that write them: a linear's weight and its bias.
        readers: Rows of stored tensors whose columns read them.
        copies: How many heads read every head of values; 1 where a column reads the channel of its own number.
        head: Channels of a head, with ``copies``.
    """

    readers: tuple[StoredRows, ...]
    norm: tuple[str, ...] = ()
    offset: float = 0.0
    writers: tuple[StoredRows, ...] = ()
    copies: int = 1
    head: int = 1

    def spread(self, factors: Tensor) -> Tensor:
        """Return the factor of every column of a reader, given those of the channels."""
        return factors.view(-1, 1, self.head).expand(-1, self.copies, -1).reshape(-1)

    def gathered(self, squares: Tensor) -> Tensor:
        """Return the mean over the columns that read the same channel."""
        return squares.view(-1, self.copies, self.head).mean(dim=1).reshape(-1)


class EqualizedView(CheckpointView):
    """A checkpoint that computes the same from channels of equal size, up to rounding to the stored dtypes.

    Norms are exact: their factors are chosen so that what is stored is the quotient.
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
        pairs = _pairs(LanguageModel(base))
        self._pairs = tuple(each for each in pairs if not any(place.name in base.on_grid for place in each.readers))
        self._written: dict[str, list[tuple[int, StoredRows]]] = {}
        self._read: dict[str, list[tuple[int, StoredRows]]] = {}
        for number, pair in enumerate(self._pairs):
            for place in (*pair.writers, *(StoredRows(name, None) for name in pair.norm)):
                self._written.setdefault(place.name, []).append((number, place))
            for place in pair.readers:
                self._read.setdefault(place.name, []).append((number, place))
        self._factors: dict[int, Tensor] = {}

    @property
    def original(self) -> Checkpoint:
        """The checkpoint that computes the same, as it is."""
        return self._base.original

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
            pair, factors = self._pairs[number], self._factors_of(number)
            if name in pair.norm[:1]:
                made = (made + pair.offset) / factors - pair.offset
            else:
                rows = place.rows or slice(None)
                made[rows] /= factors if made.ndim == 1 else factors[:, None]
        for number, place in read:
            factors = self._pairs[number].spread(self._factors_of(number))
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
                return self._pairs[number].spread(self._factors_of(number))
        return None

    def _factors_of(self, number: int) -> Tensor:
        # By which readers multiply, float32, shape (channels,).
        if number not in self._factors:
            pair = self._pairs[number]
            found = _factors(pair.gathered(self._squares(pair)))
            self._factors[number] = self._storable(pair, found) if pair.norm else found
        return self._factors[number]

    def _squares(self, pair: _Pair) -> Tensor:
        # The mean square of every column's weights, relative to that of the linear, summed over the linears.
        total = torch.tensor(0.0, dtype=torch.float64)
        for place in pair.readers:
            stored = self._base.tensor(place.name)[place.rows or slice(None)]
            weight = (stored.mT if place.turned else stored).flatten(0, -2)
            pieces = weight.split(max(1, _PIECE_VALUES // weight.shape[1]))
            squares = torch.stack([piece.double().square().sum(dim=0) for piece in pieces]).sum(dim=0)
            total = total + squares / squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return total

    def _storable(self, pair: _Pair, factors: Tensor) -> Tensor:
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
    except UnsupportedModelError:  # whatever needs the model says so
        return checkpoint
    return view if view._pairs else checkpoint


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
    place = model.stored_rows(f"{linear}.weight") if isinstance(checkpoint, EqualizedView) else None
    return None if place is None or not isinstance(checkpoint, EqualizedView) else checkpoint.column_factors(place)


def _factors(squares: Tensor) -> Tensor:
    # Their geometric mean is 1, up to steps and limits.
    squares = squares.clamp(min=float(squares.mean()) * 1e-6)
    powers = -squares.log2() / 2
    powers = ((powers - powers.mean()) * _STEPS).round() / _STEPS
    return powers.clamp(-_LARGEST, _LARGEST).exp2().float()


def _pairs(model: LanguageModel) -> Iterator[_Pair]:
    family = model.listed
    if family is None:
        for index in range(model.block_count):
            yield from _discovered_pairs(model, index)
        return
    for index in range(model.block_count):
        yield from _norm_pairs(model, family, index)
        yield from _linear_pairs(model, family, index)
    head = f"{model.head_name}.weight"
    if not model.tied_embeddings and head in model.names:
        yield from _norm_pair(model, family, _FINAL_NORM, (head,))


def _discovered_pairs(model: LanguageModel, index: int) -> Iterator[_Pair]:
    for norm, offset, readers in model.norm_pairs(index):
        names = [f"{norm}.{kind}" for kind in ("weight", "bias") if model.has_parameter(f"{norm}.{kind}")]
        stored = [model.stored_name(name) for name in names]
        if None not in stored:
            yield _Pair(readers, norm=tuple(name for name in stored if name is not None), offset=offset)


def _norm_pairs(model: LanguageModel, family: Family, index: int) -> Iterator[_Pair]:
    groups = [group for group in family.input_groups(index, model.names) if group.reads_stream]
    linears = [name for group in groups for name in family.linear_names(index, group)]
    block = f"{family.blocks}.{index}."
    linears += [family.file_name(block + name) for name in family.routers]
    readers: dict[str, list[str]] = {}
    for name in (f"{linear}.weight" for linear in linears):
        if name in model.names:
            norm = family.norms[0 if ".self_attn." in name else 1]
            readers.setdefault(norm, []).append(name)
    for norm, names in readers.items():
        yield from _norm_pair(model, family, block + norm, tuple(names))


def _norm_pair(model: LanguageModel, family: Family, norm: str, readers: tuple[str, ...]) -> Iterator[_Pair]:
    stored = [model.stored_rows(name) for name in (f"{norm}.weight", f"{norm}.bias") if name in model.names]
    places = [model.stored_rows(name) for name in readers]
    if stored and None not in places:
        names = tuple(place.name for place in stored if place is not None)
        yield _Pair(tuple(place for place in places if place is not None), norm=names, offset=family.norm_offset)


def _linear_pairs(model: LanguageModel, family: Family, index: int) -> Iterator[_Pair]:
    block = f"{family.blocks}.{index}."
    values, output = block + "self_attn.v_proj", block + "self_attn.o_proj"
    if f"{values}.weight" in model.names and f"{output}.weight" in model.names:
        columns, rows = model.shape(f"{output}.weight")[1], model.shape(f"{values}.weight")[0]
        head, left = divmod(columns, int(model.config["num_attention_heads"]))
        if not left and not rows % head and not columns % rows:
            yield from _linear_pair(model, values, output, copies=columns // rows, head=head)
    for group in family.input_groups(index, model.names):
        if len(group.linears) == _GATED and group.reads_stream:
            up = group.linears[1]
            last = "down_proj" if group.expert is None or family.experts is None else family.experts.down
            down = f"{up.rpartition('.')[0]}.{last}"
            yield from _linear_pair(model, family.file_name(block + up), family.file_name(block + down))


def _linear_pair(model: LanguageModel, writer: str, reader: str, *, copies: int = 1, head: int = 1) -> Iterator[_Pair]:
    written = [model.stored_rows(name) for name in (f"{writer}.weight", f"{writer}.bias") if name in model.names]
    read = model.stored_rows(f"{reader}.weight")
    places = tuple(place for place in written if place is not None)
    if read is not None and len(places) == len(written):
        yield _Pair((read,), writers=places, copies=copies, head=head)
