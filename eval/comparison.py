"""The original and a quantized model on the same held-out tokens, streamed block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..convert.checkpoint import Checkpoint, TensorSource, resolve_model
from ..convert.exl2.reader import Exl2Model, is_exl2
from ..convert.gguf.reader import GgufModel
from ..convert.language import language_config
from ..convert.original import Original, open_model
from ..convert.rope import with_positions_of
from ..errors import CalibrationError, CheckpointError, ConfigError
from ..measure.calibration import CalibrationConfig, CalibrationSet, build_calibration
from ..measure.run import resolve_device
from ..measure.stream import StreamedModel
from ..measure.tokenizer import Tokenizer, load_tokenizer
from ..progress import Progress, silent
from .cache import OriginalCache, OriginalState, original_key
from .divergence import Summary
from .overlap import refuse_calibration_text, stored_spans, told
from .passes import last_hidden, mean_floor_nats, paired_statistics
from .profile import Profile, profile_of

__all__ = [
    "Comparison",
    "EvalConfig",
    "ModelSummary",
    "OriginalRun",
    "check_rows",
    "compare_models",
    "compare_with",
    "evaluate",
    "evaluate_each",
    "evaluation_rows",
    "model_name",
    "open_any",
    "open_pair",
    "run_original",
    "summarize_model",
    "vocab_size_of",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}.")
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
class ModelSummary:
    """What a report says of a model.

    Attributes:
        name: Name of its directory, or its Hub id.
        fingerprint: Tells models apart.
        stored_bytes: Size of its weights on disk, of a GGUF file all of it; None if they are not on disk.
        bits_per_parameter: Those bytes in bits over the parameters *of the original*, embeddings and all overheads
            included; None if they are not on disk.
    """

    name: str
    fingerprint: str
    stored_bytes: int | None
    bits_per_parameter: float | None


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


def open_any(model: Original) -> TensorSource:
    """Open an EXL2 model, a GGUF file or an unquantized checkpoint.

    Args:
        model: A local directory or GGUF file (``Path`` or ``str``), a Hugging Face Hub id (``str`` only), or what
            ``open_model`` made of one.

    Raises:
        CheckpointError: It cannot be found, or its files are missing, unsafe or inconsistent.
        FormatError: It is an EXL2 or GGUF model that breaks the format's rules.
        UnsupportedModelError: It is a GGUF file of an architecture that is unknown.
    """
    if isinstance(model, Checkpoint):
        return model
    if Path(model).is_file():
        return GgufModel.open(Path(model))
    directory = resolve_model(model) if isinstance(model, str) else model
    return Exl2Model.open(directory) if is_exl2(directory) else open_model(directory)


def open_pair(original: Original, quantized: Sequence[str | Path]) -> tuple[TensorSource, list[TensorSource]]:
    """Open an original and what was made of it, and check that they can be compared.

    Args:
        original: Directory or Hub id of the original, or what ``open_model`` made of it.
        quantized: Directories, GGUF files or Hub ids of the quantized models.

    Raises:
        BpwiseError: As ``open_any``.
        CheckpointError: The vocabularies differ in size.
    """
    source = open_any(original)
    others = [open_any(model) for model in quantized]
    for other in others:
        _check_vocabularies(source, other)
    return source, others


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


def evaluate(original: Original, quantized: str | Path, config: EvalConfig, progress: Progress = silent) -> Comparison:
    """Compare a quantized model with its original on held-out text.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for both; or what
            ``open_model`` made of it.
        quantized: Directory or Hub id of the quantized model.
        config: Options.
        progress: Wraps the blocks of each pass.

    Raises:
        BpwiseError: As ``open_any``, ``evaluation_rows`` and ``compare_models``.
    """
    return next(evaluate_each(original, [quantized], config, progress))


def evaluate_each(
    original: Original,
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
    _check_vocabularies(original, quantized)
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
    model = StreamedModel(original, device=resolve_device(config.device), dtype=_DTYPES[config.dtype])
    state, key = None, ""
    if cache is not None:
        key = original_key(original, rows.tokens, dtype=model.dtype, device=_device_name(model.device))
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
    _check_vocabularies(run.source, quantized)
    runnable = with_positions_of(run.source, quantized)
    check_rows(runnable, run.rows)
    model = StreamedModel(runnable, device=run.model.device, dtype=run.model.dtype)
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
        device=_device_name(run.model.device),
        seconds=run.seconds + time.monotonic() - start,
    )


def vocab_size_of(source: TensorSource) -> int:
    """Return the number of rows of a model's token embedding.

    Raises:
        CheckpointError: config.json does not say.
    """
    size = language_config(source).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{source.directory}: vocab_size in config.json is {size!r}, expected a number.")
    return size


def _check_vocabularies(original: TensorSource, quantized: TensorSource) -> None:
    got, expected = vocab_size_of(quantized), vocab_size_of(original)
    if got != expected:
        raise CheckpointError(
            f"{model_name(quantized)}: the vocabulary has {got} tokens, expected {expected} as in "
            f"{model_name(original)}. Only models with the same vocabulary can be compared: name the original that was "
            "quantized."
        )


def check_rows(source: TensorSource, rows: CalibrationSet) -> None:
    """Check that a model can be run on rows.

    Raises:
        CalibrationError: A token id is outside the vocabulary.
        ConfigError: Rows have one token only or are longer than the model's context.
    """
    largest, vocab_size = int(rows.tokens.max()), vocab_size_of(source)
    if largest >= vocab_size:
        raise CalibrationError(
            f"evaluation text: got token id {largest}, expected ids below the vocabulary size {vocab_size}. "
            "Build the rows with this model's tokenizer."
        )
    row_tokens, context = rows.tokens.shape[1], language_config(source).get("max_position_embeddings")
    if row_tokens < 2:
        raise ConfigError("evaluation text: rows of 1 token, expected at least 2: the first is never predicted.")
    if isinstance(context, int) and row_tokens > context:
        raise ConfigError(
            f"evaluation text: rows of {row_tokens} tokens, but {model_name(source)} has positions for {context}. "
            "Lower row_tokens."
        )


def summarize_model(source: TensorSource, parameters: int) -> ModelSummary:
    """Return what a report says of a model.

    Args:
        source: The model.
        parameters: Number of parameters of the original.
    """
    stored_bytes: int | None = None
    if isinstance(source, (Exl2Model, GgufModel)):
        stored_bytes = source.file_bytes
    elif isinstance(source, Checkpoint):
        stored_bytes = source.total_bytes
    return ModelSummary(
        name=model_name(source),
        fingerprint=source.fingerprint,
        stored_bytes=stored_bytes,
        bits_per_parameter=None if stored_bytes is None else stored_bytes * 8 / parameters,
    )


def model_name(source: TensorSource) -> str:
    """Return the name of a model's file or directory, or its Hub id."""
    if isinstance(source, GgufModel):
        return source.path.name
    # A snapshot in the Hub's cache lies in models--OWNER--NAME/snapshots/REVISION.
    resolved = source.directory.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return resolved.name


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
