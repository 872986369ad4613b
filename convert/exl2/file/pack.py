"""Bit packing of weight codes and scale codes, exactly as EXL2 stores them.

One rule covers every width: within a group, each column is a stream of bits; the code of row i occupies
stream bits i*b to i*b + b - 1, least significant first, and stream bit p is bit p mod 32 of word row p // 32
(format document, sections 3 and 4). Thirty-two rows of width b therefore fill exactly b words, and all work
is done on one row of that period at a time: temporaries are a 1/32 of the group, and nothing ever widens to
64 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import FormatError, ShapeError
from .layout import WIDTHS

__all__ = ["pack_codes", "pack_scale_codes", "unpack_codes", "unpack_scale_codes"]

_WORD_BITS = 32
_SCALE_BITS = 4
_SCALES_PER_WORD = 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack the weight codes of one group.

    Args:
        codes: Codes below 2^bits, uint8, shape (rows, columns). Rows are a multiple of 32, or of 16 at 2
            bits.
        bits: Width of a code in bits, one of ``WIDTHS``.

    Returns:
        Packed words, int32, shape (rows * bits / 32, columns), on the device of ``codes``.

    Raises:
        FormatError: The dtype, the width or the number of rows is not what the format knows, or a code is too
            large.
    """
    _require_matrix("pack_codes", codes, torch.uint8)
    rows, columns = codes.shape
    period, words_per_period = _period("pack_codes", rows, bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise FormatError(
            f"pack_codes: a code is {int(codes.max())}. Expected less than {1 << bits}."
            " The file is damaged: make it again."
        )
    words = codes.new_zeros((rows // period, words_per_period, columns), dtype=torch.int32)
    by_period = codes.reshape(rows // period, period, columns)
    for row in range(period):
        word, shift = divmod(row * bits, _WORD_BITS)
        code = by_period[:, row].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > _WORD_BITS:
            words[:, word + 1] |= code >> (_WORD_BITS - shift)
    return words.reshape(-1, columns)


def unpack_codes(words: Tensor, rows: int, bits: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        words: Packed words of one group, int32, shape (rows * bits / 32, columns).
        rows: Number of stored rows in the group.
        bits: Width of a code in bits, one of ``WIDTHS``.

    Returns:
        Codes, uint8, shape (rows, columns), on the device of ``words``.

    Raises:
        FormatError: The dtype, the width or the number of rows is not what the format knows.
        ShapeError: The number of word rows does not fit ``rows`` and ``bits``.
    """
    _require_matrix("unpack_codes", words, torch.int32)
    period, words_per_period = _period("unpack_codes", rows, bits)
    columns = words.shape[1]
    if words.shape[0] != rows * bits // _WORD_BITS:
        expected = (rows * bits // _WORD_BITS, columns)
        raise ShapeError("unpack_codes", "word matrix", got=tuple(words.shape), expected=expected)
    by_period = words.reshape(rows // period, words_per_period, columns)
    codes = torch.empty((rows // period, period, columns), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for row in range(period):
        word, shift = divmod(row * bits, _WORD_BITS)
        # The shift is arithmetic: copies of the sign bit come in from the left and must be masked off.
        code = by_period[:, word] >> shift
        if shift + bits > _WORD_BITS:
            code = code & ((1 << (_WORD_BITS - shift)) - 1) | by_period[:, word + 1] << (_WORD_BITS - shift)
        codes[:, row] = (code & mask).to(torch.uint8)
    return codes.reshape(rows, columns)


def pack_scale_codes(codes: Tensor) -> Tensor:
    """Pack 4-bit scale codes, eight columns to a word, the lowest column in the lowest bits.

    Args:
        codes: Scale codes 0 to 15, uint8, shape (groups, columns); columns a multiple of 8.

    Returns:
        Packed words, int32, shape (groups, columns / 8).

    Raises:
        FormatError: The dtype, the number of columns or a code is not what the format knows.
    """
    _require_matrix("pack_scale_codes", codes, torch.uint8)
    groups, columns = codes.shape
    if columns % _SCALES_PER_WORD:
        raise FormatError(
            f"pack_scale_codes: not usable. Got {columns} columns. Expected a multiple of {_SCALES_PER_WORD}."
            " The file is damaged: make it again."
        )
    if codes.numel() and int(codes.max()) >= 1 << _SCALE_BITS:
        raise FormatError(
            f"pack_scale_codes: a code is {int(codes.max())}. Expected at most 15. The file is damaged: make it again."
        )
    by_word = codes.reshape(groups, columns // _SCALES_PER_WORD, _SCALES_PER_WORD)
    words = codes.new_zeros(by_word.shape[:2], dtype=torch.int32)
    for index in range(_SCALES_PER_WORD):
        words |= by_word[:, :, index].to(torch.int32) << (_SCALE_BITS * index)
    return words


def unpack_scale_codes(words: Tensor) -> Tensor:
    """Undo :func:`pack_scale_codes`.

    Args:
        words: Packed words, int32, shape (groups, columns / 8).

    Returns:
        Scale codes 0 to 15, uint8, shape (groups, columns).

    Raises:
        FormatError: The dtype or the number of dimensions is wrong.
    """
    _require_matrix("unpack_scale_codes", words, torch.int32)
    codes = [((words >> (_SCALE_BITS * index)) & 15).to(torch.uint8) for index in range(_SCALES_PER_WORD)]
    return torch.stack(codes, dim=2).reshape(words.shape[0], -1)


def _period(where: str, rows: int, bits: int) -> tuple[int, int]:
    # 32 rows fill `bits` words. The format's one exception, 16 rows of 2 bits, fill exactly one word.
    if bits not in WIDTHS:
        raise FormatError(
            f"{where}: bit width is {bits}. Expected one of {WIDTHS}. The file is damaged: make it again."
        )
    period = 16 if bits == 2 else _WORD_BITS
    if rows % period:
        raise FormatError(
            f"{where}: not usable. Got {rows} rows of {bits} bits. Expected a multiple of {period}."
            " The file is damaged: make it again."
        )
    return period, period * bits // _WORD_BITS


def _require_matrix(where: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise FormatError(
            f"{where}: not usable. Got a {tensor.dtype} tensor of {tensor.ndim} dimensions. Expected a {dtype} matrix."
            " The file is damaged: make it again."
        )
