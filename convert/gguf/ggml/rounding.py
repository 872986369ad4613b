"""Rounding onto ggml's types with error feedback.

ggml's own encoder chooses the scales of a block of 32 or 256 input features, as it does for llama.cpp; what it is given
differs: the weights of a block have first taken over the errors of all blocks before it. Inside the block the codes are
then chosen anew, each answering to the errors of those before it: weight after weight in types that code every weight
for itself, four or eight weights after another in those whose codes are entries of a table (IQ1 to IQ3). Once all
blocks are done, every code is chosen again, a few times over, now that the errors behind it are known as well. MXFP4
keeps ggml's codes. So every type that ggml can encode is served, and llama.cpp reads the result.

Legend: W is the transpose of a Hugging Face weight, shape (K, out); H = mean x x^T, shape (K, K); H = R R^T with R
upper triangular; D = W - Q, what rounding changes. With S a block of rows, its target is
``T = W_S + R_SS^-T sum_{blocks B before} R_BS^T D_B``, its error ``E = R_SS^T (T - Q)``, and the sum of E^2 over all
blocks is exactly tr(D^T H D). With g the rows of one code, the best values for it, given all others, are
``Q_g + H_gg^-1 (H D)_g``, and ``H D = R E``. Source: GPTQ (arXiv 2210.17323), with blocks in the place of single rows
where codes stand for several weights, and the factor of H in the place of that of its inverse (see
``bpwise.linalg.hessian``); then coordinate descent (QuantEase, Behdin et al., arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ....linalg.outputs import OutputFeedback, in_turn
from .blocks import GRID_TYPES, repack, unpack
from .codebooks import CODEBOOK_TYPES, codebook, codes_of, nearest, recode, scales_of
from .kernels import Bytes, GgmlType, decode, encode

__all__ = ["ENCODING", "SWEEPS", "expected_rounding", "round_to_type"]

ENCODING = torch.device("cpu")
"""Where ggml's encoder is, and with it all that waits for it, whatever the device of the weights."""

_AS_GIVEN = frozenset({"Q6_K", "Q8_0", "MXFP4"})
"""Types for which ggml takes importances as they are, or not at all."""

SWEEPS = 2
"""How often codes are chosen again. The first sweep takes about 10 % of the error, the second 3 %, a third 1 %."""

_CHUNK = 256
"""Rows that are swept between two products with all others; a whole number of every type's blocks."""


def round_to_type(
    weight: Tensor,
    upper: Tensor,
    kind: GgmlType,
    outputs: OutputFeedback | None = None,
    *,
    sweeps: int = SWEEPS,
    threads: int = 1,
) -> Bytes:
    """Round one linear.

    Inside a block ggml is to weigh the squared errors of input feature k by R_kk^2: what an error costs after feedback.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        upper: R, rows in the order of the input features, float32, shape (K, K).
        kind: A quantized type; K must be a whole number of its blocks.
        outputs: How outputs make up for each other's errors; None rounds each for itself.
        sweeps: How often all codes are chosen again.
        threads: Threads that ggml's encoder splits the outputs over.

    Returns:
        Encoded rows, one an output, uint8, shape (out, row_bytes).

    Raises:
        BpwiseError: ggml's library is not installed.
        NumericalError: A weight is not finite, or too large for the type.
        ShapeError: K is no whole number of blocks.
    """
    weight, upper = weight.to(ENCODING), upper.to(ENCODING)  # once, not block by block
    grams = _chunk_grams(upper) if kind.name in GRID_TYPES or kind.name in CODEBOOK_TYPES else []
    if outputs is None:
        return _rounded(weight, upper, grams, kind, sweeps, threads)
    data = np.empty((weight.shape[1], kind.row_bytes(len(weight))), dtype=np.uint8)

    def rounded(columns: slice, moved: Tensor) -> Tensor:
        data[columns] = found = _rounded(moved, upper, grams, kind, sweeps, threads)
        return decode(found, kind, threads=threads).T

    in_turn(weight, outputs, rounded)
    return data


