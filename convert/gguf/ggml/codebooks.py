"""Takes blocks apart whose codes stand for four or eight weights each, and puts other codes back.

In these types (IQ1 to IQ3) a code is the number of an entry in a table of vectors, and in IQ2 and IQ3 a sign for each
weight comes with it: ``weights = scale * signs * entries[code] + offset``. A rounding with error feedback can keep the
scales that ggml's encoder chose and choose codes and signs anew. Source of the layouts: ggml's ``ggml-common.h`` and
the ``dequantize_row_*`` functions in ``ggml-quants.c``. The tables themselves are read out of ggml's decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .kernels import Bytes, GgmlType, decode
from .types import ggml_type

__all__ = ["CODEBOOK_TYPES", "Codebook", "codebook", "codes_of", "nearest", "recode", "scales_of"]

_Floats = npt.NDArray[np.float32]
_Numbers = npt.NDArray[np.uint32]

_DELTA = 0.125
"""What IQ1 adds to or subtracts from its entries: ``IQ1S_DELTA`` in ggml-common.h."""

_SIGNS = 8
"""Weights whose signs stand in one number."""

_SCORES = 1 << 19
"""Entries times vectors that are compared at once: few enough for a core's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """What the codes of a type stand for.

    Attributes:
        entries: Float32, shape (codes, weights of a code); none is negative where there are signs.
        signed: Whether every weight has a sign beside its code.
        even: Whether the number of negative signs of eight weights must be even.
    """

    entries: Tensor
    signed: bool
    even: bool

    @property
    def together(self) -> int:
        """Weights that are coded at once."""
        return _SIGNS if self.even else self.entries.shape[1]


@dataclass(frozen=True, slots=True)
class _Fields:
    """Numbers of a few bits in a row of little-endian words, one after another.

    Attributes:
        start: Byte of the block that the first word starts at.
        words: Number of words.
        size: Bytes of a word.
        bits: Bits of a number.
        count: Numbers in a word.
        first: Lowest bit of the first.
        stride: Bytes from one word to the next.
    """

    start: int
    words: int
    size: int
    bits: int
    count: int = 1
    first: int = 0
    stride: int = 0

    def read(self, blocks: Bytes) -> _Numbers:
        """Return the numbers, shape (blocks, words * count)."""
        return ((self._words(blocks)[:, :, None] >> self._shifts()) & self._mask()).reshape(len(blocks), -1)

    def write(self, blocks: Bytes, numbers: _Numbers) -> None:
        """Store numbers of that shape in their places; all other bits stay."""
        shifts = self._shifts()
        fields = (numbers.reshape(len(blocks), self.words, self.count) & self._mask()) << shifts
        kept = self._words(blocks) & ~np.bitwise_or.reduce(self._mask() << shifts)
        words = (kept | np.bitwise_or.reduce(fields, axis=2)).astype("<u4")
        blocks[:, self._bytes()] = words[:, :, None].view(np.uint8)[:, :, : self.size]

    def _words(self, blocks: Bytes) -> _Numbers:
        padded = np.zeros((len(blocks), self.words, 4), dtype=np.uint8)
        padded[:, :, : self.size] = blocks[:, self._bytes()]
        return padded.view("<u4")[:, :, 0].astype(np.uint32)

    def _bytes(self) -> npt.NDArray[np.intp]:
        # Their places in a block, shape (words, size).
        starts = self.start + (self.stride or self.size) * np.arange(self.words)
        return np.add.outer(starts, np.arange(self.size))

    def _shifts(self) -> _Numbers:
        return (self.first + self.bits * np.arange(self.count)).astype(np.uint32)

    def _mask(self) -> np.uint32:
        return np.uint32((1 << self.bits) - 1)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a type keeps what.

    Attributes:
        codes: Parts of a code, the lowest bits first.
        code_weights: Weights that it stands for.
        sub_weights: Weights that share a scale.
        scales: Reads scales and offsets, each (blocks, sub-blocks); None is no offset.
        signs: Of eight weights together: eight bits, or seven where the last follows from an even number of ones.
    """

    codes: tuple[_Fields, ...]
    code_weights: int
    sub_weights: int
    scales: Callable[[Bytes], tuple[_Floats, _Floats | None]]
    signs: _Fields | None = None


