"""Opening an original: the one place that decides how a model's files become the weights that are quantized."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import CheckpointError
from ..model.config import quantization_of
from ..model.dtypes import FLOAT_DTYPES
from .checkpoint import Checkpoint
from .float8 import Float8View
from .hub import resolve_model
from .lora import LoraView
from .mxfp4 import Mxfp4View
from .vocabulary import warn_of_tokens_beyond

__all__ = ["Original", "open_model"]

Original = str | Path | Checkpoint
"""A model directory, a Hub id (``str`` only), or what ``open_model`` made of one."""

_VIEWS = {
    "fp8": (Float8View, torch.float8_e4m3fn),
    "fbgemm_fp8": (Float8View, torch.float8_e4m3fn),
    "compressed-tensors": (Float8View, torch.float8_e4m3fn),
    "mxfp4": (Mxfp4View, torch.uint8),
}
"""For each ``quant_method`` that is read: what dequantizes it, and the dtype that its codes must have."""


def open_model(model: Original, *, lora: str | Path | None = None) -> Checkpoint:
    """Open a model, with what shall be changed while it is read; float8 and MXFP4 weights are dequantized.

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
        checkpoint = _dequantized(Checkpoint.open(directory, quantized=True))
        warn_of_tokens_beyond(checkpoint)
    if lora is not None:
        checkpoint = LoraView(checkpoint, Path(lora))
    return checkpoint


def _dequantized(checkpoint: Checkpoint) -> Checkpoint:
    path = checkpoint.directory / "config.json"
    found = quantization_of(checkpoint.config)
    if found is None:
        return checkpoint
    key, settings = found
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    dtypes = {checkpoint.info(name).dtype for name in checkpoint.names}
    if dtypes <= set(FLOAT_DTYPES):
        raise CheckpointError(
            f"{path}: {key!r} names the method {method!r}, but the weights are not quantized. "
            f"Remove {key!r} from config.json if it was left over."
        )
    view, codes = _VIEWS.get(method, (None, None)) if isinstance(method, str) else (None, None)
    if view is None or codes not in dtypes:
        raise CheckpointError(
            f"{path}: the model is already quantized. Got {key!r} with method {method!r}. Expected unquantized, 8-bit "
            "floating-point or MXFP4 weights. Use the original model."
        )
    return view(checkpoint)
