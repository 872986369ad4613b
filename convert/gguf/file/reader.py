"""A GGUF file read back as the model that it decodes to, with Transformers' names and order of rows."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ....checkpoint.files.digests import file_digests
from ....checkpoint.files.disk_errors import explained_reading
from ....checkpoint.model.names import model_order
from ....errors import CheckpointError, FormatError
from ...model import Description, QuantizedModel
from .config import config_from_metadata
from .describe import describe_gguf
from .header import GgufHeader, GgufTensor, is_gguf, read_gguf_header
from .metadata import SPANS_KEY
from .names import ROPE_FREQS, architecture_of, hf_name, row_order, tensor_shapes

__all__ = ["GgufModel", "is_gguf", "read_values"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DENSE = {
    **_FLOATS,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

_PIECE_WEIGHTS = 1 << 20
"""Weights decoded at once: decoding in NumPy takes some ten times the result's memory."""


class GgufModel(QuantizedModel):
    """A model in one GGUF file, read lazily; nothing stays open, so it may be pickled."""

    format: ClassVar[str] = "gguf"
    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    def __init__(self, header: GgufHeader, config: dict[str, Any]) -> None:
        """Hold checked parts; use ``GgufModel.open`` to make them from a file.

        Args:
            header: What stands before the file's data.
            config: config.json of the model.
        """
        self._header = header
        self._config = config
        self._architecture = architecture_of(header.metadata["general.architecture"])
        self._places = {hf_name(name) or name: info for name, info in header.tensors.items() if name != ROPE_FREQS}
        self._names = frozenset(self._places)

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Read what stands before the data, and check that it is a whole model.

        Args:
            path: A GGUF file.

        Raises:
            FormatError: The file is damaged, or tensors are missing, unknown or of wrong shapes.
            UnsupportedModelError: The architecture is unknown, or a variant that Transformers has no counterpart of.
        """
        header = read_gguf_header(Path(path))
        rope = header.tensors.get(ROPE_FREQS)
        if rope is not None and rope.type.name != "F32":
            raise FormatError(
                f"{path}: {ROPE_FREQS} is of type {rope.type.name}. Expected F32. Convert the model again."
            )
        config = config_from_metadata(header, read_values(header.path, rope).numpy() if rope else None)
        _check_tensors(header, tensor_shapes(architecture_of(header.metadata["general.architecture"]), config))
        return cls(header, config)

    @property
    def path(self) -> Path:
        """The file."""
        return self._header.path

    @property
    def header(self) -> GgufHeader:
        """Metadata, and the tensors as they stand in the file."""
        return self._header

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model, rebuilt from the metadata; not to be modified."""
        return self._config

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors, as Transformers has them."""
        return self._names

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding: only if no head is stored."""
        return bool(self._config["tie_word_embeddings"])

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self._header.file_bytes

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied head does not count again."""
        return sum(math.prod(info.shape) for info in self._places.values())

    @property
    def matrix_dtype(self) -> str | None:
        """Dtype that most of its matrices are stored in; None if a tensor is quantized."""
        if any(info.type.quantized for info in self._places.values()):
            return None
        # Vectors are float32 in any file: it is the matrices that tell files apart.
        (name, _), *_ = Counter(info.type.name for info in self._places.values() if len(info.shape) > 1).most_common(1)
        return str(_FLOATS[name]).removeprefix("torch.")

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text; None if it does not say."""
        spans = self._header.metadata.get(SPANS_KEY)
        return None if spans is None else str(spans)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the model, made of the whole file as :attr:`Checkpoint.fingerprint` is.

        Raises:
            FormatError: The file cannot be read, or changes meanwhile.
        """
        return file_digests([self.path], FormatError)[0][:32]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        return self.stored(name).shape

    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every matrix, in model order."""
        names = sorted((x for x in self.names if x.endswith(".weight") and len(self.shape(x)) > 1), key=model_order)
        return {name.removesuffix(".weight"): self.stored(name).type.bits_per_weight for name in names}

    def describe(self) -> Description:
        """Return what is in it."""
        return describe_gguf(self._header)

    def stored(self, name: str) -> GgufTensor:
        """Return what is known of a tensor without loading it.

        Args:
            name: Its name in Transformers.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        if name not in self._places:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing. Got {len(self._places)} others. Get the model again."
            )
        return self._places[name]

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor, put its rows into Transformers' order, and check its values.

        Args:
            name: Its name in Transformers.

        Returns:
            float32, float16 or bfloat16 if it is stored so, and float32 if it is quantized; on the CPU, in memory of
            its own.

        Raises:
            CheckpointError: There is no tensor of that name.
            FormatError: The file is shorter than it was, the type cannot be decoded, or a value is NaN or infinite.
        """
        info = self.stored(name)
        values = read_values(self.path, info)
        order = row_order(name, self._architecture, self._config)
        if order is None:
            return values
        restored = torch.empty_like(values)
        restored[order] = values
        return restored


