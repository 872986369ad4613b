"""Opening an original: the one place that decides how a model's files become the weights that are quantized."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint
from .float8 import dequantized
from .hub import resolve_model
from .lora import LoraView
from .vocabulary import warn_of_tokens_beyond

__all__ = ["Original", "open_model"]

Original = str | Path | Checkpoint
"""A model directory, a Hub id (``str`` only), or what ``open_model`` made of one."""


def open_model(model: Original, *, lora: Path | None = None) -> Checkpoint:
    """Open a model, with what shall be changed while it is read; float8 weights are dequantized.

    Tokenizer and model first meet here: tokens that the embedding has no row for are warned of, once for a run.
    Whatever takes a model's name takes the result too: ``quantize_model(open_model("base", lora=adapter), ...)``.

    Args:
        model: A local directory (``Path`` or ``str``), a Hugging Face Hub id (``str`` only), or an open checkpoint.
        lora: Directory of a PEFT adapter to merge into the weights; see ``LoraView``.

    Raises:
        CheckpointError: The model cannot be found or downloaded, ``Checkpoint.open`` refuses it, it is quantized in a
            way that is not read, or the adapter does not fit.

    Example:
        >>> from bpwise import open_model
        >>> open_model("llama").config["model_type"]
        'llama'
    """
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        directory = resolve_model(model) if isinstance(model, str) else model
        checkpoint = dequantized(Checkpoint.open(directory, quantized=True))
        warn_of_tokens_beyond(checkpoint)
    if lora is not None:
        checkpoint = LoraView(checkpoint, lora)
    return checkpoint
