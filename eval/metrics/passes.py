"""Passes of streamed models over rows: hidden states first, then the logits of two models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import TensorSource
from ...errors import NumericalError
from ...measure.layers.positionwise import chunked_positionwise
from ...measure.model.batches import TAIL_TOKENS, micro_batches
from ...measure.model.stream import StreamedModel
from ...progress import Progress
from .divergence import TokenStatistics, token_statistics

__all__ = [
    "exact_logits",
    "last_hidden",
    "last_hidden_of_all",
    "mean_bfloat16_nats",
    "mean_floor_nats",
    "paired_statistics",
]


def last_hidden(
    model: StreamedModel,
    tokens: Tensor,
    role: str,
    progress: Progress,
    *,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Run all blocks of a model, one after another.

    Args:
        model: The model.
        tokens: Token ids, int64, shape (rows, tokens).
        role: What the model is, for messages.
        progress: Wraps the blocks.
        watch: Is handed the hidden states after the embedding and after each block; it may not keep them.

    Returns:
        Output of the last block, shape (rows, tokens, hidden size), in the model's dtype, on the CPU.

    Raises:
        NumericalError: NaN or infinity; the message names the role and the block.
    """
    return last_hidden_of_all(model, [tokens], role, progress, watch=watch)[0]


def last_hidden_of_all(
    model: StreamedModel,
    texts: Sequence[Tensor],
    role: str,
    progress: Progress,
    *,
    watch: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Run all blocks of a model over texts of several lengths, each block's weights being read once.

    Args:
        model: The model.
        texts: Token ids, each int64, shape (rows, tokens).
        role: As for ``last_hidden``.
        progress: As for ``last_hidden``.
        watch: As for ``last_hidden``, of the first text.

    Returns:
        For each text what ``last_hidden`` returns.

    Raises:
        NumericalError: As ``last_hidden``.
    """
    first_rows = [sum(map(len, texts[:number])) for number in range(len(texts))]
    hidden = [model.embed(tokens, first_row=first) for tokens, first in zip(texts, first_rows, strict=True)]

    def check(where: str) -> None:
        for each in hidden:
            _check_finite(each, f"{role}, {where}", model.dtype)
        if watch is not None:
            watch(hidden[0])

    check("embedding")
    for index in progress(range(model.block_count), f"evaluate: {role}"):
        structure = model.structure(index)
        with torch.no_grad(), model.block(index, index + 1) as block, chunked_positionwise(block, structure):
            for each, first in zip(hidden, first_rows, strict=True):
                for batch in micro_batches(*each.shape[:2]):
                    each[batch] = model.run_block(index, each[batch].to(model.device), first + batch.start).cpu()
        check(model.block_name(index))
    return hidden


def paired_statistics(
    original: StreamedModel,
    quantized: StreamedModel,
    original_hidden: Tensor,
    quantized_hidden: Tensor,
    tokens: Tensor,
    progress: Progress,
    *,
    counted: Tensor | None = None,
) -> TokenStatistics:
    """Compare what two models predict, at all positions but the last of each row.

    Args:
        original: The original.
        quantized: The quantized model, on the same device.
        original_hidden: What ``last_hidden`` made of the original, shape (rows, tokens, hidden size).
        quantized_hidden: The same of the quantized model.
        tokens: Token ids, int64, shape (rows, tokens), at least two a row.
        progress: Wraps the rows.
        counted: Which tokens' predictions are compared, bool, shape (rows, tokens), at least one token, and the first
            of no row; None for all but the first of each.

    Returns:
        Statistics of these predictions, rows * (tokens - 1) by default, row after row, on the CPU.

    Raises:
        NumericalError: NaN or infinity in logits; the message names the model.
    """
    wanted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted

    def parts() -> Iterator[TokenStatistics]:
        for row in progress(range(len(tokens)), "evaluate: logits"):
            for positions in wanted[row, 1:].nonzero()[:, 0].split(TAIL_TOKENS):
                first = _logits(original, original_hidden[row, positions], "original model")
                second = _logits(quantized, quantized_hidden[row, positions], "quantized model")
                yield token_statistics(first, second, tokens[row, 1:][positions].to(second.device))

    with torch.no_grad(), original.tail(), quantized.tail():
        return TokenStatistics.joined(parts(), int(wanted[:, 1:].sum()))


def mean_floor_nats(
    source: TensorSource, model: StreamedModel, hidden: Tensor, tokens: Tensor, progress: Progress
) -> float:
    """Measure what arithmetic alone does: the original as it is evaluated, against itself in float64 on the CPU.

    Transformers computes norms and rotary embeddings in float32 whatever the dtype; they stay so.

    Args:
        source: The original.
        model: The original as it is evaluated.
        hidden: What ``last_hidden`` made of it, shape (1, tokens, hidden size).
        tokens: Token ids, int64, shape (1, tokens), at least two.
        progress: Wraps the blocks.

    Returns:
        Mean KL divergence in nats per token.

    Raises:
        NumericalError: NaN or infinity in hidden states or logits.
    """
    slices = _slices(tokens.shape[1] - 1)
    references = exact_logits(source, tokens, progress).split([s.stop - s.start for s in slices])
    parts = []
    with torch.no_grad(), model.tail():
        for positions, reference in zip(slices, references, strict=True):
            logits = _logits(model, hidden[0, positions], "original model").cpu()
            parts.append(token_statistics(reference, logits, tokens[0, 1:][positions]))
    return float(TokenStatistics.joined(parts, tokens.shape[1] - 1).kl_nats.double().mean())


def mean_bfloat16_nats(
    source: TensorSource, model: StreamedModel, hidden: Tensor, tokens: Tensor, progress: Progress
) -> float:
    """Measure what running the original in bfloat16, as is usual, does to it: against itself in float32.

    Args:
        source: The original.
        model: The original as it is evaluated; where its dtype is one of the two, it does not run again.
        hidden: What ``last_hidden`` made of it, shape (rows, tokens, hidden size).
        tokens: Token ids, int64, shape (rows, tokens), at least two a row.
        progress: Wraps the blocks.

    Returns:
        Mean KL divergence in nats per token, both on the model's device.

    Raises:
        NumericalError: NaN or infinity in hidden states or logits.
    """
    runs = {model.dtype: (model, hidden)}
    for dtype in (torch.float32, torch.bfloat16):
        if dtype not in runs:
            other = StreamedModel(source, device=model.device, dtype=dtype)
            role = f"original model in {str(dtype).removeprefix('torch.')}"
            runs[dtype] = other, last_hidden(other, tokens, role, progress)
    (exact, exact_hidden), (rounded, rounded_hidden) = runs[torch.float32], runs[torch.bfloat16]
    statistics = paired_statistics(exact, rounded, exact_hidden, rounded_hidden, tokens, progress)
    return float(statistics.kl_nats.double().mean())


def exact_logits(source: TensorSource, tokens: Tensor, progress: Progress) -> Tensor:
    """Return what a model predicts in float64 on the CPU, at all positions but the last.

    Args:
        source: The model.
        tokens: Token ids, int64, shape (1, tokens), at least two.
        progress: Wraps the blocks.

    Returns:
        Logits, float32, shape (tokens - 1, vocabulary). Rounding them so does not show in a KL divergence: its effect
        is quadratic.

    Raises:
        NumericalError: NaN or infinity in hidden states or logits.
    """
    role = "original model in float64"
    exact = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float64)
    hidden = last_hidden(exact, tokens, role, progress)
    # The head is held here and let go before another one is: in float64 it is as large as both of a comparison.
    with torch.no_grad(), exact.tail():
        return torch.cat([_logits(exact, hidden[0, s], role).float() for s in _slices(tokens.shape[1] - 1)])


def _slices(positions: int) -> list[slice]:
    return [slice(first, min(first + TAIL_TOKENS, positions)) for first in range(0, positions, TAIL_TOKENS)]


def _logits(model: StreamedModel, hidden: Tensor, role: str) -> Tensor:
    logits = model.logits(hidden[None].to(model.device))[0]
    _check_finite(logits, f"{role}, output head", model.dtype)
    return logits


def _check_finite(tensor: Tensor, where: str, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(tensor).all()):
        advice = (
            "Evaluate in bfloat16 or float32, which reach further."
            if dtype == torch.float16
            else "The model's weights are broken: quantize, or get it, again."
        )
        raise NumericalError(f"{where}: NaN or infinity when run in {str(dtype).removeprefix('torch.')}. {advice}")