def read_values(path: Path, tensor: GgufTensor) -> Tensor:
    """Read and decode a tensor as it stands in a GGUF file, a few rows at a time.

    Args:
        path: The file.
        tensor: Where it lies.

    Returns:
        As in ``GgufModel.tensor``, but with the file's order of rows; float64 and integers as they are stored.

    Raises:
        FormatError: The file cannot be read, is shorter than it was, the type cannot be decoded, or a value is NaN or
            infinite.
    """
    width = tensor.shape[-1]
    row_bytes = width // tensor.type.block_weights * tensor.type.block_bytes
    rows = math.prod(tensor.shape[:-1])
    step = max(1, _PIECE_WEIGHTS // width)
    values = torch.empty((rows, width), dtype=_DENSE.get(tensor.type.name, torch.float32))
    with explained_reading(path, FormatError, advice="Check the disk."), path.open("rb") as file:
        # Read and not memory-mapped: should the file shrink meanwhile, a read comes up short, a map kills us.
        file.seek(tensor.offset_bytes)
        for first in range(0, rows, step):
            piece = values[first : first + step]
            piece.copy_(_decode(_read(path, file, len(piece) * row_bytes), tensor, len(piece)))
    if not all(map(torch.isfinite, values.aminmax())):
        bad = int((~torch.isfinite(values)).sum())
        raise FormatError(
            f"{path}: tensor {tensor.name!r} holds NaN or infinite values. Got {bad} of {values.numel()}. Expected "
            "none. The file is damaged: get or make it again."
        )
    return values.view(tensor.shape)


def _read(path: Path, file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        raise FormatError(f"{path}: has become shorter while it was read. Get or make it again.")
    return data


def _decode(data: bytearray, tensor: GgufTensor, rows: int) -> Tensor:
    dtype = _DENSE.get(tensor.type.name)
    if dtype is not None:
        return torch.frombuffer(data, dtype=dtype).view(rows, -1)
    try:
        from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - an extra, and only quantized tensors need it
    except ImportError as cause:
        raise FormatError(
            f"tensor {tensor.name!r}: of type {tensor.type.name}, which the Python package gguf decodes, and it is not "
            "installed. Install it: pip install 'bpwise[gguf]'."
        ) from cause
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    try:
        # A crafted scale may overflow; what comes of it is found by the caller.
        with np.errstate(all="ignore"):
            decoded = quants.dequantize(blocks, GGMLQuantizationType[tensor.type.name])
    except (NotImplementedError, KeyError) as cause:
        raise FormatError(
            f"tensor {tensor.name!r}: type {tensor.type.name} cannot be decoded by the installed gguf package. "
            "Upgrade it, or quantize to another type."
        ) from cause
    return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32))


def _check_tensors(header: GgufHeader, shapes: dict[str, tuple[int, ...]]) -> None:
    seen: dict[str, str] = {}
    for name, info in header.tensors.items():
        if name == ROPE_FREQS:
            continue
        ours = hf_name(name)
        if ours is None or ours not in shapes:
            raise FormatError(
                f"{header.path}: tensor {name!r} does not belong to architecture "
                f"{header.metadata['general.architecture']!r} with this metadata. Convert the model again."
            )
        if info.type.name not in _FLOATS and not info.type.quantized:
            raise FormatError(
                f"{header.path}: tensor {name!r} is of type {info.type.name}. Expected floating point."
                " The file is damaged: make it again."
            )
        if info.shape != shapes[ours]:
            raise FormatError(
                f"{header.path}: tensor {name!r} has shape {info.shape}. Expected {shapes[ours]} from the metadata. "
                "Convert the model again."
            )
        seen[ours] = name
    missing = sorted(shapes.keys() - seen.keys())
    if missing:
        raise FormatError(
            f"{header.path}: {len(missing)} tensors are missing, the first {missing[0]!r}. The file is incomplete: "
            "convert the model again."
        )
