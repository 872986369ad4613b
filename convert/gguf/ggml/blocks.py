"""Takes ggml's scalar-grid blocks apart into codes, scales and offsets, and puts other codes back.

In these types every weight is ``scale * level + offset`` with a level of its own, so a rounding with error feedback
can keep the scales that ggml's encoder chose and choose the codes anew. For types that code four or eight weights
together (IQ1 to IQ3), see ``codebooks``. Source of the layouts: ggml's ``ggml-common.h`` and the
``dequantize_row_*`` functions in ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ....errors import ConfigError, FormatError, ShapeError
from .kernels import Bytes, GgmlType

__all__ = ["GRID_TYPES", "Blocks", "repack", "unpack"]

_Floats = npt.NDArray[np.float32]
_Scales = Callable[[Bytes], tuple[_Floats, "_Floats | None"]]
"""From blocks, uint8 (blocks, block_bytes), to scales and offsets, each (blocks, sub-blocks); None is no offset."""

_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen levels of IQ4_NL and IQ4_XS: ``kvalues_iq4nl`` in ggml-common.h."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Encoded rows, taken apart: weight = scale * levels[code] + offset.

    Attributes:
        codes: One code a weight, uint8, shape (rows, row_weights), each below ``len(levels)``.
        scales: Scale of each sub-block, as a reader computes it, float32, shape (rows, row_weights / sub_weights);
            may be negative or 0.
        offsets: What is added in each sub-block, float32, same shape; 0 in types without.
        levels: Value of each code, rising, float32, shape (number of codes,).
        sub_weights: Consecutive weights that share a scale and an offset.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    levels: Tensor
    sub_weights: int

    def weights(self) -> Tensor:
        """Return the weights, float32, shape (rows, row_weights)."""
        shape = (*self.scales.shape, self.sub_weights)
        levels = self.levels[self.codes.long()].reshape(shape)
        return (self.scales[..., None] * levels + self.offsets[..., None]).reshape(self.codes.shape)


@dataclass(frozen=True, slots=True)
class _Plane:
    """Some bits of every code of a block.

    The bytes fall into runs of ``lane`` bytes; the lowest ``bits`` of a run's bytes belong to the first ``lane``
    weights, the next to the next ``lane`` weights, and so on.
    """

    start: int
    size: int
    bits: int
    lane: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a type keeps what.

    Attributes:
        planes: The bits of the codes, the lowest first.
        levels: Value of each code.
        sub_weights: Weights that share a scale.
        scales: Reads scales and offsets.
        flip: Stored codes differ from ours in these bits: 0x80 makes signed bytes rise.
    """

    planes: tuple[_Plane, ...]
    levels: tuple[float, ...]
    sub_weights: int
    scales: _Scales
    flip: int = 0


def unpack(data: Bytes, kind: GgmlType) -> Blocks:
    """Take encoded rows apart.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes).
        kind: Their type, one of ``GRID_TYPES``.

    Returns:
        Codes, scales and offsets, on the CPU, in memory of their own.

    Raises:
        ConfigError: The type has no scalar grid.
        FormatError: A row is not a whole number of blocks.
    """
    layout = _layout(kind)
    blocks = _as_blocks("unpack", data, kind)
    rows = data.shape[0]
    codes = np.zeros((len(blocks), kind.block_weights), dtype=np.uint8)
    shift = 0
    for plane in layout.planes:
        codes |= _read_plane(blocks, plane) << np.uint8(shift)
        shift += plane.bits
    codes ^= np.uint8(layout.flip)
    scales, offsets = layout.scales(blocks)
    if offsets is None:
        offsets = np.zeros_like(scales)
    subs = data.shape[1] // kind.block_bytes * (kind.block_weights // layout.sub_weights)
    return Blocks(
        codes=torch.from_numpy(codes.reshape(rows, subs * layout.sub_weights)),
        scales=torch.from_numpy(scales.reshape(rows, subs)),
        offsets=torch.from_numpy(offsets.reshape(rows, subs)),
        levels=torch.tensor(layout.levels, dtype=torch.float32),
        sub_weights=layout.sub_weights,
    )


def repack(data: Bytes, kind: GgmlType, codes: Tensor) -> Bytes:
    """Return the same blocks with other codes; scales and offsets stay bit for bit.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes).
        kind: Their type, one of ``GRID_TYPES``.
        codes: The codes to store, uint8, shape (rows, row_weights), on any device.

    Raises:
        ConfigError: The type has no scalar grid.
        FormatError: A row is not a whole number of blocks, or a code is not one of the type.
        ShapeError: There is not one code a weight.
    """
    layout = _layout(kind)
    blocks = _as_blocks("repack", data, kind).copy()
    expected = (data.shape[0], data.shape[1] // kind.block_bytes * kind.block_weights)
    if tuple(codes.shape) != expected:
        raise ShapeError(f"repack {kind.name}", "codes", got=tuple(codes.shape), expected=expected)
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= len(layout.levels)):
        got = f"{codes.dtype} up to {int(codes.max()) if codes.numel() else 0}"
        raise FormatError(
            f"repack {kind.name}: wrong codes. Got {got}. Expected uint8 below {len(layout.levels)}."
            " The file is damaged: make it again."
        )
    stored = codes.cpu().contiguous().numpy().reshape(len(blocks), kind.block_weights) ^ np.uint8(layout.flip)
    shift = 0
    for plane in layout.planes:
        _write_plane(blocks, plane, stored >> np.uint8(shift))
        shift += plane.bits
    return blocks.reshape(data.shape)


