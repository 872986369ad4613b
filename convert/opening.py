"""Finished models of every format, opened and verified; and originals beside them."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.model.hub_name import HubName
from ..checkpoint.source.checkpoint import TensorSource
from ..checkpoint.source.hub import resolve_file, resolve_model
from ..checkpoint.source.original import Original, open_model
from ..errors import CheckpointError
from .model import Verification
from .registry import format_of, formats, require_format

__all__ = ["locate_model", "open_any", "verify_model"]


def locate_model(model: str | Path) -> Path:
    """Return the local directory or file of a model of any format, downloading it from the Hub if need be.

    Args:
        model: A path, which wins over a Hub id; or ``ORG/NAME``, ``ORG/NAME@REVISION``, and for models in one file
            ``ORG/NAME:Q4_K_M`` or ``ORG/NAME/FILE.gguf`` (``str`` only).

    Raises:
        CheckpointError: As ``resolve_model`` and ``resolve_file``.
        DiskFullError: The disk of the Hub's cache is full.
    """
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's raises where there is no home
    if not isinstance(model, str) or path.exists():
        return path
    suffixes = tuple(each.suffix for each in formats().values() if each.suffix)
    name = HubName.parse(model)
    if name is not None and "/" in name.repo and (name.tag is not None or str(name.file).lower().endswith(suffixes)):
        return resolve_file(name, suffixes)
    if model.lower().endswith(suffixes):
        raise CheckpointError(f"{model}: not found. Expected a file, or ORG/NAME/FILE on the Hub. Check the path.")
    directory = resolve_model(model, also=[pattern for each in formats().values() for pattern in each.own_files])
    # A repository of models in one file each has no weights beside them.
    if name is None or any(directory.glob("*.safetensors*")):
        return directory
    return resolve_file(name, suffixes)


def open_any(model: Original | TensorSource) -> TensorSource:
    """Open a quantized model of any format, or an unquantized checkpoint.

    Args:
        model: What ``locate_model`` takes, or an open model, which is returned as it is.

    Raises:
        CheckpointError: It cannot be found, or its files are missing, unsafe or inconsistent.
        FormatError: It is a quantized model that breaks its format's rules.
        UnsupportedModelError: It is a quantized model of an architecture that is unknown.
    """
    if not isinstance(model, str | Path):
        return model
    path = locate_model(model)
    format_ = format_of(path)
    return open_model(path) if format_ is None else format_.open(path)


def verify_model(path: str | Path) -> Verification:
    """Read every tensor of a quantized model back, and compare it with what was intended as far as that is known.

    Args:
        path: A model of any format, by whatever program.

    Raises:
        FormatError: It is not a quantized model, or breaks a rule of its format.
        ShapeError: A tensor does not have the shape that the model's config demands.
        VerificationError: A tensor does not decode to what was intended, is missing or unexpected.

    Example:
        >>> from bpwise import verify_model
        >>> verify_model("llama-6bpw").compared
        True
    """
    path = Path(path)
    return require_format(path).verify(path)
