"""Safe, lazy reading of a Hugging Face checkpoint: one tensor at a time, no code run."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .exl2.names import text_config
from .files import read_json
from .hub import confined_file, resolve_model
from .safetensors_file import HeaderEntry, SafetensorsHeader, read_entry, read_header

__all__ = [
    "FLOAT_DTYPES",
    "QUANTIZED_KEYS",
    "Checkpoint",
    "TensorInfo",
    "TensorSource",
    "confined_file",
    "embedding_name",
    "head_name",
    "require_finite",
    "resolve_model",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
QUANTIZED_KEYS = ("quantization_config", "compression_config")

_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)

_SAMPLES = 64
"""Places of each shard that the fingerprint looks at: cheap even on a network disk."""

_SAMPLE_BYTES = 4096


class TensorSource(Protocol):
    """What streams a model: a config and tensors by name. ``Checkpoint`` is one, tests make others."""

    @property
    def directory(self) -> Path:
        """Where ``config.json`` and the tokenizer's files are."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json``; not to be modified."""

    @property
    def fingerprint(self) -> str:
        """A string that differs between different models."""

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without loading it.

    Attributes:
        shape: Sizes of the dimensions, outermost first.
        dtype: Stored dtype.
        file: The shard that holds it.
        size_bytes: Number of data bytes in the shard.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    size_bytes: int