def expected_rounding(weight: Tensor, upper: Tensor, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Estimate the errors that ``round_to_type`` will leave, with one encoder call and all blocks at once.

    Each block is rounded as if it were the first. What it takes over from those before it moves its targets, but hardly
    makes them larger: it is left out. So is what choosing codes again gains, half of which other text loses.

    Args:
        weight: As in ``round_to_type``.
        upper: As in ``round_to_type``.
        kind: As in ``round_to_type``.

    Returns:
        dW^T H dW of every output, float32, shape (out,), and dW itself, shape (K, out); both on the CPU.

    Raises:
        BpwiseError: As ``round_to_type``.
    """
    weight = weight.to(ENCODING)
    encoded = _scaled(weight.T.contiguous(), kind, upper.diagonal().square().to(ENCODING), threads=1)
    roots = _blocks(upper, kind.block_weights).to(ENCODING)
    targets = weight.unflatten(0, (len(roots), -1))
    _, missed = _fed_back(targets, roots, encoded, kind, threads=1)
    return (roots.mT @ missed).square().sum(dim=(0, 1)), missed.flatten(0, 1)


def _rounded(
    weight: Tensor, upper: Tensor, grams: Sequence[Tensor], kind: GgmlType, sweeps: int, threads: int
) -> Bytes:
    row_weights, outputs = weight.shape
    data = np.empty((outputs, kind.row_bytes(row_weights)), dtype=np.uint8)
    missed, errors = torch.empty_like(weight), torch.empty_like(weight)  # D and E
    for first in range(0, row_weights, kind.block_weights):
        rows = slice(first, first + kind.block_weights)
        root = upper[rows, rows]
        target = weight[rows]
        if first:
            earlier = upper[:first, rows].T @ missed[:first]
            target = target + torch.linalg.solve_triangular(root.T, earlier, upper=False)
        encoded = _scaled(target.T.contiguous(), kind, root.diagonal().square(), threads)
        encoded, moved = _fed_back(target[None], root[None], encoded, kind, threads)
        errors[rows] = root.T @ moved[0]
        data[:, _bytes_of(rows, kind)] = encoded
        torch.sub(weight[rows], decode(encoded, kind, threads=threads).T, out=missed[rows])
    if grams:
        for _ in range(sweeps):
            _sweep(data, weight, missed, errors, upper, grams, kind)
    return data


def _chunk_grams(upper: Tensor) -> list[Tensor]:
    # H of the rows of every chunk.
    roots = (upper[first : first + _CHUNK, first:] for first in range(0, len(upper), _CHUNK))
    return [root @ root.T for root in roots]


def _scaled(rows: Tensor, kind: GgmlType, importance: Tensor, threads: int) -> Bytes:
    # Blocks with scales for the importances given, (K,). In most types ggml multiplies these by sqrt(s^2 + w^2), s^2
    # being w^2's mean over a block or twice that, so that large weights come out well. Where importances are what
    # errors really cost, that only makes scales too large: it is divided out.
    if kind.name in _AS_GIVEN:
        return encode(rows, kind, importance, threads=threads)
    squares = rows.square().unflatten(1, (-1, kind.block_weights))
    means = squares.mean(dim=2, keepdim=True)
    shares = torch.where(means == 0, 1.0, (means / (means + squares)).sqrt()).flatten(1)
    return encode(rows, kind, importance * shares, threads=threads)


def _blocks(upper: Tensor, length: int) -> Tensor:
    # The blocks of R on its diagonal, shape (blocks, S, S).
    places = [slice(first, first + length) for first in range(0, len(upper), length)]
    return torch.stack([upper[place, place] for place in places])


def _bytes_of(rows: slice, kind: GgmlType) -> slice:
    # Where the codes of whole blocks of input features are in encoded rows.
    return slice(
        rows.start // kind.block_weights * kind.block_bytes, rows.stop // kind.block_weights * kind.block_bytes
    )


def _fed_back(targets: Tensor, roots: Tensor, encoded: Bytes, kind: GgmlType, threads: int) -> tuple[Bytes, Tensor]:
    # Blocks that do not see each other, encoded anew with ggml's scales, and what they miss of their targets, float32,
    # both of shape (blocks, S, out); R_SS has shape (blocks, S, S).
    if kind.name in GRID_TYPES:
        couplings = roots.mT / roots.diagonal(dim1=1, dim2=2)[:, :, None]
        encoded, missed = _weight_by_weight(targets, targets, couplings, encoded, kind)
    elif kind.name in CODEBOOK_TYPES:
        own = _groups(roots, codebook(kind.name).together)
        couplings = torch.linalg.solve_triangular(own.mT, _rows(roots.mT, own), upper=False).flatten(1, 2)
        encoded, missed = _code_by_code(targets, targets, couplings, own, encoded, kind, free=True)
    else:
        missed = targets - decode(encoded, kind, threads=threads).T.view_as(targets)
    return encoded, missed


def _sweep(
    data: Bytes,
    weight: Tensor,
    missed: Tensor,
    errors: Tensor,
    upper: Tensor,
    grams: Sequence[Tensor],
    kind: GgmlType,
) -> None:
    # Chooses all codes again, in place; D and E follow.
    for first, gram in zip(range(0, len(weight), _CHUNK), grams, strict=True):
        rows = slice(first, first + len(gram))
        root = upper[rows, first:]
        place = _bytes_of(rows, kind)
        values, slopes = weight[rows] - missed[rows], root @ errors[first:]  # Q_S and (H D)_S
        data[:, place], moves = _chosen_again(values, gram, slopes, data[:, place].copy(), kind)
        missed[rows] += moves
        errors[first:].addmm_(root.T, moves)


def _chosen_again(values: Tensor, gram: Tensor, slopes: Tensor, encoded: Bytes, kind: GgmlType) -> tuple[Bytes, Tensor]:
    # Rows encoded anew one code after another, and by how much their values fell, (S, out).
    if kind.name in GRID_TYPES:
        powers = gram.diagonal()[:, None]
        free = values + slopes / powers
        encoded, moves = _weight_by_weight(free[None], values[None], (gram / powers)[None], encoded, kind)
    else:
        own = _groups(gram[None], codebook(kind.name).together)
        couplings = torch.linalg.solve(own, _rows(gram[None], own)).flatten(1, 2)
        free = values + torch.linalg.solve(own, _rows(slopes[None], own)).flatten(0, 2)
        roots = torch.linalg.cholesky(own.flip(2, 3)).flip(2, 3)
        encoded, moves = _code_by_code(free[None], values[None], couplings, roots, encoded, kind, free=False)
    return encoded, moves[0]


def _weight_by_weight(
    targets: Tensor, held: Tensor, couplings: Tensor, encoded: Bytes, kind: GgmlType
) -> tuple[Bytes, Tensor]:
    # Encodes rows anew, with their scales: row i is wanted to be targets_i + sum_{j<i} couplings_ij (held_j - q_j).
    # Returns held - q, too. Couplings have shape (blocks, S, S), all others (blocks, S, out).
    blocks = unpack(encoded, kind)

    def by_block(values: Tensor) -> Tensor:
        return values.T.repeat_interleave(blocks.sub_weights, dim=0).view_as(targets)

    scales, offsets = by_block(blocks.scales), by_block(blocks.offsets)
    steps = torch.where(scales == 0, 1.0, 1 / scales)  # a scale of 0 decodes to the offset, whatever the code
    levels = blocks.levels
    lowest, highest = float(levels[0]), float(levels[-1])
    even = bool((levels == levels[0] + torch.arange(len(levels))).all())
    middles = (levels[1:] + levels[:-1]) / 2
    missed, chosen = torch.empty_like(targets), torch.empty_like(targets)
    # A call takes longer than what it computes, so a row takes few.
    parts = (targets - offsets, held - offsets, scales, steps, missed, chosen)
    for i, (free, kept, scale, step, miss, level) in enumerate(zip(*(x.split(1, dim=1) for x in parts), strict=True)):
        wanted = torch.baddbmm(free, couplings[:, i : i + 1, :i], missed[:, :i]) if i else free
        torch.mul(wanted, step, out=level)
        if even:
            level.round_().clamp_(lowest, highest)
        else:
            level.copy_(levels[torch.bucketize(level.contiguous(), middles)])
        torch.addcmul(kept, scale, level, value=-1, out=miss)
    codes = chosen - lowest if even else torch.bucketize(chosen.contiguous(), middles)
    return repack(encoded, kind, _as_rows(codes).to(torch.uint8)), missed


def _code_by_code(
    targets: Tensor, held: Tensor, couplings: Tensor, roots: Tensor, encoded: Bytes, kind: GgmlType, *, free: bool
) -> tuple[Bytes, Tensor]:
    # The same for the rows of a code at once. Codes of ``encoded`` that are better stay, unless codes are free. Roots
    # of the rows' own H, upper triangular, have shape (blocks, groups, rows of a group, the same).
    book = codebook(kind.name)
    scales, offsets = (values.T.contiguous().view_as(targets) for values in scales_of(encoded, kind))
    steps = torch.where(scales == 0, 1.0, scales)
    missed, signs = torch.empty_like(targets), torch.where(held < offsets, -1.0, 1.0)
    codes = codes_of(encoded, kind).T.view(len(targets), -1, targets.shape[2])
    size = book.entries.shape[1]
    for group, first in enumerate(range(0, targets.shape[1], book.together)):
        here, numbers = slice(first, first + book.together), slice(first // size, (first + book.together) // size)
        moved = targets[:, here]
        if first:
            moved = torch.baddbmm(moved, couplings[:, here, :first], missed[:, :first])
        root = roots[:, group]
        found, entries = nearest(((moved - offsets[:, here]) / steps[:, here]).mT, root, book)
        found, value = found.mT, entries.mT * scales[:, here] + offsets[:, here]
        new_signs = torch.where(entries.mT < 0, -1.0, 1.0)
        if not free:
            better = _cost(root, moved - value) < _cost(root, moved - held[:, here])
            found = torch.where(better, found, codes[:, numbers])
            value = torch.where(better, value, held[:, here])
            new_signs = torch.where(better, new_signs, signs[:, here])
        codes[:, numbers], signs[:, here] = found, new_signs
        torch.sub(held[:, here], value, out=missed[:, here])
    return recode(encoded, kind, _as_rows(codes), _as_rows(signs) < 0), missed


def _cost(root: Tensor, missed: Tensor) -> Tensor:
    squares: Tensor = (root.mT @ missed).square().sum(dim=1, keepdim=True)
    return squares


def _groups(values: Tensor, length: int) -> Tensor:
    # Blocks on the diagonal of (blocks, S, S): shape (blocks, groups, length, length).
    count = values.shape[1] // length
    return torch.stack(
        [values[:, g * length : (g + 1) * length, g * length : (g + 1) * length] for g in range(count)], 1
    )


def _rows(values: Tensor, groups: Tensor) -> Tensor:
    # From (blocks, S, out) to (blocks, groups, rows of a group, out).
    rows: Tensor = values.unflatten(1, groups.shape[1:3])
    return rows


def _as_rows(values: Tensor) -> Tensor:
    # From (blocks, S, out) to (out, blocks * S).
    rows: Tensor = values.permute(2, 0, 1).flatten(1)
    return rows
