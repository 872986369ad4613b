"""Which rows of a linear share a group: those that call for the same width and the same scales.

Legend, per row k of a stored weight (an input feature): s_k is the sum of the squares of its weights, each output
weighed by its Fisher information; the square of the scale that the row alone would have goes with it. d_k is what a
squared error in the row costs if all other rows answer to it, 1 / (H^-1)_kk. Only ratios of s and of d matter.

A group's rows get one width and, in each column, one scale, so at a given width the group costs about its number of
rows times (mean d)(mean s). With widths chosen for each group, the damage at equal size goes with the geometric mean of
that over all rows. The geometric means of d and s themselves are given, so what the grouping costs is
``sum over groups of rows * (log mean d - mean log d + log mean s - mean log s)``. Rows in order of their activity alone
(GPTQ's act-order) leave out s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["grouped_rows", "row_powers"]

_DIRECTIONS = 16
"""Directions in the plane of log d and log s that rows are sorted along to be cut in two, evenly around. Half as many
predict the same damage within 0.2 %, and so does moving rows between groups afterwards."""

_SLICE_ROWS = 256
"""Rows of a weight that are worked on at once: 128 MiB in float32 for 128k outputs."""

_LEAST = 1e-6
"""Smallest d and s, relative to their means: rows of zeros are like any others that hardly matter."""


def grouped_rows(costs: Tensor, powers: Tensor, group_size: int) -> Tensor:
    """Return an order of the rows in which each group's stand together.

    All rows are cut in two along the direction that leaves least to pay, then each half, down to single groups.

    Args:
        costs: d, not negative, float32, shape (K,).
        powers: s, not negative, float32, shape (K,), on the same device.
        group_size: Rows of a group; the last group gets the rest.

    Returns:
        Index of each row, int64, shape (K,): groups by their mean log d, a shorter one last; rows in a group by d; both
        descending.
    """
    logs = torch.stack([_log(costs), _log(powers)]).cpu()  # hundreds of small steps, each of which a GPU would wait for
    angles = torch.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)

    def cut(rows: Tensor) -> list[Tensor]:
        if len(rows) <= group_size:
            return [rows]
        first = -(-len(rows) // group_size) // 2 * group_size
        sorted_rows = rows[(directions @ logs[:, rows]).argsort(dim=1, descending=True, stable=True)]
        values = logs[:, sorted_rows]  # (2, directions, rows)
        losses = _loss(values[..., :first]) + _loss(values[..., first:])
        best = sorted_rows[losses.argmin()]
        return cut(best[:first]) + cut(best[first:])

    groups = cut(torch.arange(logs.shape[1]))
    rest = [groups.pop()] if len(groups[-1]) < group_size else []
    groups.sort(key=lambda rows: -float(logs[0, rows].mean()))
    in_groups = [rows[logs[0, rows].argsort(descending=True, stable=True)] for rows in [*groups, *rest]]
    return torch.cat(in_groups).to(costs.device)


def row_powers(weight: Tensor, fisher: Tensor) -> Tensor:
    """Return the squares of every row's weights, summed over the outputs, each times its Fisher weight.

    Args:
        weight: Floating point, shape (K, out).
        fisher: Weight of each output, float32, shape (out,).

    Returns:
        Float32, shape (K,).
    """
    return torch.cat([rows.float().square() @ fisher for rows in weight.split(_SLICE_ROWS)])


def _log(values: Tensor) -> Tensor:
    mean = values.mean()
    return (values / mean).clamp(min=_LEAST).log() if mean > 0 else torch.zeros_like(values)


def _loss(logs: Tensor) -> Tensor:
    # Of one group: (2, ..., rows) to (...).
    rows = logs.shape[-1]
    return (rows * (logs.logsumexp(dim=-1) - math.log(rows)) - logs.sum(dim=-1)).sum(dim=0)