class Checkpoint:
    """A Hugging Face model directory with safetensors weights, read lazily.

    ``Checkpoint.open`` checks everything that can be checked without reading weights. No file stays open, so
    a checkpoint may be pickled and sent to other processes that see the same directory.
    """

    def __init__(self, directory: Path, config: dict[str, Any], shards: dict[str, SafetensorsHeader]) -> None:
        """Hold checked parts; use ``Checkpoint.open`` to make them from a directory.

        Args:
            directory: The model directory.
            config: Parsed ``config.json``.
            shards: Header of every weight file, by its name relative to ``directory``; no tensor is in two of
                them.
        """
        self._directory = directory
        self._config = config
        self._shards = shards
        self._places: dict[str, tuple[str, HeaderEntry]] = {
            name: (shard, entry) for shard, header in shards.items() for name, entry in header.entries.items()
        }
        self._names = frozenset(self._places)

    @classmethod
    def open(cls, directory: Path, *, quantized: bool = False) -> Checkpoint:
        """Check a model directory and read its config and the headers of its weight files.

        ``model.safetensors`` is taken first, as in Transformers, then the shards of its index, then a single
        safetensors file of any name. Tensors that a shard holds beyond its index are kept.

        Args:
            directory: A local model directory.
            quantized: Whether a model that is already quantized is taken too, for a view that dequantizes it.

        Raises:
            CheckpointError: Files are missing, damaged, contradictory, pickled, outside the directory, or
                already quantized.
        """
        directory = Path(directory)
        if not directory.is_dir():
            got = "a file" if directory.exists() else "nothing there"
            raise CheckpointError(
                f"{directory}: no model directory, got {got}, expected a directory with config.json and "
                "safetensors files. Check the path."
            )
        config_path = confined_file(directory, "config.json")
        config = read_json(config_path, CheckpointError)
        _check_config(config, config_path, quantized=quantized)
        weight_map: dict[str, str] = {}
        if (directory / _WEIGHTS).exists() or (directory / _WEIGHTS).is_symlink():
            shards = [_WEIGHTS]
        elif (directory / _INDEX).exists() or (directory / _INDEX).is_symlink():
            weight_map = _read_index(directory)
            shards = sorted(set(weight_map.values()))
        else:
            shards = [_single_weight_file(directory)]
        headers = {shard: read_header(confined_file(directory, shard), CheckpointError) for shard in shards}
        _check_shards(directory, headers, weight_map)
        return cls(directory, config, headers)

    @property
    def directory(self) -> Path:
        """The model directory."""
        return self._directory

    @property
    def directories(self) -> tuple[Path, ...]:
        """All directories that it is read from."""
        return (self.directory,)

    @property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json``; not to be modified."""
        return self._config

    @property
    def names(self) -> frozenset[str]:
        """Full names of all stored tensors."""
        return self._names

    @property
    def total_bytes(self) -> int:
        """Size of all stored tensors, in bytes, headers excluded."""
        return sum(self.info(name).size_bytes for name in self.names)

    @property
    def parameter_count(self) -> int:
        """Number of stored floating-point values; a tied head that is not stored does not count again."""
        stored = map(self.info, self.names)
        return sum(math.prod(info.shape) for info in stored if info.dtype.is_floating_point)

    @cached_property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding, by the rules of Transformers.

        ``tie_word_embeddings`` of the config, or of the language model's part of it, decides, and a true one over a
        false one, except that a stored head that differs from the embedding is a head of its own (looking loads both,
        once). Where the config is silent, the head is tied if it is not stored.
        """
        flags = [part.get("tie_word_embeddings") for part in (self.config, text_config(self.config))]
        flag = next((flag for flag in (True, False) if flag in flags), None)
        head, embedding = head_name(self), embedding_name(self)
        if head is None:
            return flag is not False
        if not flag or embedding is None:
            return bool(flag)
        return self.shape(head) == self.shape(embedding) and torch.equal(self.tensor(head), self.tensor(embedding))

    @property
    def changes(self) -> dict[str, Any]:
        """What is changed while reading, as plain JSON for provenance; empty here, see ``CheckpointView``."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify config and weights, independent of where the directory lies.

        SHA-256 over ``config.json``, and for every shard its name, its size, its raw header and 64 evenly
        spaced samples of 4096 bytes. It is *sampled*: it tells models apart and notices retraining or
        conversion, but a change of a few single weights can escape it, so it is no proof of integrity.
        """
        digest = hashlib.sha256()
        _update(digest, self.file("config.json").read_bytes())
        for shard in sorted(self._shards):
            header = self._shards[shard]
            for part in (shard, str(header.file_bytes), header.sha256):
                _update(digest, part.encode("utf-8", "surrogatepass"))
            _update_with_samples(digest, self.file(shard), header)
        return digest.hexdigest()[:32]

    def file(self, name: str) -> Path:
        """Return the path of a file of this model, checked as in ``confined_file``."""
        return confined_file(self.directory, name)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, file and size of a tensor without loading it.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        shard, entry = self._place(name)
        return TensorInfo(entry.shape, entry.dtype, self._directory / shard, entry.size_bytes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        return self.info(name).shape

    def tensor(self, name: str) -> Tensor:
        """Load one tensor and check its values.

        Args:
            name: Full tensor name.

        Returns:
            The tensor as stored: float32, float16, bfloat16, bool or an integer dtype; on the CPU, in memory
            of its own.

        Raises:
            CheckpointError: The tensor is missing, of another dtype, or holds NaN or infinite values.
        """
        info = self.info(name)
        where = f"{info.file}: tensor {name!r}"
        if info.dtype not in FLOAT_DTYPES + _INTEGER_DTYPES:
            raise CheckpointError(
                f"{where} has an unsupported dtype, got {_plain(info.dtype)}, expected float32, float16 or "
                "bfloat16 (or integers). Use the model's unquantized release, or save it in bfloat16."
            )
        tensor = self.stored(name)
        if info.dtype in FLOAT_DTYPES:
            require_finite(tensor, where)
        return tensor

    def stored(self, name: str) -> Tensor:
        """Load one tensor as it lies in its file, of whatever dtype, with its values unchecked.

        Raises:
            CheckpointError: The tensor is missing, or its file is damaged.
        """
        shard, entry = self._place(name)
        return read_entry(self.file(shard), entry, CheckpointError)

    def _place(self, name: str) -> tuple[str, HeaderEntry]:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} is missing, got {len(self._places)} other tensors. "
                "The checkpoint is incomplete, or its architecture is not what config.json says."
            ) from None


