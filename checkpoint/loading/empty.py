"""Models of Transformers without weights, on the meta device, and what their parts are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ..model.config import explain_transformers

__all__ = ["empty_decoder", "empty_whole", "module_name", "require_decoder"]


def require_decoder(parsed: Any, path: Path) -> Any:
    """Return the class of the causal language model that a config is of.

    Args:
        parsed: Transformers' config object of a language model alone.
        path: Its config.json, for messages.

    Raises:
        UnsupportedModelError: Transformers has no causal language model of this type, or the config is that of an
            encoder, or of an encoder with a decoder.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, __version__  # noqa: PLC0415 - seconds

    kinds = AutoModelForCausalLM._model_mapping
    # Encoders are in the mapping too, for those of them that were trained as decoders.
    encoder = type(parsed) in AutoModelForMaskedLM._model_mapping and not getattr(parsed, "is_decoder", False)
    if type(parsed) not in kinds or parsed.is_encoder_decoder or encoder:
        raise UnsupportedModelError(
            f"{path}: model_type {parsed.model_type!r} is not a decoder that Transformers {__version__} runs as a "
            "causal language model. Expected one that AutoModelForCausalLM loads. Choose another model."
        )
    return kinds[type(parsed)]


def empty_decoder(parsed: Any, path: Path, **options: Any) -> Any:
    """Return the causal language model of a config, on the meta device.

    Args:
        parsed: Transformers' config object of a language model alone; it belongs to the model then.
        path: Its config.json, for messages.
        options: As ``from_config`` of Transformers takes them: dtype, implementation of attention.

    Raises:
        UnsupportedModelError: As ``require_decoder``.
        CheckpointError: Transformers does not accept the config.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds to import

    require_decoder(parsed, path)
    with explain_transformers(path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(parsed, **options).eval()


def empty_whole(parsed: Any, path: Path) -> Any | None:
    """Return a model of several parts, on the meta device.

    None if Transformers has none for its config, or cannot build a part: Gemma 3n's tower needs a library of its own.

    Args:
        parsed: Transformers' config object of the whole.
        path: Its config.json, for messages.

    Raises:
        CheckpointError: Transformers does not accept the config.
    """
    from transformers import AutoModelForMultimodalLM  # noqa: PLC0415 - seconds to import

    if type(parsed) not in AutoModelForMultimodalLM._model_mapping:
        return None
    with explain_transformers(path), torch.device("meta"):
        try:
            return AutoModelForMultimodalLM.from_config(parsed)
        except ImportError:
            return None


def module_name(model: Any, module: nn.Module) -> str:
    """Return the full name of a module of a model."""
    name: str = next(name for name, each in model.named_modules() if each is module)
    return name
