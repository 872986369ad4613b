"""Codes of affine groups as MLX stores them, and the weights that they stand for.

Of a weight W, shape (out, K), every group of G neighbouring input channels of an output has a scale s and a bias b, and
every weight a code c from 0 to 2^bits - 1: ``w = s c + b``. Codes of an output are one stream of bits, the lowest bits
of the first code first, stored as little-endian words of 32 bits; codes of 3, 5 and 6 bits run on across words.
Source: ``mlx.core.quantize`` of MLX 0.32 (mode "affine").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["PARTS", "decode", "decode_packed", "pack_codes", "unpack_codes"]

PARTS = ("weight", "scales", "biases")
"""Last parts of the names of a module's tensors: words of codes, shape (..., out, K bits / 32); scales and biases,
shape (..., out, groups)."""

_PIECE_ROWS = 4096
"""Rows that are packed or unpacked at a time: bits take eight times the room of codes."""


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes as MLX stores them.

    Args:
        codes: uint8, shape (out, K), each below 2^bits; K a multiple of 32.
        bits: Their width.

    Returns:
        Words, int32 in place of uint32, shape (out, K bits / 32), on the CPU.
    """
    values = codes.cpu().numpy()
    rows, channels = values.shape
    packed = np.empty((rows, channels * bits // 8), dtype=np.uint8)
    for first in range(0, rows, _PIECE_ROWS):
        piece = values[first : first + _PIECE_ROWS]
        bit = np.unpackbits(piece[:, :, None], axis=2, count=bits, bitorder="little")
        packed[first : first + len(piece)] = np.packbits(bit.reshape(len(piece), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4"))


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Return the codes that ``pack_codes`` packed, uint8, shape (out, K).

    Args:
        words: int32 or uint32, shape (out, K bits / 32), on the CPU.
        bits: Width of a code.
    """
    data = words.contiguous().view(torch.uint8).numpy()
    rows, size = data.shape
    codes = np.empty((rows, size * 8 // bits), dtype=np.uint8)
    for first in range(0, rows, _PIECE_ROWS):
        piece = data[first : first + _PIECE_ROWS]
        bit = np.unpackbits(piece, axis=1, bitorder="little").reshape(len(piece), -1, bits)
        codes[first : first + len(piece)] = np.packbits(bit, axis=2, bitorder="little")[:, :, 0]
    return torch.from_numpy(codes)


def decode(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """Return the weight, float32, shape (out, K), as kernels compute with it, which accumulate in float32.

    Args:
        codes: uint8, shape (out, K).
        scales: Floating point, shape (out, groups).
        biases: The same.
    """
    grouped = codes.unflatten(1, (scales.shape[1], -1)).float()
    values: Tensor = (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(1)
    return values


def decode_packed(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Return the weight as ``decode`` does, from packed codes; on the device of the scales.

    Args:
        words: As for ``unpack_codes``, on any device.
        scales: As for ``decode``.
        biases: As for ``decode``.
        bits: Width of a code.
    """
    return decode(unpack_codes(words.cpu(), bits).to(scales.device), scales, biases)
