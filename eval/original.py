"""The original's side of comparisons: run once, for any number of quantized models."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.source.checkpoint import TensorSource
from ..linalg.products import float32_products
from ..measure.device import resolve_device
from ..measure.model.stream import StreamedModel
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import EVALUATION, check_rows
from ..measure.text.tokenizer import Tokenizer
from ..progress import Progress, silent
from .answers import Questions, ask, questions_of
from .cache import OriginalCache, OriginalState, original_key
from .config import EvalConfig
from .domains.documents import Domain
from .metrics.drift import Trace
from .metrics.passes import last_hidden_of_all, mean_bfloat16_nats, mean_floor_nats
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
        domains: Documents by domain.
        questions: Prompts that the models answer; None for none.
        answers: The original's answers as token ids; None where there is no prompt, or too little memory.
    """

    source: TensorSource
    rows: CalibrationSet
    config: EvalConfig
    model: StreamedModel
    state: OriginalState
    tokenizer: Tokenizer | None
    seconds: float
    domains: tuple[Domain, ...] = ()
    questions: Questions | None = None
    answers: tuple[tuple[int, ...], ...] | None = None


def run_original(
    original: TensorSource,
    rows: CalibrationSet,
    config: EvalConfig,
    progress: Progress = silent,
    *,
    tokenizer: Tokenizer | None = None,
    cache: OriginalCache | None = None,
    domains: Sequence[Domain] = (),
) -> OriginalRun:
    """Do the original's side of ``compare_models``, floor included.

    Args:
        original: The model that was quantized.
        rows: The text.
        config: Dtype and device.
        progress: Wraps the blocks of each pass.
        tokenizer: Decodes the worst tokens; None leaves their ids only.
        cache: Where the result is kept, and looked for first.
        domains: Documents that it runs over in the same pass.

    Raises:
        BpwiseError: As ``compare_models``.
    """
    start = time.monotonic()
    check_rows(original, rows, EVALUATION)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    model = StreamedModel(original, device=device, dtype=dtype, offload_dir=config.offload_dir)
    texts = [rows.tokens, *(domain.rows.tokens for domain in domains)]
    state, key = None, ""
    if cache is not None:
        key = original_key(original, texts, dtype=model.dtype, device=device_name(model.device))
        state = cache.load(key)
        _log.debug("original's evaluation: %s", "run again" if state is None else "kept from an earlier run")
    if state is None:
        with float32_products(device):
            state = _original_state(original, model, texts, progress)
        if cache is not None:
            cache.save(key, state)
    questions = None
    if tokenizer is not None:
        questions = questions_of(
            original, tokenizer, config.prompt, vocab_size=vocab_size_of(original), many=config.answers
        )
    answers = None if questions is None else ask(original, questions, device=device, dtype=dtype)
    return OriginalRun(
        source=original,
        rows=rows,
        config=config,
        model=model,
        state=state,
        tokenizer=tokenizer,
        seconds=time.monotonic() - start,
        domains=tuple(domains),
        questions=questions,
        answers=answers,
    )


def _original_state(
    original: TensorSource, model: StreamedModel, texts: Sequence[Tensor], progress: Progress
) -> OriginalState:
    count, row_tokens = texts[0].shape
    trace = Trace(row_tokens, count)
    hidden, *domains = last_hidden_of_all(model, texts, "original model", progress, watch=trace)
    floor_tokens = min(row_tokens, FLOOR_TOKENS)
    first, tokens = hidden[:1, :floor_tokens], texts[0][:1, :floor_tokens]
    return OriginalState(
        hidden=hidden,
        trace=torch.stack(trace.states),
        floor_nats=mean_floor_nats(original, model, first, tokens, progress),
        bfloat16_nats=mean_bfloat16_nats(original, model, first, tokens, progress),
        floor_tokens=floor_tokens,
        domains=tuple(domains),
    )
