"""How fast a quantized file is in the engine that it is made for."""

from __future__ import annotations

import torch

from ..checkpoint.source.checkpoint import TensorSource
from ..convert.model import QuantizedModel
from ..convert.registry import load_library
from ..errors import CheckpointError, ConfigError, NumericalError

__all__ = ["tokens_per_second"]

_ENGINE = "llama.cpp"
_ROW_TOKENS = 64


def tokens_per_second(model: TensorSource) -> float | None:
    """Return how many tokens llama.cpp writes a second on this machine, one after another.

    Args:
        model: A model; others than files that llama.cpp runs have no speed.

    Returns:
        None where llama.cpp is not installed, or does not run the model.
    """
    if not (isinstance(model, QuantizedModel) and _ENGINE in model.engines):
        return None
    try:
        library = load_library(None)
        with library.model(model.path, row_tokens=_ROW_TOKENS, threads=torch.get_num_threads()) as engine:
            return engine.tokens_per_second()
    except (ConfigError, CheckpointError, NumericalError):
        return None
