"""What an unquantized GGUF file holds, as far as plans need to know it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import msgspec

from ....checkpoint.files.schemas import check_schema
from ....errors import FormatError
from ..file.header import GgufHeader
from ..file.roles import matrices_of, quantizable
from ..ggml.types import GGML_TYPES, GgmlType
from ..rows.rowmap import RowMap
from ..rows.text import map_from_text, map_to_text

__all__ = ["ALIGNMENT_BYTES", "Layout", "StoredTensor"]

_KINDS = {kind.name: kind for kind in GGML_TYPES.values()}

ALIGNMENT_BYTES = 32
"""Tensors begin at multiples of it."""

_NOTES_BYTES = 4096
"""For what bpwise says of a file in its metadata."""

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        type: Its type.
        shape: Sizes of its dimensions, outermost first.
    """

    type: GgmlType
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """The layout as JSON: type and shape of every tensor, the map as text, and ``Layout.beside_bytes``."""

    tensors: dict[str, tuple[str, tuple[_Size, ...]]]
    rows: str
    beside_bytes: _Size


class Layout:
    """An unquantized GGUF file: its tensors, and whose outputs their rows are.

    Attributes:
        tensors: By name, in the order of the file.
        rows: Where matrices come from.
        beside_bytes: How much of the file comes before its tensors: metadata, and with it the vocabulary.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], rows: RowMap, beside_bytes: int) -> None:
        """Hold them."""
        self.tensors = tensors
        self.rows = rows
        self.beside_bytes = beside_bytes

    @classmethod
    def of(cls, header: GgufHeader, rows: RowMap) -> Layout:
        """Return the layout of a file with a map."""
        tensors = {name: StoredTensor(each.type, each.shape) for name, each in header.tensors.items()}
        return cls(tensors, rows, header.data_offset_bytes)

    @property
    def overhead_bytes(self) -> int:
        """How much larger than its tensors a file that is made of this one is, at most."""
        padding = ALIGNMENT_BYTES * len(self.tensors)
        return self.beside_bytes + padding + len(map_to_text(self.rows)) + _NOTES_BYTES

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Names of the matrices that can be quantized whatever they are: none that llama.cpp or its converter keeps."""
        return tuple(name for name in matrices_of(self.tensors) if quantizable(name, self.tensors[name].shape))

    def is_like(self, other: Layout) -> bool:
        """Whether another file has the same tensors but for their types, made of the same rows."""
        return self._identity == other._identity

    @cached_property
    def _identity(self) -> tuple[dict[str, tuple[int, ...]], str]:
        shapes = {name: each.shape for name, each in self.tensors.items()}
        # Factors are known as well as the types allow.
        rows = {name: replace(own, factors=None) for name, own in sorted(self.rows.tensors.items())}
        return shapes, map_to_text(RowMap(rows, {}))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "tensors": {name: [each.type.name, list(each.shape)] for name, each in self.tensors.items()},
            "rows": map_to_text(self.rows),
            "beside_bytes": self.beside_bytes,
        }

    @classmethod
    def from_json(cls, raw: Any, *, where: str, remedy: str) -> Layout:
        """Return what ``to_json`` returned.

        Args:
            raw: Parsed JSON.
            where: Where it was, to begin messages with.
            remedy: What to do if it is damaged, as a sentence.

        Raises:
            FormatError: It is damaged.
        """
        known = check_schema(raw, _Described, FormatError, where=where, remedy=remedy)
        tensors = {}
        for name, (kind, shape) in known.tensors.items():
            if kind not in _KINDS or not shape or not _KINDS[kind].fits(shape[-1]):
                raise FormatError(f"{where}: {name} cannot be stored as it says. Got {kind} of {shape}. {remedy}")
            tensors[name] = StoredTensor(_KINDS[kind], shape)
        rows = map_from_text(known.rows, f"{where}: rows")
        if not rows.fits({name: each.shape for name, each in tensors.items()}):
            raise FormatError(f"{where}: the map is of other tensors. Got {len(rows.tensors)} in it. {remedy}")
        return cls(tensors, rows, known.beside_bytes)