def scales_of(data: Bytes, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Return what the entries of each weight's code are multiplied by, and what is added then.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes), whole blocks.
        kind: Their type, one of ``CODEBOOK_TYPES``.

    Returns:
        Scales and offsets, float32, both shape (rows, row_weights).
    """
    layout = _LAYOUTS[kind.name]
    scales, offsets = layout.scales(data.reshape(-1, kind.block_bytes))
    spread = (
        torch.from_numpy(np.ascontiguousarray(values)).view(len(data), -1).repeat_interleave(layout.sub_weights, dim=1)
        for values in (scales, np.zeros_like(scales) if offsets is None else offsets)
    )
    return next(spread), next(spread)


def codes_of(data: Bytes, kind: GgmlType) -> Tensor:
    """Return the codes of encoded rows, int64, shape (rows, row_weights / weights of a code).

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes), whole blocks.
        kind: Their type, one of ``CODEBOOK_TYPES``.
    """
    layout = _LAYOUTS[kind.name]
    blocks = data.reshape(-1, kind.block_bytes)
    codes = np.zeros((len(blocks), kind.block_weights // layout.code_weights), dtype=np.int64)
    shift = 0
    for fields in layout.codes:
        codes |= fields.read(blocks).astype(np.int64) << shift
        shift += fields.bits
    return torch.from_numpy(codes).view(len(data), -1)


def recode(data: Bytes, kind: GgmlType, codes: Tensor, negative: Tensor | None) -> Bytes:
    """Return the same blocks with other codes; scales and offsets stay bit for bit.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes), whole blocks.
        kind: Their type, one of ``CODEBOOK_TYPES``.
        codes: Integers below the number of entries, shape (rows, row_weights / weights of a code).
        negative: Which weights are negative, bool, shape (rows, row_weights); in types without signs it is not read.
    """
    layout = _LAYOUTS[kind.name]
    blocks = data.reshape(-1, kind.block_bytes).copy()
    numbers = codes.numpy().astype(np.uint32).reshape(len(blocks), -1)
    for fields in layout.codes:
        fields.write(blocks, numbers)
        numbers = numbers >> np.uint32(fields.bits)
    if layout.signs is not None and negative is not None:
        signs = np.packbits(negative.numpy().reshape(len(blocks), -1, 8), axis=2, bitorder="little")
        layout.signs.write(blocks, signs[:, :, 0].astype(np.uint32))
    return blocks.reshape(data.shape)


def nearest(wanted: Tensor, roots: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Return the entries nearest to some vectors.

    With signs, the error of each weight counts for itself, by R_kk^2, which makes its sign that of what is wanted
    (where their number must be even, the least important changes); without, vectors are compared by ``|R^T d|^2``.

    Args:
        wanted: Float32, shape (blocks, vectors, ``book.together``), in units of the scale.
        roots: R of their weights, upper triangular, float32, shape (blocks, ``book.together``, ``book.together``).
        book: What there is to choose from.

    Returns:
        Codes, int64, shape (blocks, vectors, codes), and what they stand for, with signs, shape as wanted.
    """
    if not book.signed:
        codes = _search(wanted @ roots, book.entries @ roots)
        return codes[..., None], book.entries[codes]
    powers = roots.diagonal(dim1=1, dim2=2)[:, None]  # R_kk
    signs = torch.where(wanted < 0, -1.0, 1.0)
    if book.even:
        odd = signs.prod(dim=2, keepdim=True)  # -1 if so
        cheapest = (powers * wanted).abs().argmin(dim=2, keepdim=True)
        signs.scatter_(2, cheapest, signs.gather(2, cheapest) * odd)
    size = book.entries.shape[1]
    found = [
        _search(wanted_part * power, book.entries * power)
        for wanted_part, power in zip((wanted * signs).split(size, dim=2), powers.split(size, dim=2), strict=True)
    ]
    codes = torch.stack(found, dim=2)
    return codes, book.entries[codes].flatten(2) * signs


