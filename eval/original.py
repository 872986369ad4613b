"""The original's side of comparisons: run once, for any number of quantized models."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from ..checkpoint.source.checkpoint import TensorSource
from ..linalg.products import float32_products
from ..measure.device import resolve_device
from ..measure.model.stream import StreamedModel
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import EVALUATION, check_rows
from ..measure.text.tokenizer import Tokenizer
from ..progress import Progress, silent
from .answers import Question, ask, question_of
from .cache import OriginalCache, OriginalState, original_key
from .config import EvalConfig
from .metrics.drift import Trace
from .metrics.passes import last_hidden, mean_bfloat16_nats, mean_floor_nats
from .models import DTYPES, device_name, vocab_size_of

__all__ = ["FLOOR_TOKENS", "OriginalRun", "run_original"]

_log = logging.getLogger(__name__)

FLOOR_TOKENS = 512
"""Length of the text that the floor is measured on: float64 on a CPU is slow, and the floor needs no precision."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OriginalRun:
    """The original's side of comparisons, to be used for any number of quantized models.

    Attributes:
        source: The original.
        rows: The text.
        config: How it was run.
        model: The original, streamed.
        state: Output of its last block, and the floor.
        tokenizer: Decodes the worst tokens; None leaves their ids only.
        seconds: Wall time that it took.
        question: Prompt that the models answer; None for none.
        answer: The original's answer; None where there is no prompt, or too little memory.
    """

    source: TensorSource
    rows: CalibrationSet
    config: EvalConfig
    model: StreamedModel
    state: OriginalState
    tokenizer: Tokenizer | None
    seconds: float
    question: Question | None = None
    answer: str | None = None


def run_original(
    original: TensorSource,
    rows: CalibrationSet,
    config: EvalConfig,
    progress: Progress = silent,
    *,
    tokenizer: Tokenizer | None = None,
    cache: OriginalCache | None = None,
) -> OriginalRun:
    """Do the original's side of ``compare_models``, floor included.

    Args:
        original: The model that was quantized.
        rows: The text.
        config: Dtype and device.
        progress: Wraps the blocks of each pass.
        tokenizer: Decodes the worst tokens; None leaves their ids only.
        cache: Where the result is kept, and looked for first.

    Raises:
        BpwiseError: As ``compare_models``.
    """
    start = time.monotonic()
    check_rows(original, rows, EVALUATION)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    model = StreamedModel(original, device=device, dtype=dtype, offload_dir=config.offload_dir)
    state, key = None, ""
    if cache is not None:
        key = original_key(original, rows.tokens, dtype=model.dtype, device=device_name(model.device))
        state = cache.load(key)
        _log.debug("original's evaluation: %s", "run again" if state is None else "kept from an earlier run")
    if state is None:
        with float32_products(device):
            state = _original_state(original, model, rows, progress)
        if cache is not None:
            cache.save(key, state)
    question = None
    if tokenizer is not None:
        question = question_of(original, tokenizer, config.prompt, vocab_size=vocab_size_of(original))
    answer = None if question is None else ask(original, question, device=device, dtype=dtype)
    return OriginalRun(
        source=original,
        rows=rows,
        config=config,
        model=model,
        state=state,
        tokenizer=tokenizer,
        seconds=time.monotonic() - start,
        question=question,
        answer=answer,
    )


def _original_state(
    original: TensorSource, model: StreamedModel, rows: CalibrationSet, progress: Progress
) -> OriginalState:
    count, row_tokens = rows.tokens.shape
    trace = Trace(row_tokens, count)
    hidden = last_hidden(model, rows.tokens, "original model", progress, watch=trace)
    floor_tokens = min(row_tokens, FLOOR_TOKENS)
    first, tokens = hidden[:1, :floor_tokens], rows.tokens[:1, :floor_tokens]
    return OriginalState(
        hidden=hidden,
        trace=torch.stack(trace.states),
        floor_nats=mean_floor_nats(original, model, first, tokens, progress),
        bfloat16_nats=mean_bfloat16_nats(original, model, first, tokens, progress),
        floor_tokens=floor_tokens,
    )
