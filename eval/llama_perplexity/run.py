"""llama-perplexity's runs: a model's perplexity, a base file of it, and its comparison with a base file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.files.atomic import try_file
from ...checkpoint.files.paths import refuse_foreign
from ...errors import CheckpointError
from ...measure.text.calibration import CalibrationSet, require_ids_below
from ...progress import Progress, silent
from ..metrics.overlap import refuse_calibration_text, stored_spans, with_overlap_warning
from .base_file import BaseFile, is_base_file, writing_base
from .model import PerplexityModel
from .statistics import TokenComparison, compare_tokens, token_nll
from .windows import cut_windows

__all__ = ["compare_with_base", "measure_perplexity", "windows_for"]


def windows_for(
    model: PerplexityModel, text: str | Path, *, window_tokens: int = 512, most: int | None = None
) -> CalibrationSet:
    """Cut a text into windows for a model; their description says if it was calibrated on them.

    Args:
        model: The model.
        text: As for ``read_text``.
        window_tokens: Length of each window.
        most: Number of windows to take; None for all.

    Raises:
        CalibrationError: The text cannot be read, is shorter than two windows, or has a token that the model lacks.
        ConfigError: Windows are longer than the model's context.
    """
    model.require_context(window_tokens)
    rows = cut_windows(model.tokenizer, text, window_tokens=window_tokens, most=most)
    require_ids_below(rows.tokens, model.vocab_size, model.tokenizer, use="evaluation")
    share = refuse_calibration_text(rows, stored_spans(model.source), allowed=True)
    return with_overlap_warning(rows, share)


def measure_perplexity(
    model: PerplexityModel, rows: CalibrationSet, base: Path | None = None, progress: Progress = silent
) -> Tensor:
    """Run a model over windows, and keep its predictions where asked for.

    Args:
        model: The model.
        rows: The windows.
        base: Base file to make or replace; None for none. Its size is ``base_file_bytes``.
        progress: Wraps the blocks, and the windows.

    Returns:
        Negative log-likelihood in nats of each counted token, float32.

    Raises:
        DiskFullError: The base file's disk has too little room.
        WorkDirectoryError: The base file cannot be written, or another file is in its place.
        BpwiseError: As ``PerplexityModel.predictions``.
    """
    if base is not None:
        refuse_foreign(base, is_base_file, "a base file", advice="move it away")
        try_file(base)
    nlls = []
    with nullcontext() if base is None else writing_base(base, rows.tokens, model.vocab_size) as write:
        for logits, targets in model.predictions(rows.tokens, progress):
            nlls.append(token_nll(logits, targets))
            if write is not None:
                write(logits)
    return torch.cat(nlls)


def compare_with_base(model: PerplexityModel, base: Path, progress: Progress = silent) -> TokenComparison:
    """Run a model over the windows of a base file, and compare its predictions with those in it.

    Args:
        model: The model.
        base: A base file, by llama-perplexity or by ``measure_perplexity``.
        progress: Wraps the blocks, and the windows.

    Raises:
        FormatError: The base file is damaged.
        CheckpointError: It is of another vocabulary.
        ConfigError: Its windows are longer than the model's context.
        BpwiseError: As ``PerplexityModel.predictions``.
    """
    opened = BaseFile.open(base)
    if opened.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"{base}: not of this model. Got a vocabulary of {opened.vocab_size} tokens. Expected {model.vocab_size} "
            f"as in {model.name}. Make a base file of the original that was quantized."
        )
    model.require_context(opened.tokens.shape[1])
    with opened.reading() as read:
        return TokenComparison.joined(
            compare_tokens(logits, read(len(logits)), targets)
            for logits, targets in model.predictions(opened.tokens, progress)
        )