def _search(wanted: Tensor, entries: Tensor) -> Tensor:
    # Numbers of the entries, (blocks, entries, S), nearest to vectors, (blocks, vectors, S): shape (blocks, vectors).
    squares = entries.square().sum(dim=2)[:, None]
    count = max(1, _SCORES // (entries.shape[0] * entries.shape[1]))
    found = [torch.baddbmm(squares, part, entries.mT, alpha=-2).argmin(dim=2) for part in wanted.split(count, dim=1)]
    return torch.cat(found, dim=1)


@cache
def codebook(name: str) -> Codebook:
    """Return what the codes of a type stand for, one of ``CODEBOOK_TYPES``; ggml's decoder says it.

    Raises:
        BpwiseError: ggml's library is not installed.
    """
    kind, layout = ggml_type(name), _LAYOUTS[name]
    count = 1 << sum(fields.bits for fields in layout.codes)
    row = kind.block_weights // layout.code_weights
    blank = np.zeros((count // row, kind.block_bytes), dtype=np.uint8)
    blank[:, _SCALE_OF_ONE[name][0]] = _SCALE_OF_ONE[name][1]
    data = recode(blank, kind, torch.arange(count).view(-1, row), None)
    scales, offsets = scales_of(data, kind)
    entries = (decode(data, kind) - offsets) / scales
    even = layout.signs is not None and layout.signs.bits == 7
    return Codebook(entries.view(count, layout.code_weights).contiguous(), layout.signs is not None, even)


def _half(blocks: Bytes) -> _Floats:
    # The float16 that every block but IQ1_M's begins with, shape (blocks, 1).
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _halves(fields: _Fields, unit: float) -> Callable[[Bytes], tuple[_Floats, None]]:
    # d (n + 1/2) unit.
    return lambda blocks: (
        _half(blocks) * (np.float32(0.5) + fields.read(blocks).astype(np.float32)) * np.float32(unit),
        None,
    )


def _odd(numbers: _Numbers) -> _Floats:
    return (2 * numbers + 1).astype(np.float32)


def _scales_iq1_s(blocks: Bytes) -> tuple[_Floats, _Floats]:
    scales = _half(blocks) * _odd(_Fields(34, 8, 2, bits=3, first=12).read(blocks))
    minus = _Fields(34, 8, 2, bits=1, first=15).read(blocks)
    return scales, scales * np.where(minus == 0, np.float32(_DELTA), np.float32(-_DELTA))


def _scales_iq1_m(blocks: Bytes) -> tuple[_Floats, None]:
    # The float16's four digits are the highest of four words.
    digits = _Fields(48, 4, 2, bits=4, first=12).read(blocks)
    half = np.bitwise_or.reduce(digits << np.array([0, 4, 8, 12], dtype=np.uint32), axis=1)
    whole = half.astype("<u2").view("<f2").astype(np.float32)[:, None]
    return whole * _odd(_Fields(48, 4, 2, bits=3, count=4).read(blocks)), None


_LAYOUTS: Mapping[str, _Layout] = {
    "IQ1_S": _Layout((_Fields(2, 32, 1, bits=8), _Fields(34, 8, 2, bits=3, count=4)), 8, 32, _scales_iq1_s),
    "IQ1_M": _Layout((_Fields(0, 32, 1, bits=8), _Fields(32, 16, 1, bits=4, count=2)), 8, 16, _scales_iq1_m),
    "IQ2_XXS": _Layout(
        (_Fields(2, 8, 4, bits=8, count=4, stride=8),),
        8,
        32,
        _halves(_Fields(6, 8, 4, bits=4, first=28, stride=8), 0.25),
        _Fields(6, 8, 4, bits=7, count=4, stride=8),
    ),
    "IQ2_XS": _Layout(
        (_Fields(2, 32, 2, bits=9),),
        8,
        16,
        _halves(_Fields(66, 8, 1, bits=4, count=2), 0.25),
        _Fields(2, 32, 2, bits=7, first=9),
    ),
    "IQ2_S": _Layout(
        (_Fields(2, 32, 1, bits=8), _Fields(66, 8, 1, bits=2, count=4)),
        8,
        16,
        _halves(_Fields(74, 8, 1, bits=4, count=2), 0.25),
        _Fields(34, 32, 1, bits=8),
    ),
    "IQ3_XXS": _Layout(
        (_Fields(2, 64, 1, bits=8),),
        4,
        32,
        _halves(_Fields(66, 8, 4, bits=4, first=28), 0.5),
        _Fields(66, 8, 4, bits=7, count=4),
    ),
    "IQ3_S": _Layout(
        (_Fields(2, 64, 1, bits=8), _Fields(66, 8, 1, bits=1, count=8)),
        4,
        32,
        lambda blocks: (_half(blocks) * _odd(_Fields(106, 4, 1, bits=4, count=2).read(blocks)), None),
        _Fields(74, 32, 1, bits=8),
    ),
}

CODEBOOK_TYPES = frozenset(_LAYOUTS)
"""Names of the types whose codes stand for several weights."""

_ONE = (0x00, 0x3C)
"""float16's 1, little-endian."""

_SCALE_OF_ONE = dict.fromkeys(_LAYOUTS, (slice(0, 2), _ONE)) | {"IQ1_M": ([49, 51, 53, 55], [0x00, 0x00, 0xC0, 0x30])}
"""Bytes to set in a block of zeros for its float16 to be 1."""
