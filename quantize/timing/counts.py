"""Work of measuring, rounding, writing and evaluating, counted from shapes alone.

Where something depends on the values (how many tokens are left out, what damping a factor takes), the usual case
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ...convert.rounding import FormatWork
from ...eval.metrics.divergence import PIECE_ELEMENTS
from ...eval.original import FLOOR_TOKENS
from ...linalg.hessian import FEW_CHANNELS
from ...linalg.parallel import threads_beside
from ...linalg.work import Elements, Factors, FreshElements, Products, Solves, Work
from ...measure.model.batches import MICRO_BATCH_TOKENS
from ...measure.statistics.heldout import DAMPINGS, FEW_DIRECTIONS, SIGNS
from ...measure.statistics.inputs import GRAM_BLOCK
from ...measure.statistics.sketch import SKETCHED
from ..rounding.drift import RIDGES, TRIED_COLUMNS
from .passes import Tokens, pass_backward, pass_forward, product, products, read_weights
from .shapes import BlockShape, GroupShape, ModelShape

__all__ = ["Evaluation", "Measuring", "evaluating", "measuring", "rounding", "tuning", "writing"]

_KEPT = 0.3
"""Share of the tokens that sums of x x^T are taken over: 18 to 38 % on trained models (``subsample_tokens``)."""

_FITS = 2
"""Factors that say how far to trust a damping; it is chosen by one of each."""

_OF_PROBES = 30
"""Operations on every logit where probes are drawn."""

_OF_LOGITS = 16
"""The same where two models are compared, in new tensors: most in ``token_statistics``."""

_OF_SAMPLED = 24
"""The same where tokens are sampled: exponential variables take most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Work of measuring.

    Attributes:
        once: What formats do once a process.
        forward: The forward pass.
        head: Probes of the logits, and the head.
        backward: The backward pass with the curves.
    """

    once: Work
    forward: Work
    head: Work
    backward: Work


def measuring(
    shape: ModelShape, tokens: Tokens, formats: list[FormatWork], device: torch.device, *, chosen: bool
) -> Measuring:
    """Return the work of measuring.

    Args:
        shape: The model.
        tokens: The calibration rows.
        formats: Work of the formats that are measured.
        device: Where it is done.
        chosen: Whether dampings are chosen for each input group.
    """
    hidden, all_tokens = shape.hidden, tokens.all
    state = Elements.work(4 * all_tokens * hidden)  # kept in a file, and read again

    def backward(block: BlockShape) -> Work:
        work = read_weights(block.weights) + pass_backward(block, hidden, tokens) + state * 3
        for group, count in block.groups:
            sums = _statistics(group, all_tokens) + _curves(group, formats, device, chosen=chosen)
            work += sums * count
        return work

    head = GroupShape(inputs=hidden, outputs=(shape.vocabulary,))
    logits = product(all_tokens, hidden, shape.vocabulary) + product(all_tokens, shape.vocabulary, hidden)
    tail = logits + Elements.work(_OF_PROBES * all_tokens * shape.vocabulary) + _gram(hidden, _KEPT * all_tokens)
    forward = _blocks(shape, lambda block: read_weights(block.weights) + pass_forward(block, hidden, tokens) + state)
    return Measuring(
        once=sum((each.once(device) for each in formats), Work()),
        forward=forward,
        head=tail + _curves(head, formats, device, chosen=chosen),
        backward=_blocks(shape, backward),
    )


def rounding(shape: ModelShape, tokens: Tokens, work: FormatWork, device: torch.device, *, known: bool) -> Work:
    """Return the rounding pass.

    Args:
        shape: The model.
        tokens: The calibration rows.
        work: The format's.
        device: Where it is done.
        known: Whether the inputs of the original's blocks are at hand from measuring.
    """
    hidden = shape.hidden
    state = Elements.work(4 * tokens.all * hidden)

    def block_work(block: BlockShape) -> Work:
        original = _before_mlp(block) if known else block
        work_ = read_weights(block.weights) + pass_forward(original, hidden, tokens) + state * 6
        stops = len(block.groups) if device.type != "cpu" else 1  # elsewhere a forward begins anew for every group
        work_ += pass_forward(block, hidden, tokens) * ((stops + 1) / 2)
        for group, count in block.groups:
            work_ += (_drift(group, tokens.all) + _rounded(group, work, device)) * count
        return work_

    head = GroupShape(inputs=hidden, outputs=(shape.vocabulary,))
    return _blocks(shape, block_work) + _drift(head, tokens.all) + _rounded(head, work, device)


def tuning(shape: ModelShape, tokens: Tokens, work: FormatWork) -> Work:
    """Return what fitting scales in the end takes: a pass with gradients of weights, too, and both models' logits."""
    steps = max(1, tokens.all // max(work.refining_tokens, tokens.row_tokens))
    passes = _blocks(
        shape,
        lambda block: (
            pass_forward(block, shape.hidden, tokens)
            + pass_backward(block, shape.hidden, tokens)
            + sum((products(group, tokens.all) * count for group, count in block.groups), Work())
        ),
    )
    logits = product(tokens.all, shape.hidden, shape.vocabulary) * 3
    return passes + logits + _compared(tokens.all, shape.vocabulary) + work.decoded(shape.weights) * (2 * steps)


def writing(shape: ModelShape, rows: int, row_tokens: int) -> Work:
    """Return what it takes to have a model write calibration rows side by side, place after place with a cache.

    Args:
        shape: The model.
        rows: Their number.
        row_tokens: Tokens of each.
    """
    place = _blocks(shape, partial(_place, hidden=shape.hidden, rows=rows, row_tokens=row_tokens))
    place += product(rows, shape.hidden, shape.vocabulary) + Elements.work(_OF_SAMPLED * rows * shape.vocabulary)
    return place * row_tokens


def _place(block: BlockShape, hidden: int, rows: int, row_tokens: int) -> Work:
    # One token of each row, which sees half of the places on average; keys and values are copied to grow.
    seen = min(row_tokens / 2, block.reach or row_tokens)
    cache = Elements.work(4 * rows * seen * block.heads * block.head_size)
    return pass_forward(block, hidden, Tokens(rows, 1)) + cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Work of an evaluation.

    Attributes:
        original: The original's pass.
        exact: Its passes in float64, for the floor.
        bfloat16: Its passes that say what bfloat16 does.
        bfloat16_logits: Predictions of both, compared.
        quantized: The pass of an output.
        logits: Predictions of both, compared.
    """

    original: Work
    exact: Work
    bfloat16: Work
    bfloat16_logits: Work
    quantized: Work
    logits: Work


def evaluating(shape: ModelShape, tokens: Tokens, work: FormatWork, dtype: torch.dtype) -> Evaluation:
    """Return the work of an evaluation.

    Args:
        shape: The model.
        tokens: The evaluation rows.
        work: The format's.
        dtype: What both models run in.
    """
    floor = Tokens(1, min(tokens.row_tokens, FLOOR_TOKENS))

    def run(rows: Tokens, kind: torch.dtype) -> Work:
        states = Elements.work(4 * rows.all * shape.hidden * shape.block_count)
        return states + _blocks(
            shape, lambda block: read_weights(block.weights) + pass_forward(block, shape.hidden, rows, kind)
        )

    def logits(rows: Tokens, *dtypes: torch.dtype) -> Work:
        products = (product(rows.all, shape.hidden, shape.vocabulary, each) for each in dtypes)
        return sum(products, Work()) + _compared(rows.all, shape.vocabulary)

    others = {torch.float32, torch.bfloat16} - {dtype}
    return Evaluation(
        original=run(tokens, dtype),
        exact=run(floor, torch.float64) + logits(floor, torch.float64, dtype),
        bfloat16=sum((run(floor, each) for each in others), Work()),
        bfloat16_logits=logits(floor, torch.float32, torch.bfloat16),
        quantized=run(tokens, dtype) + work.decoded(shape.all_weights),
        logits=logits(tokens, dtype, dtype),
    )


def _blocks(shape: ModelShape, work: Callable[[BlockShape], Work]) -> Work:
    return sum((work(block) * count for block, count in shape.blocks.items()), Work())


def _compared(tokens: int, vocabulary: int) -> Work:
    return FreshElements.work(_OF_LOGITS * tokens * vocabulary, PIECE_ELEMENTS)


def _gram(inputs: int, tokens: float) -> Work:
    columns = min(inputs, GRAM_BLOCK)
    # Half of a micro-batch's tokens at a time, every second row being the other half's.
    together = min(tokens, _KEPT * MICRO_BATCH_TOKENS / 2)
    blocks = (inputs + columns) / 2 / columns
    return Products.work(columns, together, inputs) * (tokens / together * blocks) + Elements.work(3 * tokens * inputs)


def _statistics(group: GroupShape, tokens: int) -> Work:
    own, outputs = group.share * tokens, sum(group.outputs)
    kept = _KEPT * own
    work = Elements.work(own * (2 * group.inputs + 4 * outputs) + 2 * kept * outputs)
    work += Products.work(_KEPT * MICRO_BATCH_TOKENS, outputs, SKETCHED) * (2 * kept / (_KEPT * MICRO_BATCH_TOKENS))
    if not group.expert:
        return work + _gram(group.inputs, kept)
    # All that chose it, and others up to the rank of the matrix; neurons are computed anew.
    seen = min(tokens, max(own, group.inputs))
    return work + _gram(group.inputs, seen) + (product(seen, group.inputs, 2 * outputs) if group.joins else Work())


def _curves(group: GroupShape, formats: list[FormatWork], device: torch.device, *, chosen: bool) -> Work:
    size = group.inputs
    few = size if size <= FEW_CHANNELS else size // 2
    trials = _trial(few) * (len(DAMPINGS) if chosen else 0) + _trial(size) * _FITS
    return sum((each.curves(size, group.outputs, device) for each in formats), trials + Elements.work(8 * size**2))


def _trial(size: int) -> Work:
    if size <= FEW_DIRECTIONS:
        traces = Solves.work(size, size) + Products.work(size, size, size) + Elements.work(3 * size**2)
    else:
        traces = Solves.work(size, SIGNS) * 4 + Products.work(size, size, SIGNS) * 3
    return Factors.work(size) + Elements.work(2 * size**2) + traces


def _before_mlp(block: BlockShape) -> BlockShape:
    # What need not run again of the original where a block's output is known: see `OriginalBlock`.
    plain = not any(group.expert for group, _ in block.groups) and len(block.groups) > 2
    if not plain or [group.joins for group, _ in block.groups[-2:]] != [False, True]:
        return block
    return BlockShape(groups=block.groups[:-2], heads=block.heads, head_size=block.head_size, reach=block.reach)


def _drift(group: GroupShape, tokens: int) -> Work:
    size, own = group.inputs, group.share * tokens
    kept = own if group.expert else _KEPT * own
    columns = sum(group.outputs) if group.joins else size
    sums = _gram(size, kept) + Products.work(size, _KEPT * MICRO_BATCH_TOKENS / 2, columns) * (
        kept / (_KEPT * MICRO_BATCH_TOKENS / 2)
    )
    few = size if size <= FEW_CHANNELS else size // 2
    tried = Factors.work(few) + Solves.work(few, TRIED_COLUMNS) * 2 + Products.work(few, few, TRIED_COLUMNS)
    solved = Factors.work(size) + Solves.work(size, columns) * 2 + Elements.work(6 * size**2)
    if group.joins:
        solved += Products.work(size, size, columns) + Products.work(size, size, TRIED_COLUMNS) * 2
    return sums + Elements.work(own * (4 * size + 4 * columns)) + tried * len(RIDGES) + solved


def _rounded(group: GroupShape, work: FormatWork, device: torch.device) -> Work:
    if not work.rounds:
        return Work()
    each = Work()
    for outputs in group.outputs:
        weights = group.inputs * outputs
        shift = Work() if group.joins else Products.work(group.inputs, group.inputs, outputs)
        each += shift + work.linear(group.inputs, outputs) + work.decoded(weights) + Elements.work(4 * weights)
    return each.beside_others(len(group.outputs), threads_beside(device) if work.on_cpu else device)
