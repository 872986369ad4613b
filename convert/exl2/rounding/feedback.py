"""Rounding with error feedback (GPTQ) onto the EXL2 grid.

Legend: W is the weight as EXL2 stores it, shape (K, columns), rows being input features; H = mean x x^T, shape (K, K);
H = R R^T with R upper triangular; D = W - Q, what rounding changes. Row k is rounded after the rows before it have been
fed back into it: its target is t_k = w_k + sum_{j<k} (R_jk / R_kk) d_j, its error e_k = R_kk (t_k - q_k), and the sum
of e^2 over all rows is exactly tr(D^T H D): every e^2 is that weight's share of the layer's output error.
Source: Frantar et al., GPTQ (arXiv 2210.17323), section 3.3, read from left to right, with the factor of H in the place
of that of its inverse (see ``bpwise.linalg.hessian``).

On CUDA devices a kernel (``kernels``) rounds each row group, elsewhere a loop over its rows.

Feedback between outputs (``coupling``) goes on inside each row group: given the group's targets, which hold the
feedback of all earlier rows, set after set of columns makes up for what the sets before it missed in these rows.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ....errors import BpwiseWarning
from ....linalg.outputs import OutputFeedback
from ..file.layout import RowGroup
from ..file.linear import QuantizedLinear
from .coupling import RowRounder, round_in_sets, round_set_by_set
from .grid import GroupGrid, WidthTables, search_grids

__all__ = ["errors_by_group", "round_linear", "round_linear_", "row_kernel"]

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
        upper: R for the *stored* row order, float32, shape (K, K).
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
    widths = WidthTables.of(sorted({group.bits for group in groups}), work.device)
    first = 0
    for group in groups:
        rows = slice(first, first + group.rows)
        (grid,), squares = _round_group(work, codes, upper, rows, widths.only(group.bits), column_weights, outputs)
        max_scales.append(grid.max_scale)
        scale_codes.append(grid.codes)
        errors.append(squares)
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
        upper: R, float32, shape (K, K).
        group_rows: Rows of each group, summing to K.
        widths: Bit widths to try.
        column_weights: Weight of each output's squared error, float32, shape (out,).

    Returns:
        ``sum_n column_weights_n * sum_{k in group} e_kn^2``, float32, shape (groups, widths).
    """
    columns = weight.shape[1]
    work = weight.repeat(1, len(widths))
    tables = WidthTables.of(widths, work.device)
    damages = []
    first = 0
    for count in group_rows:
        rows = slice(first, first + count)
        _, squares = _round_group(work, None, upper, rows, tables, column_weights)
        damages.append(squares.view(len(widths), columns) @ column_weights)
        first += count
    return torch.stack(damages)


def _round_group(
    work: Tensor,
    codes: Tensor | None,
    upper: Tensor,
    rows: slice,
    widths: WidthTables,
    column_weights: Tensor,
    outputs: OutputFeedback | None = None,
) -> tuple[list[GroupGrid], Tensor]:
    # Rounds `work[rows]`, whose columns are the linear's, once for every width, side by side; returns the grids and
    # every column's sum of e^2. Before: rows above hold D. After: `work[rows]` holds it too, `codes[rows]` codes.
    group, root = work[rows], upper[rows, rows]
    pivots = root.diagonal()
    block = torch.linalg.solve_triangular(root, torch.eye(len(root), device=root.device), upper=True)
    target = group.clone()
    if rows.start:
        target.addmm_(block.T, upper[: rows.start, rows].T @ work[: rows.start])
    targets = target.unflatten(1, (len(widths.bits), -1)).transpose(0, 1).contiguous()
    grids = search_grids(targets, pivots.square(), column_weights, widths)
    scales = torch.cat([grid.scales for grid in grids])
    halves = widths.halves.to(scales.dtype).expand(-1, targets.shape[2]).flatten()
    feedback = (block * pivots[:, None]).triu(1).T.contiguous()
    chosen = _chosen_codes(target, scales, feedback, halves, widths, outputs)
    if codes is not None:
        codes[rows] = chosen + halves
    chosen *= scales
    group -= chosen
    return grids, (root.T @ target.sub_(chosen)).square_().sum(dim=0)


def _chosen_codes(
    target: Tensor,
    scales: Tensor,
    feedback: Tensor,
    halves: Tensor,
    widths: WidthTables,
    outputs: OutputFeedback | None,
) -> Tensor:
    # Codes of one row group, less `halves`, float32. With `outputs` there is but one width.
    kernel = row_kernel(target.device, len(target))
    if outputs is not None:
        half = 1 << (widths.bits[0] - 1)
        if kernel is None:
            return round_in_sets(target / scales, feedback, half, scales, outputs)
        return round_set_by_set(target / scales, feedback, half, scales, outputs, kernel)
    if kernel is not None:
        return kernel(target / scales, feedback, halves.contiguous(), target[:, :0], target[:0])
    chosen = torch.empty_like(target)
    for first in range(0, target.shape[1], _CHUNK_COLUMNS):
        columns = slice(first, first + _CHUNK_COLUMNS)
        _round_rows(chosen[:, columns], target[:, columns] / scales[columns], feedback, halves[columns])
    return chosen


def row_kernel(device: torch.device, rows: int) -> RowRounder | None:
    """Return what rounds a row group of so many rows in one launch, or None where a loop over its rows has to do it.

    Args:
        device: Where the weights are.
        rows: Rows of the group.

    Warns:
        BpwiseWarning: Triton is installed and does not work, once a process.
    """
    kernels = _kernels(device) if device.type == "cuda" else None
    return kernels.round_rows if kernels is not None and rows <= kernels.MOST_ROWS else None


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module(".kernels", __package__)
        kernels.try_out(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, its compilers and their caches raise: the loop needs none of them
        warnings.warn(
            f"{device}: Triton does not work here. Got {str(error)[:200]!r}. Expected a kernel that runs: rounding "
            "takes longer without. Install a C compiler, or another version of Triton.",
            BpwiseWarning,
            stacklevel=2,
        )
        return None
    return kernels


def _round_rows(chosen: Tensor, steps: Tensor, feedback: Tensor, halves: Tensor) -> None:
    # The recurrence inside one group, in steps of each column's scale: row i less the feedback of rows 0..i-1, rounded.
    errors = torch.empty_like(steps)
    lowest, highest = -halves, halves - 1
    for i, row in enumerate(steps.unbind()):
        moved = torch.addmv(row, errors[:i].T, feedback[i, :i], alpha=-1) if i else row
        nearest = torch.round(moved, out=chosen[i])
        torch.clamp(nearest, lowest, highest, out=nearest)
        torch.sub(moved, nearest, out=errors[i])
