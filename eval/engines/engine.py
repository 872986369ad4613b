"""The original and a quantized file compared by llama.cpp itself: both sides' logits are the engine's.

Logits of llama.cpp and of Transformers are never mixed: even the same weights differ by what the two round on the way
(llama.cpp multiplies quantized weights with activations that it rounds to 8 bits). So the original runs in llama.cpp
too, from an unquantized file of it, the base. Only the floor looks across: it is the base in llama.cpp against
the original in float64, and shows that the base is the original.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.original import Original
from ...convert.model import QuantizedModel
from ...convert.opening import open_any
from ...convert.registry import EngineModel, LlamaLibrary, load_library, stored_model
from ...errors import CheckpointError, ConfigError, UnsupportedModelError
from ...measure.text.calibration import CalibrationSet
from ...measure.text.context import EVALUATION, check_rows
from ...measure.text.tokenizer import Tokenizer, load_tokenizer
from ...progress import Progress, silent
from ..comparison import Comparison, EvalConfig, evaluation_rows
from ..metrics.divergence import TokenStatistics, token_statistics
from ..metrics.overlap import refuse_calibration_text, stored_spans, with_overlap_warning
from ..metrics.passes import exact_logits
from ..metrics.profile import profile_of
from ..models import model_name, open_pair, summarize_model, vocab_size_of
from ..original import FLOOR_TOKENS
from ..speed import tokens_per_second

__all__ = ["ENGINE", "compare_in_engine", "evaluate_in_engine", "open_for_engine"]

ENGINE = "llama.cpp"
"""As models name it that can be run by it."""

_SAME_MODEL_NATS = 0.01
"""Largest floor of a base that is believed to be the original: float16 weights cost some 1e-5, 8-bit ones 1e-3."""


def open_for_engine(model: str | Path | TensorSource) -> TensorSource:
    """Open a model that the engine runs: of an architecture that nothing here decodes, what its header says.

    Args:
        model: A file, or an open model, which is returned as it is.

    Raises:
        BpwiseError: As ``open_any``.
    """
    try:
        opened = open_any(model)
        _ = opened.config  # which some files do not tell without their original
        return opened
    except UnsupportedModelError:
        stored = stored_model(Path(str(model)))
        if stored is None:
            raise
        return stored


def evaluate_in_engine(
    original: Original | TensorSource,
    quantized: Path,
    config: EvalConfig,
    progress: Progress = silent,
    *,
    base: Path,
    llama_cpp: Path | None = None,
) -> Comparison:
    """Compare a quantized file with its original on held-out text, both run by llama.cpp.

    Args:
        original: Directory or Hub id of the original, whose tokenizer makes the token ids for both.
        quantized: The file.
        config: Options; its dtype and device are not read, llama.cpp runs on the CPU.
        progress: Wraps the rows.
        base: The original as an unquantized file that llama.cpp runs.
        llama_cpp: A built llama.cpp; None for the one in the ``xllamacpp`` wheel.

    Raises:
        BpwiseError: As ``open_pair``, ``evaluation_rows``, ``load_library`` and ``compare_in_engine``.
    """
    library = load_library(llama_cpp)
    source, (base_model, other) = open_pair(original, [open_for_engine(base), open_for_engine(quantized)])
    tokenizer = load_tokenizer(source.directory)
    rows = evaluation_rows(tokenizer, config.fitted(source), vocab_size=vocab_size_of(source))
    rows = with_overlap_warning(
        rows, refuse_calibration_text(rows, stored_spans(other), allowed=config.allow_calibration_text)
    )
    return compare_in_engine(source, base_model, other, rows, library, progress, tokenizer=tokenizer)


def compare_in_engine(
    original: TensorSource,
    base: TensorSource,
    quantized: TensorSource,
    rows: CalibrationSet,
    library: LlamaLibrary,
    progress: Progress = silent,
    *,
    tokenizer: Tokenizer | None = None,
) -> Comparison:
    """Compare two files on the same tokens, both run by llama.cpp, with the statistics of ``compare_models``.

    Each row is run on its own, from its first token. In memory are both files, and logits of at most 256 positions of
    each.

    Args:
        original: The model that was quantized, for the floor and the report.
        base: A file of the same that llama.cpp runs, unquantized.
        quantized: A file of what became of it.
        rows: The text.
        library: Runs both.
        progress: Wraps the rows.
        tokenizer: Decodes the worst tokens; None leaves their ids only.

    Raises:
        CheckpointError: llama.cpp cannot load a file, or the base is not the original.
        ConfigError: A model is none that llama.cpp runs, the base is quantized, or rows do not fit.
        CalibrationError: A token id of the rows is outside the vocabulary.
        NumericalError: NaN or infinity in logits.
    """
    start = time.monotonic()
    base, quantized = _runnable(base), _runnable(quantized)
    weights = base.matrix_dtype
    if weights is None:
        raise ConfigError(f"{base.path}: quantized. Expected an unquantized base. Convert the original as it is.")
    for source in (original, base, quantized):
        check_rows(source, rows, EVALUATION)
    count, row_tokens = rows.tokens.shape
    floor_tokens = min(row_tokens, FLOOR_TOKENS)
    exact = exact_logits(original, rows.tokens[:1, :floor_tokens], progress)
    statistics, floor_nats = _run(base, quantized, rows, exact, library, progress)
    parameters = sum(math.prod(original.shape(name)) for name in original.names)
    return Comparison(
        original=summarize_model(original, parameters),
        quantized=summarize_model(quantized, parameters),
        summary=statistics.summary(count),
        profile=profile_of(statistics, rows, tokenizer),
        floor_nats=floor_nats,
        floor_tokens=floor_tokens,
        text=rows.description,
        text_fingerprint=rows.fingerprint,
        rows=count,
        row_tokens=row_tokens,
        stride=row_tokens,
        adds_bos=rows.adds_bos,
        dtype=weights,
        device="cpu",
        seconds=time.monotonic() - start,
        engine=f"{library.description} with a float32 cache, the original from {base.path.name}",
        tokens_per_second=tokens_per_second(quantized),
    )


def _runnable(model: TensorSource) -> QuantizedModel:
    if isinstance(model, QuantizedModel) and ENGINE in model.engines:
        return model
    raise ConfigError(f"{model_name(model)}: not a model that {ENGINE} runs. Convert it first.")


def _run(
    base: QuantizedModel,
    quantized: QuantizedModel,
    rows: CalibrationSet,
    exact: Tensor,
    library: LlamaLibrary,
    progress: Progress,
) -> tuple[TokenStatistics, float]:
    """Run both, and return what is known of every token, and the floor; ``exact`` is of the first row's start."""
    count, row_tokens = rows.tokens.shape
    threads = torch.get_num_threads()
    with (
        library.model(base.path, row_tokens=row_tokens, threads=threads) as first,
        library.model(quantized.path, row_tokens=row_tokens, threads=threads) as second,
    ):
        _check_sizes(first, second, exact.shape[-1])
        floor_nats = _floor_nats(first, exact, rows.tokens[0])
        if floor_nats > _SAME_MODEL_NATS:
            raise CheckpointError(
                f"{base.path}: run by {ENGINE} it is {floor_nats:.3g} nats per token away from the original. Expected "
                f"less than {_SAME_MODEL_NATS}: it is not a conversion of that model, or lost something of it (rope "
                "scaling). Convert the original again."
            )
        parts = (_row(first, second, rows.tokens[row]) for row in progress(range(count), f"evaluate: {ENGINE}"))
        return TokenStatistics.joined(parts, count * (row_tokens - 1)), floor_nats


def _check_sizes(first: EngineModel, second: EngineModel, vocab_size: int) -> None:
    for model in (first, second):
        if model.vocab_size != vocab_size:
            raise CheckpointError(
                f"{ENGINE}: sees a vocabulary of {model.vocab_size} tokens. Expected {vocab_size} as in the "
                "original. Convert it again."
            )


def _row(first: EngineModel, second: EngineModel, tokens: Tensor) -> TokenStatistics:
    parts, position = [], 0
    for ours, theirs in zip(first.logits(tokens), second.logits(tokens), strict=True):
        targets = tokens[position + 1 : position + 1 + len(ours)]  # one fewer at the end of the row, so maybe none
        if len(targets):
            parts.append(token_statistics(ours[: len(targets)], theirs[: len(targets)], targets))
        position += len(ours)
    return TokenStatistics.joined(parts, len(tokens) - 1)


def _floor_nats(base: EngineModel, exact: Tensor, tokens: Tensor) -> float:
    got = torch.cat(list(base.logits(tokens[: len(exact)])))
    return float(token_statistics(exact, got, tokens[1 : len(exact) + 1]).kl_nats.double().mean())