def _layout(kind: GgmlType) -> _Layout:
    try:
        return _LAYOUTS[kind.name]
    except KeyError:
        raise ConfigError(
            f"{kind.name}: codes no single weights. Got this type. Expected one of {', '.join(_LAYOUTS)}."
            " Choose another."
        ) from None


def _as_blocks(where: str, data: Bytes, kind: GgmlType) -> Bytes:
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % kind.block_bytes:
        raise FormatError(
            f"{where} {kind.name}: not usable. Got {data.dtype} of shape {data.shape}. Expected uint8 rows of whole "
            f"{kind.block_bytes}-byte blocks."
            " The file is damaged: make it again."
        )
    return data.reshape(-1, kind.block_bytes)


def _read_plane(blocks: Bytes, plane: _Plane) -> Bytes:
    packed = blocks[:, plane.start : plane.start + plane.size]
    runs = packed.reshape(len(blocks), plane.size // plane.lane, 1, plane.lane)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    return ((runs >> shifts) & np.uint8((1 << plane.bits) - 1)).reshape(len(blocks), plane.size * 8 // plane.bits)


def _write_plane(blocks: Bytes, plane: _Plane, codes: Bytes) -> None:
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    parts = codes.reshape(len(blocks), plane.size // plane.lane, 8 // plane.bits, plane.lane)
    runs = np.bitwise_or.reduce((parts & np.uint8((1 << plane.bits) - 1)) << shifts, axis=2)
    blocks[:, plane.start : plane.start + plane.size] = runs.reshape(len(blocks), plane.size)


def _half(blocks: Bytes, start: int) -> _Floats:
    """Return the float16 at that byte of every block as float32, shape (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _one_scale(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    return _half(blocks, 0), _half(blocks, 2)


def _scales_q2_k(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    # A byte a sub-block: the scale in the low half, the minimum in the high half.
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & np.uint8(15)).astype(np.float32)
    return scales, -(_half(blocks, 82) * (packed >> np.uint8(4)).astype(np.float32))


def _scales_q3_k(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    # Sixteen 6-bit numbers, offset by 32: the low four bits in 8 bytes, the high two bits in 4.
    low = _read_plane(blocks, _Plane(96, 8, bits=4, lane=8))
    high = _read_plane(blocks, _Plane(104, 4, bits=2, lane=4))
    numbers = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    return _half(blocks, 108) * numbers, None


def _scales_q4_k(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    # Eight 6-bit scales and eight 6-bit minima. Numbers 0 to 3 stand in the low six bits of a byte each; the low
    # four bits of 4 to 7 share the last four bytes, their high two bits are the high bits of the first eight bytes.
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    high_scale, high_minimum = (first >> np.uint8(2)) & np.uint8(0x30), (second >> np.uint8(2)) & np.uint8(0x30)
    scales = np.concatenate([first & np.uint8(63), last & np.uint8(15) | high_scale], axis=1)
    minima = np.concatenate([second & np.uint8(63), last >> np.uint8(4) | high_minimum], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * minima.astype(np.float32))


def _scales_q6_k(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32), None


def _scales_iq4_xs(blocks: Bytes) -> tuple[_Floats, _Floats | None]:
    # Eight 6-bit numbers, offset by 32: the high two bits in 2 bytes, the low four bits in 4.
    high = _read_plane(blocks, _Plane(2, 2, bits=2, lane=1))
    low = _read_plane(blocks, _Plane(4, 4, bits=4, lane=1))
    numbers = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    return _half(blocks, 0) * numbers, None


def _levels(first: int, bits: int) -> tuple[float, ...]:
    return tuple(float(first + code) for code in range(1 << bits))


_LAYOUTS: dict[str, _Layout] = {
    "Q4_0": _Layout((_Plane(2, 16, 4, 16),), _levels(-8, 4), 32, _one_scale),
    "Q4_1": _Layout((_Plane(4, 16, 4, 16),), _levels(0, 4), 32, _scale_and_minimum),
    "Q5_0": _Layout((_Plane(6, 16, 4, 16), _Plane(2, 4, 1, 1)), _levels(-16, 5), 32, _one_scale),
    "Q5_1": _Layout((_Plane(8, 16, 4, 16), _Plane(4, 4, 1, 1)), _levels(0, 5), 32, _scale_and_minimum),
    "Q8_0": _Layout((_Plane(2, 32, 8, 32),), _levels(-128, 8), 32, _one_scale, flip=0x80),
    "Q2_K": _Layout((_Plane(16, 64, 2, 32),), _levels(0, 2), 16, _scales_q2_k),
    "Q3_K": _Layout((_Plane(32, 64, 2, 32), _Plane(0, 32, 1, 32)), _levels(-4, 3), 16, _scales_q3_k),
    "Q4_K": _Layout((_Plane(16, 128, 4, 32),), _levels(0, 4), 32, _scales_q4_k),
    "Q5_K": _Layout((_Plane(48, 128, 4, 32), _Plane(16, 32, 1, 32)), _levels(0, 5), 32, _scales_q4_k),
    "Q6_K": _Layout((_Plane(0, 128, 4, 64), _Plane(128, 64, 2, 32)), _levels(-32, 6), 16, _scales_q6_k),
    "IQ4_NL": _Layout((_Plane(2, 16, 4, 16),), tuple(map(float, _NONLINEAR)), 32, _one_scale),
    "IQ4_XS": _Layout((_Plane(8, 128, 4, 16),), tuple(map(float, _NONLINEAR)), 32, _scales_iq4_xs),
}

GRID_TYPES = frozenset(_LAYOUTS)
"""Names of the types that ``unpack`` and ``repack`` know."""
