"""One quantized linear as the tensors of an EXL2 file, and back.

Source: format document, sections 1 to 4. Everything that the file adds to :class:`QuantizedLinear` is here:
    bit
packing, padding columns, word offsets and the inverse permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import FormatError, ShapeError
from .layout import MAX_ROWS, WIDTHS, RowGroup, padded_columns
from .linear import QuantizedLinear
from .pack import pack_codes, pack_scale_codes, unpack_codes, unpack_scale_codes

__all__ = ["QUANTIZED_SUFFIXES", "linear_from_tensors", "linear_tensors"]

_DTYPES = {
    "q_weight": torch.int32,
    "q_scale": torch.int32,
    "q_scale_max": torch.float16,
    "q_groups": torch.int16,
    "q_invperm": torch.int32,
}
QUANTIZED_SUFFIXES = tuple(_DTYPES)
"""Last name components of the five tensors that every quantized linear has."""

_PADDING_SCALE_CODE = 15


def linear_tensors(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """Return the tensors that a file stores for one linear, on the CPU.

    Args:
        name: Full name of the linear, without ``.weight``.
        linear: The linear; it is validated first.

    Returns:
        The five ``<name>.q_*`` tensors and, if there is a bias, ``<name>.bias``, all padded to N columns:
        padding codes are 2^(b-1), which decode to zero, padding scale codes 15, padding biases 0.

    Raises:
        FormatError: The linear breaks a rule of the format.
        ShapeError: Its tensors disagree in shape.
    """
    linear.validate(name)
    padding = padded_columns(linear.out_features) - linear.out_features
    words: list[Tensor] = []
    table: list[int] = []
    first_row = first_word = 0
    for group in linear.groups:
        codes = linear.codes[first_row : first_row + group.rows].cpu()
        words.append(pack_codes(pad(codes, (0, padding), value=1 << (group.bits - 1)), group.bits))
        table += [group.bits, first_word]
        first_row += group.rows
        first_word += int(words[-1].shape[0])
    scale_codes = pad(linear.scale_codes.cpu(), (0, padding), value=_PADDING_SCALE_CODE)
    tensors = {
        "q_weight": torch.cat(words),
        "q_scale": pack_scale_codes(scale_codes),
        "q_scale_max": linear.ceilings.cpu().contiguous(),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_invperm": linear.order.cpu().argsort().to(torch.int32),
    }
    if linear.bias is not None:
        tensors["bias"] = pad(linear.bias.cpu(), (0, padding))
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def linear_from_tensors(name: str, tensors: Mapping[str, Tensor], out_features: int) -> QuantizedLinear:
    """Undo :func:`linear_tensors`.

    Args:
        name: Full name of the linear, without ``.weight``.
        tensors: At least the five ``<name>.q_*`` tensors; ``<name>.bias`` is taken if present.
        out_features: Number of output features without padding.

    Returns:
        The linear, cropped to ``out_features`` columns and validated.

    Raises:
        FormatError: A tensor is missing, or breaks a rule of the format.
        ShapeError: A tensor does not have the shape that the others demand.
    """
    found = {suffix: _take(name, tensors, suffix, dtype) for suffix, dtype in _DTYPES.items()}
    words, invperm = found["q_weight"], found["q_invperm"]
    columns = padded_columns(out_features)
    if words.ndim != 2:
        raise FormatError(f"{name}.q_weight: {words.ndim} dimensions, expected a matrix (words, {columns}).")
    groups = _groups(name, found["q_groups"], int(words.shape[0]))
    _require_shape(name, "q_weight", words, (int(words.shape[0]), columns))
    _require_shape(name, "q_scale", found["q_scale"], (len(groups), columns // 8))
    _require_shape(name, "q_scale_max", found["q_scale_max"], (len(groups),))
    _require_shape(name, "q_invperm", invperm, (sum(group.rows for group in groups),))
    rows = int(invperm.shape[0])
    if rows > MAX_ROWS or not torch.equal(invperm.sort().values, torch.arange(rows, dtype=torch.int32)):
        raise FormatError(f"{name}.q_invperm: not a permutation of 0 to {rows - 1} (at most {MAX_ROWS} rows).")

    codes = torch.empty((rows, out_features), dtype=torch.uint8)
    first_row = first_word = 0
    for group in groups:
        next_row, next_word = first_row + group.rows, first_word + group.rows * group.bits // 32
        packed = words[first_word:next_word, :out_features]
        codes[first_row:next_row] = unpack_codes(packed, group.rows, group.bits)
        first_row, first_word = next_row, next_word
    bias = None
    if f"{name}.bias" in tensors:
        bias = _take(name, tensors, "bias", torch.float16)
        _require_shape(name, "bias", bias, (columns,))
        bias = bias[:out_features].clone()
    linear = QuantizedLinear(
        groups=groups,
        codes=codes,
        scale_codes=unpack_scale_codes(found["q_scale"])[:, :out_features].contiguous(),
        ceilings=found["q_scale_max"],
        order=invperm.argsort(),
        bias=bias,
    )
    linear.validate(name)
    return linear


def _take(name: str, tensors: Mapping[str, Tensor], suffix: str, dtype: torch.dtype) -> Tensor:
    key = f"{name}.{suffix}"
    if key not in tensors:
        raise FormatError(f"{key}: missing. All of {', '.join(QUANTIZED_SUFFIXES)} must be stored.")
    if tensors[key].dtype != dtype:
        raise FormatError(f"{key}: stored as {tensors[key].dtype}, expected {dtype}.")
    return tensors[key]


def _require_shape(name: str, suffix: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(name, suffix, got=tuple(tensor.shape), expected=expected)


def _groups(name: str, table: Tensor, total_words: int) -> tuple[RowGroup, ...]:
    """Return the row groups of a ``q_groups`` tensor, whose sizes follow from the word offsets alone."""
    key = f"{name}.q_groups"
    if table.ndim != 1 or not table.numel() or table.numel() % 2:
        raise FormatError(f"{key}: shape {tuple(table.shape)}, expected (2 * groups,).")
    widths, offsets = table[0::2].tolist(), [*table[1::2].tolist(), total_words]
    if any(bits not in WIDTHS for bits in widths):
        raise FormatError(f"{key}: bit widths {sorted(set(widths))}, expected only {WIDTHS}.")
    if offsets[0] != 0 or any(a >= b for a, b in pairwise(offsets)):
        raise FormatError(f"{key}: word offsets must start at 0 and increase up to {total_words}, got {offsets}.")
    groups = []
    for index, bits in enumerate(widths):
        rows, rest = divmod((offsets[index + 1] - offsets[index]) * 32, bits)
        if rest or rows % 16 or (rows % 32 and bits != 2):
            words = offsets[index + 1] - offsets[index]
            raise FormatError(f"{key}: group {index} has {words} words of {bits}-bit rows, not whole 32-row blocks.")
        groups.append(RowGroup(bits, rows))
    return tuple(groups)