def embedding_name(source: TensorSource) -> str | None:
    """Return the name of the table of token embeddings, or None if no tensor has one of the usual names."""
    return next((name for name in _EMBEDDINGS if name in source.names), None)


def head_name(source: TensorSource) -> str | None:
    """Return the name of the output head's weight, or None if none is stored."""
    return next((name for name in _HEADS if name in source.names), None)


def require_finite(tensor: Tensor, where: str) -> None:
    """Refuse weights that hold NaN or infinite values.

    Args:
        tensor: Of any shape, floating point.
        where: Begins the message.

    Raises:
        CheckpointError: It does.
    """
    # min and max pass NaN on and need no temporary the size of the tensor, unlike isfinite().all().
    if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{where} holds NaN or infinite values, got {bad} of {tensor.numel()}, expected none. "
            "The checkpoint is damaged: get it again, or use another one."
        )


def _check_config(config: dict[str, Any], path: Path, *, quantized: bool) -> None:
    for key in QUANTIZED_KEYS:
        if config.get(key) is not None and not quantized:
            raise CheckpointError(
                f"{path}: the model is already quantized, got {key!r}, expected unquantized weights. "
                "Use the original model."
            )
    for part in (config, text_config(config)):
        flag = part.get("tie_word_embeddings")
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(
                f"{path}: wrong tie_word_embeddings, got {flag!r}, expected true or false. Correct it."
            )


def _single_weight_file(directory: Path) -> str:
    files = sorted(path.name for path in directory.iterdir())
    found = [name for name in files if name.endswith(".safetensors") and not name.startswith(".")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{directory}: unclear weights, got {len(found)} safetensors files, expected {_WEIGHTS}, "
            f"{_INDEX} or a single file. Get the index file too."
        )
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{directory}: pickled weights can run code, got {pickles[0]!r}, expected safetensors. Convert "
            "the model with Transformers' save_pretrained(safe_serialization=True)."
        )
    raise CheckpointError(f"{directory}: no weights, got no safetensors file, expected {_WEIGHTS} or {_INDEX}.")


def _read_index(directory: Path) -> dict[str, str]:
    path = confined_file(directory, _INDEX)
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map, expected an object of tensor names and files. Get it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: wrong file for tensor {name!r}, got {shard!r}, expected a .safetensors file. Get it again."
            )
    return weight_map


def _check_shards(directory: Path, headers: dict[str, SafetensorsHeader], weight_map: dict[str, str]) -> None:
    holder: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.entries:
            if name in holder:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} is stored twice, got {holder[name]} and {shard}, "
                    "expected one file. Get the model again."
                )
            holder[name] = shard
    for name, shard in weight_map.items():
        if name not in holder:
            raise CheckpointError(
                f"{directory / shard}: tensor {name!r} is missing, expected it from {_INDEX}. Get the model again."
            )
        if holder[name] != shard:
            raise CheckpointError(
                f"{directory / _INDEX}: wrong file for tensor {name!r}, got {shard}, expected "
                f"{holder[name]}, which holds it. Get the model again."
            )
    if not holder:
        raise CheckpointError(f"{directory}: no weights, got files without tensors. Get the model again.")


def _update(digest: hashlib._Hash, part: bytes) -> None:
    # The length goes first, so that moving a byte from one part to the next changes the digest.
    digest.update(len(part).to_bytes(8, "little") + part)


def _update_with_samples(digest: hashlib._Hash, path: Path, header: SafetensorsHeader) -> None:
    start, end = header.data_offset_bytes, header.file_bytes
    with path.open("rb") as file:
        if end - start <= _SAMPLES * _SAMPLE_BYTES:
            file.seek(start)
            _update(digest, file.read(end - start))
            return
        for index in range(_SAMPLES):  # The first sample begins with the data, the last ends with it.
            file.seek(start + index * (end - start - _SAMPLE_BYTES) // (_SAMPLES - 1))
            _update(digest, file.read(_SAMPLE_BYTES))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
