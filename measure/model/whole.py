"""A model with all of its weights in memory."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.language import language_model
from .skeleton import build_skeleton, set_tensor, stored_tensors
from .surgery import split_block

__all__ = ["whole_model"]


def whole_model(source: TensorSource, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with all of its weights in memory, as Transformers itself would load it.

    Args:
        source: Where configuration and tensors come from; what is quantized is decoded.
        device: Where the model is put.
        dtype: Floating dtype of all weights.

    Returns:
        A ``PreTrainedModel`` in evaluation mode. Its output head shares the token embeddings' memory where the source
        has no head of its own.

    Raises:
        UnsupportedModelError: Transformers does not know the model type.
        CheckpointError: A tensor is missing or has another shape than config.json says.
    """
    language = language_model(source)
    config = {**language.config, "tie_word_embeddings": language.tied_embeddings}
    model = build_skeleton(language, config, dtype, device, pads=True)
    for block in model.get_submodule(language.blocks):
        split_block(block, language.listed, config)
    head = f"{language.head_name}.weight"
    for name in stored_tensors(model):
        if name != head or not language.tied_embeddings:
            stored = language.parameter(name)
            set_tensor(model, name, stored.to(device, dtype if stored.is_floating_point() else None))
    model.tie_weights()
    return model
