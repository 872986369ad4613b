"""One quantized linear as integers, and the weight that EXL2 readers make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import FormatError, ShapeError
from .layout import MAX_ROWS, ROW_MULTIPLE, WIDTHS, RowGroup, linear_bits

__all__ = ["QuantizedLinear", "effective_scale"]

_CHUNK_ELEMENTS = 1 << 22
"""Weights decoded at a time: bounds the float32 temporaries to 16 MiB each."""


def effective_scale(max_scales: Tensor, scale_codes: Tensor) -> Tensor:
    """Return the scale that EXL2 readers use, with both of their fp16 roundings.

    Args:
        max_scales: ``q_scale_max``, float16, shape (...); one per group.
        scale_codes: Integers 0 to 15, shape (..., N).

    Returns:
        ``fp16((code + 1)^2 * fp16(max_scale / 256))``, float16, shape (..., N).
    """
    unit = (max_scales.float() / 256).half().float()
    return (unit.unsqueeze(-1) * (scale_codes.float() + 1).square()).half()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedLinear:
    """One linear as integers, before bit packing. Columns are unpadded; rows stand in stored order.

    Attributes:
        groups: Row groups in stored order, widths never increasing, rows summing to K.
        codes: Weight codes, uint8, shape (K, out); a code c of width b means the integer c - 2^(b-1).
        scale_codes: Scale codes 0 to 15, uint8, shape (groups, out).
        max_scales: Scale largest scales, float16, shape (groups,), finite and not negative.
        order: Input feature of each stored row, int64, shape (K,), a permutation.
        bias: float16, shape (out,), or None.
    """

    groups: tuple[RowGroup, ...]
    codes: Tensor
    scale_codes: Tensor
    max_scales: Tensor
    order: Tensor
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """K, the number of input features."""
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        """Number of output features, padding excluded."""
        return int(self.codes.shape[1])

    @property
    def stored_bits(self) -> int:
        """Stored size in bits, padding and overhead included, bias excluded."""
        return linear_bits(self.out_features, self.groups)

    @property
    def group_of_input(self) -> Tensor:
        """Row group of each input feature, int64, shape (K,)."""
        rows = torch.tensor([group.rows for group in self.groups], device=self.order.device)
        of_rows = torch.arange(len(rows), device=rows.device).repeat_interleave(rows, output_size=self.in_features)
        return of_rows[self.order.argsort()]

    def validate(self, name: str) -> None:
        """Check every rule of the format that a reader would trip over.

        Args:
            name: Full name of the linear, for error messages.

        Raises:
            ShapeError: Two of the tensors disagree in shape.
            FormatError: A width, group, largest scale, code or the permutation is not what the format allows.
        """
        self._validate_shapes(name)
        self._validate_groups(name)
        rows = self.in_features
        if not bool(torch.isfinite(self.max_scales).all() and (self.max_scales >= 0).all()):
            raise FormatError(
                f"{name}: largest scales must be finite and not negative. The file is damaged: make it again."
            )
        if not torch.equal(self.order.sort().values, torch.arange(rows, device=self.order.device)):
            raise FormatError(
                f"{name}: the row order is not a permutation of 0 to {rows - 1}. The file is damaged: make it again."
            )
        if int(self.scale_codes.max()) > 15:
            raise FormatError(
                f"{name}: scale codes must be from 0 to 15. Got {int(self.scale_codes.max())}."
                " The file is damaged: make it again."
            )
        # The largest magnitude is 2^(b-1) steps; from 65520 on, fp16 rounds to infinity.
        scales = effective_scale(self.max_scales, self.scale_codes.amax(dim=1, keepdim=True)).float().flatten()
        codes = torch.stack([part.max() for part in self.codes.split([group.rows for group in self.groups])])
        for group, scale, largest in zip(self.groups, scales.tolist(), codes.tolist(), strict=True):
            if largest >= 1 << group.bits:
                raise FormatError(
                    f"{name}: code {largest} does not fit in a {group.bits}-bit group."
                    " The file is damaged: make it again."
                )
            if scale * (1 << (group.bits - 1)) >= 65520:
                raise FormatError(
                    f"{name}: scale {scale} in a {group.bits}-bit group exceeds what fp16 can hold."
                    " The file is damaged: make it again."
                )

    def _validate_shapes(self, name: str) -> None:
        if self.codes.ndim != 2 or 0 in self.codes.shape:
            raise FormatError(
                f"{name}: codes have shape {tuple(self.codes.shape)}. Expected a matrix (K, out)."
                " The file is damaged: make it again."
            )
        rows, columns = self.in_features, self.out_features
        count = len(self.groups)
        expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
            "codes": (self.codes, (rows, columns), torch.uint8),
            "scale codes": (self.scale_codes, (count, columns), torch.uint8),
            "scale largest scales": (self.max_scales, (count,), torch.float16),
            "row order": (self.order, (rows,), torch.int64),
        }
        if self.bias is not None:
            expected["bias"] = (self.bias, (columns,), torch.float16)
        for what, (tensor, shape, dtype) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ShapeError(name, what, got=tuple(tensor.shape), expected=shape)
            if tensor.dtype != dtype:
                raise FormatError(
                    f"{name}: {what} are stored as {tensor.dtype}. Expected {dtype}."
                    " The file is damaged: make it again."
                )

    def _validate_groups(self, name: str) -> None:
        widths = [g.bits for g in self.groups]
        if not widths or any(b not in WIDTHS for b in widths):
            raise FormatError(
                f"{name}: bit widths must be among {WIDTHS}. Got {sorted(set(widths))}."
                " The file is damaged: make it again."
            )
        if widths != sorted(widths, reverse=True):
            raise FormatError(
                f"{name}: bit widths must never increase from group to group. Got {widths}."
                " The file is damaged: make it again."
            )
        for index, group in enumerate(self.groups):
            multiple = ROW_MULTIPLE // 2 if group.bits == 2 and index == len(widths) - 1 else ROW_MULTIPLE
            if group.rows <= 0 or group.rows % multiple:
                raise FormatError(
                    f"{name}: group {index} of {group.bits} bits has {group.rows} rows. "
                    f"Expected a positive multiple of {multiple}."
                    " The file is damaged: make it again."
                )
        total = sum(g.rows for g in self.groups)
        if total != self.in_features or total > MAX_ROWS:
            raise FormatError(
                f"{name}: groups hold {total} rows. Expected {self.in_features} and at most {MAX_ROWS}."
                " The file is damaged: make it again."
            )

    def dequantize(self) -> Tensor:
        """Return the dense weight as a Hugging Face linear holds it: float16, shape (out, K).

        Computed from the integers alone, with one fp16 rounding per weight, as EXL2 readers reconstruct it.
        """
        device = self.codes.device
        sizes = torch.tensor([group.rows for group in self.groups], device=device)
        halves = torch.tensor([float(1 << (group.bits - 1)) for group in self.groups], device=device)
        stored_row = self.order.argsort()  # of each input feature
        group = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=self.in_features)[
            stored_row
        ]
        half = halves[group][:, None]
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.float16, device=device)
        step = max(1, _CHUNK_ELEMENTS // self.in_features)
        for first in range(0, self.out_features, step):
            columns = slice(first, first + step)
            scale = effective_scale(self.max_scales, self.scale_codes[:, columns]).float()
            weight[columns] = self.codes[stored_row, columns].float().sub_(half).mul_(scale[group]).half().T
        return weight
