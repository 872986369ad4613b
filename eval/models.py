"""An original and what was made of it: opened, checked to fit each other, and summarized for a report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint.source.checkpoint import Checkpoint, TensorSource
from ..checkpoint.source.hub import directory_name
from ..checkpoint.source.language import language_config
from ..checkpoint.source.original import Original
from ..convert.model import QuantizedModel
from ..convert.opening import open_any
from ..errors import CheckpointError

__all__ = [
    "DTYPES",
    "ModelSummary",
    "check_vocabularies",
    "device_name",
    "model_name",
    "open_pair",
    "summarize_model",
    "vocab_size_of",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What models are evaluated in."""

_READ_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """What a report says of a model.

    Attributes:
        name: Name of its file or directory, or its Hub id.
        fingerprint: Tells models apart.
        stored_bytes: Size of all files with weights; None if they are not on disk.
        bits_per_parameter: Those bytes in bits over the parameters *of the original*, embeddings and all overheads
            included; None if they are not on disk.
        sha256: Of a quantized model, SHA-256 of its files with weights by their names, 64 hexadecimal digits each.
    """

    name: str
    fingerprint: str
    stored_bytes: int | None
    bits_per_parameter: float | None
    sha256: Mapping[str, str] = field(default_factory=dict)


def open_pair(
    original: Original | TensorSource, quantized: Sequence[str | Path | TensorSource]
) -> tuple[TensorSource, list[TensorSource]]:
    """Open an original and what was made of it, and check that they can be compared.

    Args:
        original: Directory or Hub id of the original, or what ``open_model`` made of it.
        quantized: Directories, files or Hub ids of the quantized models, or what they were opened as.

    Raises:
        BpwiseError: As ``open_any``.
        CheckpointError: The vocabularies differ in size.
    """
    source = open_any(original)
    opened = (open_any(model) for model in quantized)
    others = [model.beside(source) if isinstance(model, QuantizedModel) else model for model in opened]
    for other in others:
        check_vocabularies(source, other)
    return source, others


def vocab_size_of(source: TensorSource) -> int:
    """Return the number of rows of a model's token embedding.

    Raises:
        CheckpointError: config.json does not say.
    """
    size = language_config(source).get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(
            f"{source.directory}: vocab_size in config.json is {size!r}. Expected a number. Get the model again."
        )
    return size


def check_vocabularies(original: TensorSource, quantized: TensorSource) -> None:
    """Check that two models have as many tokens as each other.

    Raises:
        CheckpointError: They have not, or a config.json does not say.
    """
    got, expected = vocab_size_of(quantized), vocab_size_of(original)
    if got != expected:
        raise CheckpointError(
            f"{model_name(quantized)}: the vocabulary has {got} tokens. Expected {expected} as in "
            f"{model_name(original)}. Only models with the same vocabulary can be compared: name the original that was "
            "quantized."
        )


def summarize_model(source: TensorSource, parameters: int) -> ModelSummary:
    """Return what a report says of a model.

    Args:
        source: The model.
        parameters: Number of parameters of the original.
    """
    stored_bytes: int | None = None
    if isinstance(source, QuantizedModel):
        stored_bytes = source.file_bytes
    elif isinstance(source, Checkpoint):
        stored_bytes = source.total_bytes
    return ModelSummary(
        name=model_name(source),
        fingerprint=source.fingerprint,
        stored_bytes=stored_bytes,
        bits_per_parameter=None if stored_bytes is None else stored_bytes * 8 / parameters,
        sha256=_file_hashes(source) if isinstance(source, QuantizedModel) else {},
    )


def _file_hashes(model: QuantizedModel) -> dict[str, str]:
    # Those that the Hub shows of a file.
    return {path.name: _sha256(path) for path in model.files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def model_name(source: TensorSource) -> str:
    """Return the name of a model's file or directory, or its Hub id."""
    if isinstance(source, QuantizedModel) and source.path != source.directory:
        return source.path.name
    return directory_name(source.directory)


def device_name(device: torch.device) -> str:
    """Return a device as a report calls it: of a GPU with its model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
