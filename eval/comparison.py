"""The original and a quantized model on the same held-out tokens, streamed block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.source.checkpoint import Checkpoint, TensorSource
from ..checkpoint.source.original import Original
from ..linalg.products import float32_products
from ..measure.model.stream import StreamedModel
from ..measure.text.calibration import CalibrationSet, build_calibration
from ..measure.text.context import EVALUATION, check_rows, context_tokens
from ..measure.text.tokenizer import Tokenizer, load_tokenizer
from ..progress import Progress, default_progress, silent
from ..tables import Table, html_summary
from .answers import Answers, answers_of
from .cache import OriginalCache
from .config import EvalConfig
from .domains.damage import DomainDamage, damage_by_domain
from .domains.documents import load_domains
from .metrics.divergence import Summary
from .metrics.drift import BlockDrift, DriftMeter
from .metrics.numbers import nats, percent, perplexity
from .metrics.overlap import refuse_calibration_text, stored_spans, with_overlap_warning
from .metrics.passes import last_hidden_of_all, paired_statistics
from .metrics.profile import Profile, profile_of
from .models import (
    ModelSummary,
    check_vocabularies,
    device_name,
    open_pair,
    summarize_model,
    vocab_size_of,
)
from .original import OriginalRun, run_original
from .speed import tokens_per_second

__all__ = [
    "ENGINE",
    "Comparison",
    "EvalConfig",
    "compare_models",
    "compare_with",
    "evaluate_each",
    "evaluate_models",
    "evaluation_rows",
]


ENGINE = "Transformers"
"""What runs models unless another engine is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison:
    """What quantization cost, and how that was measured.

    Attributes:
        original: The original.
        quantized: The quantized model.
        summary: Perplexities, KL divergence, agreement; see there.
        profile: Where the damage lies; see there.
        floor_nats: KL divergence that arithmetic alone causes, mean per token; see ``floor_definition``.
        floor_tokens: Length of the text that the floor was measured on.
        text: What the text is and how rows were taken from it.
        text_fingerprint: Identifies the token ids.
        rows: Number of rows.
        row_tokens: Length of each row in tokens (the window).
        stride: Tokens from the start of a row to that of the next; equal to the window: no row sees another.
        adds_bos: Whether each row begins with BOS.
        dtype: What both models ran in.
        device: What they ran on.
        seconds: Wall time, both models and the floor; of the original little if it came from a cache.
        engine: What ran both models.
        bfloat16_floor_nats: KL divergence of the original in bfloat16 from itself in float32, mean per token, on the
            text that the floor was measured on: what running it as usual does. None where the engine cannot tell.
        drift: Relative error of hidden states, of the embeddings and after each block; empty where the engine shows
            none, or the models are not shaped alike.
        answers: What both answer to the same prompt; None where nothing was asked.
        domains: Damage by domain; empty where it was not asked for.
        tokens_per_second: What llama.cpp writes of the quantized file on this machine; None where it is not known.
    """

    original: ModelSummary
    quantized: ModelSummary
    summary: Summary
    profile: Profile
    floor_nats: float
    floor_tokens: int
    text: str
    text_fingerprint: str
    rows: int
    row_tokens: int
    stride: int
    adds_bos: bool
    dtype: str
    device: str
    seconds: float
    engine: str = ENGINE
    bfloat16_floor_nats: float | None = None
    drift: tuple[BlockDrift, ...] = ()
    answers: Answers | None = None
    tokens_per_second: float | None = None
    domains: tuple[DomainDamage, ...] = ()

    def __repr__(self) -> str:
        """Return the models' names, and the damage."""
        return f"Comparison({self.quantized.name} with {self.original.name}: KL {nats(self.kl)} nats/token)"

    def _repr_html_(self) -> str:
        summary = self.summary
        rows = (
            ("KL divergence, nats per token", "0", nats(summary.kl_nats)),
            ("same most likely token", "100 %", percent(summary.top1_agreement)),
            ("perplexity", perplexity(summary.original_perplexity), perplexity(summary.quantized_perplexity)),
        )
        facts = [f"Over {self.predicted_tokens} tokens: {self.text}", f"{self.engine}, {self.dtype} on {self.device}"]
        head = ("", self.original.name, self.quantized.name)
        return html_summary(f"{self.quantized.name} with {self.original.name}", facts, Table.of(head, rows))

    @property
    def kl(self) -> float:
        """Mean KL divergence from the original, nats per token."""
        return self.summary.kl_nats.value

    @property
    def predicted_tokens(self) -> int:
        """Tokens that everything is averaged over: all but the first of each row."""
        return self.rows * (self.row_tokens - 1)

    @property
    def within_floor(self) -> bool:
        """Whether the mean KL divergence is no larger than the floor."""
        return self.summary.kl_nats.value <= self.floor_nats

    @property
    def within_bfloat16(self) -> bool:
        """Whether the mean KL divergence is no larger than what bfloat16 does to the original."""
        return self.bfloat16_floor_nats is not None and self.summary.kl_nats.value <= self.bfloat16_floor_nats

    @property
    def floor_definition(self) -> str:
        """How the floor is defined, in words."""
        return (
            f"mean KL divergence of the original in {self.dtype} on {self.device} from the original in float64 on the "
            f"CPU, over the first {self.floor_tokens} tokens of the first row"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, derived values too, in types that JSON has."""
        derived = {
            "predicted_tokens": self.predicted_tokens,
            "within_floor": self.within_floor,
            "within_bfloat16": self.within_bfloat16,
        }
        return {**asdict(self), **derived, "floor_definition": self.floor_definition}


def evaluation_rows(tokenizer: Tokenizer, config: EvalConfig, *, vocab_size: int) -> CalibrationSet:
    """Take rows to evaluate on; of the built-in text, from the part that is never calibrated on.

    Args:
        tokenizer: The original's.
        config: Which text, and how much of it.
        vocab_size: Rows of the models' token embeddings.

    Raises:
        CalibrationError: The text cannot be read, there is too little of it, or the tokenizer does not fit the model.
    """
    return build_calibration(tokenizer, config.calibration_config(), vocab_size=vocab_size, part="evaluation")


def evaluate_models(
    original: Original | TensorSource,
    quantized: str | Path,
    evaluate: EvalConfig | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a quantized model with its original on held-out text.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for both; or what
            ``open_model`` made of it.
        quantized: Directory or Hub id of the quantized model.
        evaluate: Text and other options; None for the defaults.
        progress: Shows how far it is; None for bars in a notebook, and nothing elsewhere.

    Raises:
        BpwiseError: As ``open_any``, ``evaluation_rows`` and ``compare_models``.

    Example:
        >>> from bpwise import EvalConfig, evaluate_models
        >>> comparison = evaluate_models("llama", "llama-6bpw", evaluate=EvalConfig(rows=4))
        >>> 0 < comparison.kl < 0.1
        True
    """
    return next(evaluate_each(original, [quantized], evaluate or EvalConfig(), progress or default_progress()))


def evaluate_each(
    original: Original | TensorSource,
    quantized: Sequence[str | Path],
    config: EvalConfig,
    progress: Progress = silent,
    *,
    cache: OriginalCache | None = None,
) -> Iterator[Comparison]:
    """Compare several quantized models with their original, which runs only once.

    All models are opened and checked before the first of them runs.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for all; or what
            ``open_model`` made of it.
        quantized: Directories or Hub ids of the quantized models.
        config: Options.
        progress: Wraps the blocks of each pass.
        cache: Where the original's side is kept for the next time.

    Yields:
        One comparison for each quantized model, in their order.

    Raises:
        BpwiseError: As ``open_any``, ``evaluation_rows`` and ``compare_models``.
    """
    source, others = open_pair(original, quantized)
    tokenizer = load_tokenizer(source.directory)
    vocab_size = vocab_size_of(source)
    rows = _held_out(evaluation_rows(tokenizer, config.fitted(source), vocab_size=vocab_size), others, config)
    domains = load_domains(tokenizer, config.domains, vocab_size=vocab_size, context=context_tokens(source))
    domains = tuple(replace(domain, rows=_held_out(domain.rows, others, config)) for domain in domains)
    if isinstance(source, Checkpoint):  # cache and report name it by its fingerprint
        source.prepare_fingerprint(progress)
    run = run_original(source, rows, config, progress, tokenizer=tokenizer, cache=cache, domains=domains)
    for other in others:
        yield compare_with(run, other, progress)


def _held_out(rows: CalibrationSet, others: Sequence[TensorSource], config: EvalConfig) -> CalibrationSet:
    # The rows, once it is known that all models can be run on them, and whether one was calibrated on them.
    for other in others:
        check_rows(other, rows, EVALUATION)
    allowed = config.allow_calibration_text
    shares = [refuse_calibration_text(rows, stored_spans(other), allowed=allowed) for other in others]
    return with_overlap_warning(rows, max((share for share in shares if share is not None), default=None))


def compare_models(
    original: TensorSource,
    quantized: TensorSource,
    rows: CalibrationSet,
    config: EvalConfig,
    progress: Progress = silent,
    *,
    tokenizer: Tokenizer | None = None,
) -> Comparison:
    """Compare two models on the same tokens.

    Each row is run on its own, from its first token. The logits at a position are compared with those of the other
    model there (KL divergence, most likely token) and with the token that follows (perplexity), so the last position
    of each row is left out of all of them. In memory are the hidden states of both models, one block's weights, and
    at the end both heads and the logits of at most 256 positions.

    Args:
        original: The model that was quantized.
        quantized: What became of it, or any other model with the same vocabulary.
        rows: The text; ``config.text``, ``rows``, ``row_tokens`` and ``seed`` are not read here.
        config: Dtype and device.
        progress: Wraps the blocks of each pass, and the rows of the last.
        tokenizer: Decodes the worst tokens; None leaves their ids only.

    Raises:
        CheckpointError: The vocabularies differ in size.
        CalibrationError: A token id of the rows is outside the vocabulary.
        ConfigError: The device is not there, or rows have one token only or are longer than the models' context.
        NumericalError: NaN or infinity in hidden states or logits; the message names the model and the block.
        UnsupportedModelError: A model's family is unknown.
    """
    check_vocabularies(original, quantized)
    return compare_with(run_original(original, rows, config, progress, tokenizer=tokenizer), quantized, progress)


def compare_with(run: OriginalRun, quantized: TensorSource, progress: Progress = silent) -> Comparison:
    """Do the quantized model's side of ``compare_models``.

    Args:
        run: The original's side.
        quantized: The quantized model.
        progress: Wraps the blocks, and at the end the rows.

    Raises:
        BpwiseError: As ``compare_models``.
    """
    start = time.monotonic()
    check_vocabularies(run.source, quantized)
    check_rows(quantized, run.rows, EVALUATION)
    model = StreamedModel(quantized, device=run.model.device, dtype=run.model.dtype, offload_dir=run.model.offload_dir)
    rows, row_tokens = run.rows.tokens.shape
    alike = model.block_count == run.model.block_count and model.hidden_size == run.model.hidden_size
    meter = DriftMeter(run.state.trace, row_tokens) if alike else None
    with float32_products(model.device):
        texts = [run.rows.tokens, *(domain.rows.tokens for domain in run.domains)]
        hidden, *others = last_hidden_of_all(model, texts, "quantized model", progress, watch=meter)
        statistics = paired_statistics(run.model, model, run.state.hidden, hidden, run.rows.tokens, progress)
        domains = damage_by_domain(run.domains, run.model, model, run.state.domains, others, progress)
    parameters = sum(math.prod(run.source.shape(name)) for name in run.source.names)
    return Comparison(
        original=summarize_model(run.source, parameters),
        quantized=summarize_model(quantized, parameters),
        summary=statistics.summary(rows),
        profile=profile_of(statistics, run.rows, run.tokenizer),
        floor_nats=run.state.floor_nats,
        floor_tokens=run.state.floor_tokens,
        text=run.rows.description,
        text_fingerprint=run.rows.fingerprint,
        rows=rows,
        row_tokens=row_tokens,
        stride=row_tokens,
        adds_bos=run.rows.adds_bos,
        dtype=run.config.dtype,
        device=device_name(run.model.device),
        seconds=run.seconds + time.monotonic() - start,
        bfloat16_floor_nats=run.state.bfloat16_nats,
        drift=() if meter is None else tuple(meter.drift),
        answers=answers_of(quantized, run.questions, run.answers, device=run.model.device, dtype=run.model.dtype),
        tokens_per_second=tokens_per_second(quantized),
        domains=domains,
    )
