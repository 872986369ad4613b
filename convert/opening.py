"""Finished models of every format, opened and verified; and originals beside them."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.source.checkpoint import TensorSource
from ..checkpoint.source.hub import resolve_model
from ..checkpoint.source.original import Original, open_model
from .model import Verification
from .registry import format_of, require_format

__all__ = ["open_any", "verify_model"]


def open_any(model: Original | TensorSource) -> TensorSource:
    """Open a quantized model of any format, or an unquantized checkpoint.

    Args:
        model: A local directory or file (``Path`` or ``str``), a Hugging Face Hub id (``str`` only), or an open model,
            which is returned as it is.

    Raises:
        CheckpointError: It cannot be found, or its files are missing, unsafe or inconsistent.
        FormatError: It is a quantized model that breaks its format's rules.
        UnsupportedModelError: It is a quantized model of an architecture that is unknown.
    """
    if not isinstance(model, str | Path):
        return model
    path = Path(model)
    if not path.is_file():
        path = resolve_model(model) if isinstance(model, str) else model
    format_ = format_of(path)
    return open_model(path) if format_ is None else format_.open(path)


def verify_model(path: str | Path) -> Verification:
    """Read every tensor of a quantized model back, and compare it with what was meant as far as that is known.

    Args:
        path: A model of any format, by whatever program.

    Raises:
        FormatError: It is not a quantized model, or breaks a rule of its format.
        ShapeError: A tensor does not have the shape that the model's config demands.
        VerificationError: A tensor does not decode to what was meant, is missing or unexpected.

    Example:
        >>> from bpwise import verify_model
        >>> verify_model("llama-6bpw").compared
        True
    """
    path = Path(path)
    return require_format(path).verify(path)
