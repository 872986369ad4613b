"""Logits of Transformers on given token ids: the model whole in memory, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ....checkpoint.model.config import explain_transformers
from ....checkpoint.source.checkpoint import Checkpoint
from ....measure.model.whole import whole_model

__all__ = ["transformers_logits"]


def transformers_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Load the language model of a checkpoint, and run it.

    Args:
        checkpoint: The model; needs memory for its weights twice, once as they are stored and once in float32.
        tokens: Token ids, int64, shape (rows, tokens).

    Returns:
        Shape (rows, tokens, vocabulary), float32, on the CPU.

    Raises:
        UnsupportedModelError: Transformers does not know the model.
        CheckpointError: It does not accept it, or tensors are missing.
    """
    with _quiet():
        model = whole_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad(), explain_transformers(checkpoint.directory / "config.json"):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


@contextmanager
def _quiet() -> Iterator[None]:
    # Its progress bars and advice are about a model that nobody is going to use.
    from transformers.utils import logging  # noqa: PLC0415 - seconds to import

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
