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

from ....errors import FormatError, ShapeError
from .layout import MAX_ROWS, WIDTHS, RowGroup, padded_columns
from .linear import QuantizedLinear
from .pack import pack_codes, pack_scale_codes, unpack_codes, unpack_scale_codes

__all__ = ["QUANTIZED_SUFFIXES", "check_stored", "linear_from_tensors", "linear_tensors"]

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
        "q_scale_max": linear.max_scales.cpu().contiguous(),
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
    check_stored(name, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}, out_features)
    found = {suffix: tensors[f"{name}.{suffix}"] for suffix in QUANTIZED_SUFFIXES}
    words, invperm = found["q_weight"], found["q_invperm"]
    groups = _groups(name, found["q_groups"], int(words.shape[0]))
    _require_shape(name, "q_invperm", tuple(invperm.shape), (sum(group.rows for group in groups),))
    rows = int(invperm.shape[0])
    if rows > MAX_ROWS or not torch.equal(invperm.sort().values, torch.arange(rows, dtype=torch.int32)):
        raise FormatError(
            f"{name}.q_invperm: not a permutation of 0 to {rows - 1} (at most {MAX_ROWS} rows)."
            " The file is damaged: make it again."
        )

    codes = torch.empty((rows, out_features), dtype=torch.uint8)
    first_row = first_word = 0
    for group in groups:
        next_row, next_word = first_row + group.rows, first_word + group.rows * group.bits // 32
        packed = words[first_word:next_word, :out_features]
        codes[first_row:next_row] = unpack_codes(packed, group.rows, group.bits)
        first_row, first_word = next_row, next_word
    bias = None
    if f"{name}.bias" in tensors:
        bias = tensors[f"{name}.bias"][:out_features].clone()
    linear = QuantizedLinear(
        groups=groups,
        codes=codes,
        scale_codes=unpack_scale_codes(found["q_scale"])[:, :out_features].contiguous(),
        max_scales=found["q_scale_max"],
        order=invperm.argsort(),
        bias=bias,
    )
    linear.validate(name)
    return linear


def check_stored(name: str, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], out_features: int) -> None:
    """Check dtypes and shapes of the tensors that a file stores for one linear; needs no data.

    Args:
        name: Full name of the linear, without ``.weight``.
        stored: Dtype and shape of at least these tensors, by full name.
        out_features: Number of output features without padding.

    Raises:
        FormatError: A tensor is missing, of another dtype or of impossible sizes.
        ShapeError: A tensor does not have the shape that the others demand.
    """
    for suffix, dtype in (*_DTYPES.items(), ("bias", torch.float16)):
        key = f"{name}.{suffix}"
        if key not in stored:
            if suffix == "bias":
                continue
            raise FormatError(f"{key}: missing. All of {', '.join(QUANTIZED_SUFFIXES)} must be stored.")
        if stored[key][0] != dtype:
            raise FormatError(
                f"{key}: stored as {stored[key][0]}. Expected {dtype}. The file is damaged: make it again."
            )
    shapes = {suffix: stored[f"{name}.{suffix}"][1] for suffix in QUANTIZED_SUFFIXES}
    columns, weight, table = padded_columns(out_features), shapes["q_weight"], shapes["q_groups"]
    if len(weight) != 2 or 0 in weight:
        raise FormatError(
            f"{name}.q_weight: shape {weight}. Expected a matrix (words, {columns})."
            " The file is damaged: make it again."
        )
    if len(table) != 1 or not table[0] or table[0] % 2:
        raise FormatError(
            f"{name}.q_groups: shape {table}. Expected (2 * groups,). The file is damaged: make it again."
        )
    if len(shapes["q_invperm"]) != 1 or not 0 < shapes["q_invperm"][0] <= MAX_ROWS:
        raise FormatError(
            f"{name}.q_invperm: shape {shapes['q_invperm']}. Expected (rows,), at most {MAX_ROWS}."
            " The file is damaged: make it again."
        )
    groups = table[0] // 2
    _require_shape(name, "q_weight", weight, (weight[0], columns))
    _require_shape(name, "q_scale", shapes["q_scale"], (groups, columns // 8))
    _require_shape(name, "q_scale_max", shapes["q_scale_max"], (groups,))
    if f"{name}.bias" in stored:
        _require_shape(name, "bias", stored[f"{name}.bias"][1], (columns,))


def _require_shape(name: str, suffix: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ShapeError(name, suffix, got=got, expected=expected)


def _groups(name: str, table: Tensor, total_words: int) -> tuple[RowGroup, ...]:
    """Return the row groups of a ``q_groups`` tensor, whose sizes follow from the word offsets alone."""
    key = f"{name}.q_groups"
    widths, offsets = table[0::2].tolist(), [*table[1::2].tolist(), total_words]
    if any(bits not in WIDTHS for bits in widths):
        raise FormatError(
            f"{key}: bit widths {sorted(set(widths))}. Expected only {WIDTHS}. The file is damaged: make it again."
        )
    if offsets[0] != 0 or any(a >= b for a, b in pairwise(offsets)):
        raise FormatError(
            f"{key}: word offsets must start at 0 and increase up to {total_words}. Got {offsets}."
            " The file is damaged: make it again."
        )
    groups = []
    for index, bits in enumerate(widths):
        rows, rest = divmod((offsets[index + 1] - offsets[index]) * 32, bits)
        if rest or rows % 16 or (rows % 32 and bits != 2):
            words = offsets[index + 1] - offsets[index]
            raise FormatError(
                f"{key}: group {index} has {words} words of {bits}-bit rows, not whole 32-row blocks."
                " The file is damaged: make it again."
            )
        groups.append(RowGroup(bits, rows))
    return tuple(groups)
