"""Logits of Transformers on given token ids: the model whole in memory, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.model.config import explain_transformers, parse_config
from ....checkpoint.source.checkpoint import Checkpoint
from ....errors import CheckpointError, UnsupportedModelError

__all__ = ["transformers_logits"]


def transformers_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Load a model as Transformers does, and run it.

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
        model = _loaded(checkpoint)
        with torch.no_grad(), explain_transformers(checkpoint.directory / "config.json"):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def _loaded(checkpoint: Checkpoint) -> Any:
    path = checkpoint.directory / "config.json"
    parsed = parse_config({**checkpoint.config, "tie_word_embeddings": checkpoint.tied_embeddings}, path)
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names}
    with explain_transformers(path):
        model, found = _model_class(parsed).from_pretrained(
            None,
            config=parsed,
            state_dict=weights,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: tensors that Transformers wants are missing. Got no {missing[0]!r}, nor "
            f"{len(missing) - 1} others. Get the model again."
        )
    return model.eval()


def _model_class(parsed: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: PLC0415 - seconds to import

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(parsed) in auto._model_mapping:
            return auto._model_mapping[type(parsed)]
    raise UnsupportedModelError(
        f"config.json: Transformers has no language model of model_type {parsed.model_type!r}. Choose another model."
    )


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
