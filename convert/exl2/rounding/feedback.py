"""Rounding with error feedback (GPTQ) onto the EXL2 grid.

Legend: W is the weight as EXL2 stores it, shape (K, columns), rows being input features; H = mean x x^T, shape (K, K);
H^-1 = U^T U with U upper triangular. Row k is rounded after the errors of the rows before it have been fed back
into it. With e_k = (w_k - q_k) / U_kk the feedback is w_k -= sum_{j<k} U_jk e_j, and the sum of e^2 over all rows is
exactly tr(dW^T H dW): every e^2 is that weight's share of the layer's output error.
Source: Frantar et al., GPTQ (arXiv 2210.17323), section 3.3, with its Cholesky form read from left to right.

Feedback between outputs (``coupling``) goes on inside each row group: given the group's targets, which hold the
feedback of all earlier rows, set after set of columns makes up for what the sets before it missed in these rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..file.layout import RowGroup
from ..file.linear import QuantizedLinear
from .coupling import OutputFeedback, round_in_sets
from .grid import GroupGrid, search_grids

__all__ = ["errors_by_group", "round_linear", "round_linear_"]

_CHUNK_COLUMNS = 8192
"""Columns that go through the row loop together: wide enough to hide call overhead, small enough for the cache."""


def round_linear(
    weight: Tensor,
    upper: Tensor,
    groups: Sequence[RowGroup],
    order: Tensor,
    column_weights: Tensor,
    outputs: OutputFeedback | None = None,
) -> tuple[QuantizedLinear, Tensor]:
    """Round one linear, group by group in stored order.

    Args:
        weight: The weight to represent, float32, shape (K, out): the transpose of a Hugging Face weight.
        upper: U for the *stored* row order, float32, shape (K, K).
        groups: Row groups in stored order.
        order: Input feature of each stored row, int64, shape (K,).
        column_weights: Share of each output in the end loss, float32, shape (out,).
        outputs: How outputs answer to each other's errors; None rounds each for itself.

    Returns:
        The quantized linear, without bias, and each group's sum of e^2 per column (its part of tr(dW^T H dW) in
        the units of H), float32, shape (groups, out).
    """
    own = weight.clone(memory_format=torch.contiguous_format)
    return round_linear_(own, upper, groups, order, column_weights, outputs)


def round_linear_(
    weight: Tensor,
    upper: Tensor,
    groups: Sequence[RowGroup],
    order: Tensor,
    column_weights: Tensor,
    outputs: OutputFeedback | None = None,
) -> tuple[QuantizedLinear, Tensor]:
    """As ``round_linear``, in the memory of ``weight``, which must be contiguous: no second copy of an output head."""
    work = weight
    for part in work.split(_CHUNK_COLUMNS, dim=1):
        part.copy_(part[order])
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    max_scales, scale_codes, errors = [], [], []
    first = 0
    for group in groups:
        rows = slice(first, first + group.rows)
        (grid,) = _round_group(work, codes, upper, rows, [group.bits], column_weights, outputs)
        max_scales.append(grid.max_scale)
        scale_codes.append(grid.codes)
        errors.append(work[rows].square().sum(dim=0))
        first += group.rows
    linear = QuantizedLinear(
        groups=tuple(groups),
        codes=codes,
        scale_codes=torch.stack(scale_codes),
        max_scales=torch.stack(max_scales),
        order=order,
    )
    return linear, torch.stack(errors)


def errors_by_group(
    weight: Tensor,
    upper: Tensor,
    group_rows: Sequence[int],
    widths: Sequence[int],
    column_weights: Tensor,
) -> Tensor:
    """Round one linear once at every width and say where the error falls.

    Args:
        weight: float32, shape (K, out), rows in the order of ``upper``.
        upper: U, float32, shape (K, K).
        group_rows: Rows of each group, summing to K.
        widths: Bit widths to try.
        column_weights: Weight of each output's squared error, float32, shape (out,).

    Returns:
        ``sum_n column_weights_n * sum_{k in group} e_kn^2``, float32, shape (groups, widths).
    """
    columns = weight.shape[1]
    work = weight.repeat(1, len(widths))
    damages = []
    first = 0
    for count in group_rows:
        rows = slice(first, first + count)
        _round_group(work, None, upper, rows, widths, column_weights)
        damages.append(work[rows].square().sum(dim=0).view(len(widths), columns) @ column_weights)
        first += count
    return torch.stack(damages)


def _round_group(
    work: Tensor,
    codes: Tensor | None,
    upper: Tensor,
    rows: slice,
    widths: Sequence[int],
    column_weights: Tensor,
    outputs: OutputFeedback | None = None,
) -> list[GroupGrid]:
    # Rounds `work[rows]`, whose columns are the linear's, once for every width, side by side.
    # Before: rows above hold their errors e. After: `work[rows]` holds e too, `codes[rows]` codes.
    group = work[rows]
    if rows.start:
        group.addmm_(upper[: rows.start, rows].T, work[: rows.start], alpha=-1)
    block = upper[rows, rows]
    row_weights = block.diagonal().square().reciprocal()
    targets = group.unflatten(1, (len(widths), -1)).transpose(0, 1).contiguous()
    grids = search_grids(targets, row_weights, column_weights, widths)
    scales = torch.cat([grid.scales for grid in grids])
    if outputs is not None:
        assert codes is not None
        _round_coupled(group, codes[rows], block, scales, 1 << (widths[0] - 1), outputs)
        return grids
    halves = torch.tensor([1 << (bits - 1) for bits in widths], dtype=scales.dtype, device=scales.device)
    halves = halves.repeat_interleave(targets.shape[2])
    for first in range(0, work.shape[1], _CHUNK_COLUMNS):
        columns = slice(first, first + _CHUNK_COLUMNS)
        _round_rows(
            group[:, columns],
            None if codes is None else codes[rows, columns],
            block,
            scales[columns],
            halves[columns],
        )
    return grids


def _round_rows(target: Tensor, codes: Tensor | None, block: Tensor, scales: Tensor, halves: Tensor) -> None:
    # The recurrence inside one group: row i minus the feedback of rows 0..i-1, rounded, replaced by its error.
    # In steps of each column's scale, and with errors e_j U_jj, few operations are left for every row.
    pivots = block.diagonal()[:, None]
    feedback = (block / pivots).T.contiguous()
    steps = target / scales
    rounded, errors = torch.empty_like(steps), torch.empty_like(steps)
    lowest, highest = -halves, halves - 1
    for i, row in enumerate(steps.unbind()):
        moved = torch.addmv(row, errors[:i].T, feedback[i, :i], alpha=-1) if i else row
        nearest = torch.round(moved, out=rounded[i])
        torch.clamp(nearest, lowest, highest, out=nearest)
        torch.sub(moved, nearest, out=errors[i])
    if codes is not None:
        codes.copy_(rounded + halves)
    torch.mul(errors, scales / pivots, out=target)


def _round_coupled(
    target: Tensor, codes: Tensor, block: Tensor, scales: Tensor, half: int, outputs: OutputFeedback
) -> None:
    # As `_round_rows`, with outputs that answer to each other.
    feedback = (block / block.diagonal()[:, None]).triu(1).T
    chosen = round_in_sets(target / scales, feedback, half, scales, outputs)
    codes.copy_(chosen + half)
    # What row k missed is U_kk e_k + sum_{j<k} U_jk e_j.
    target.copy_(torch.linalg.solve_triangular(block.T, target - chosen * scales, upper=False))
