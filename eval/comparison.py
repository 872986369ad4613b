"""The original and a quantized model on the same held-out tokens, streamed block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..convert.checkpoint import TensorSource
from ..errors import ConfigError
from ..measure.calibration import CalibrationConfig, CalibrationSet, build_calibration
from ..measure.run import resolve_device
from ..measure.stream import StreamedModel
from ..measure.tokenizer import Tokenizer, load_tokenizer
from ..progress import Progress, silent
from .cache import OriginalCache, OriginalState, original_key
from .divergence import Summary
from .models import (
    DTYPES,
    ModelSummary,
    check_rows,
    check_vocabularies,
    device_name,
    open_pair,
    summarize_model,
    vocab_size_of,
)
from .overlap import refuse_calibration_text, stored_spans, told
from .passes import last_hidden, mean_floor_nats, paired_statistics
from .profile import Profile, profile_of

__all__ = [
    "Comparison",
    "EvalConfig",
    "OriginalRun",
    "compare_models",
    "compare_with",
    "evaluate",
    "evaluate_each",
    "evaluation_rows",
    "run_original",
]

_FLOOR_TOKENS = 512
"""Length of the text that the floor is measured on: float64 on a CPU is slow, and the floor needs no precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Options of the evaluation stage.

    Attributes:
        text: Text file, directory of such files, or Hub data set ``name[:config][:split]``; None for the evaluation
            part of the text that comes with Python.
        column: Column of a data set that holds the text.
        rows: Number of rows.
        row_tokens: Length of each row in tokens, BOS included; it is also the stride.
        seed: Chooses the places that rows of the built-in text are taken from.
        dtype: What both models run in: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
        allow_calibration_text: Evaluate even on text that the model was calibrated on.
    """

    text: str | None = None
    column: str | None = None
    rows: int = 16
    row_tokens: int = 1024
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    allow_calibration_text: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        self.calibration_config()

    def calibration_config(self) -> CalibrationConfig:
        """Return what ``build_calibration`` needs to know.

        Raises:
            ConfigError: A number is out of range, or a column is named without a text.
        """
        return CalibrationConfig(
            source=self.text, column=self.column, rows=self.rows, row_tokens=self.row_tokens, seed=self.seed
        )


@dataclass(frozen=True, slots=True, kw_only=True)
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
    engine: str = "Transformers"

    @property
    def predicted_tokens(self) -> int:
        """Tokens that everything is averaged over: all but the first of each row."""
        return self.rows * (self.row_tokens - 1)

    @property
    def within_floor(self) -> bool:
        """Whether the mean KL divergence is no larger than the floor."""
        return self.summary.kl_nats.value <= self.floor_nats

    @property
    def floor_definition(self) -> str:
        """How the floor is defined, in words."""
        return (
            f"mean KL divergence of the original in {self.dtype} on {self.device} from the original in float64 on the "
            f"CPU, over the first {self.floor_tokens} tokens of the first row"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, derived values too, in types that JSON has."""
        derived = {"predicted_tokens": self.predicted_tokens, "within_floor": self.within_floor}
        return {**asdict(self), **derived, "floor_definition": self.floor_definition}


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
    """

    source: TensorSource
    rows: CalibrationSet
    config: EvalConfig
    model: StreamedModel
    state: OriginalState
    tokenizer: Tokenizer | None
    seconds: float


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


def evaluate(
    original: str | Path, quantized: str | Path, config: EvalConfig, progress: Progress = silent
) -> Comparison:
    """Compare a quantized model with its original on held-out text.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for both.
        quantized: Directory or Hub id of the quantized model.
        config: Options.
        progress: Wraps the blocks of each pass.

    Raises:
        BpwiseError: As ``open_any``, ``evaluation_rows`` and ``compare_models``.
    """
    return next(evaluate_each(original, [quantized], config, progress))


def evaluate_each(
    original: str | Path,
    quantized: Sequence[str | Path],
    config: EvalConfig,
    progress: Progress = silent,
    *,
    cache: OriginalCache | None = None,
) -> Iterator[Comparison]:
    """Compare several quantized models with their original, which runs only once.

    All models are opened and checked before the first of them runs.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for all.
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
    rows = evaluation_rows(tokenizer, config, vocab_size=vocab_size_of(source))
    allowed = config.allow_calibration_text
    shares = [refuse_calibration_text(rows, stored_spans(other), allowed=allowed) for other in others]
    rows = told(rows, max((share for share in shares if share is not None), default=None))
    run = run_original(source, rows, config, progress, tokenizer=tokenizer, cache=cache)
    for other in others:
        yield compare_with(run, other, progress)


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
    check_rows(original, rows)
    model = StreamedModel(original, device=resolve_device(config.device), dtype=DTYPES[config.dtype])
    state, key = None, ""
    if cache is not None:
        key = original_key(original, rows.tokens, dtype=model.dtype, device=device_name(model.device))
        state = cache.load(key)
    if state is None:
        state = _original_state(original, model, rows, progress)
        if cache is not None:
            cache.save(key, state)
    return OriginalRun(
        source=original,
        rows=rows,
        config=config,
        model=model,
        state=state,
        tokenizer=tokenizer,
        seconds=time.monotonic() - start,
    )


def _original_state(
    original: TensorSource, model: StreamedModel, rows: CalibrationSet, progress: Progress
) -> OriginalState:
    hidden = last_hidden(model, rows.tokens, "original model", progress)
    floor_tokens = min(rows.tokens.shape[1], _FLOOR_TOKENS)
    floor_nats = mean_floor_nats(original, model, hidden[:1, :floor_tokens], rows.tokens[:1, :floor_tokens], progress)
    return OriginalState(hidden=hidden, floor_nats=floor_nats, floor_tokens=floor_tokens)


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
    check_rows(quantized, run.rows)
    model = StreamedModel(quantized, device=run.model.device, dtype=run.model.dtype)
    hidden = last_hidden(model, run.rows.tokens, "quantized model", progress)
    statistics = paired_statistics(run.model, model, run.state.hidden, hidden, run.rows.tokens, progress)
    rows, row_tokens = run.rows.tokens.shape
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
    )
