"""Safe, lazy reading of a Hugging Face checkpoint: one tensor at a time, no code run."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...progress import Progress, silent
from ..files.digests import file_digests
from ..files.safetensors_file import HeaderEntry, SafetensorsHeader, read_entry
from ..files.schemas import read_json
from ..model.config import complete_config, quantization_of
from ..model.dtypes import FLOAT_DTYPES, require_finite, require_readable
from ..model.families import is_known
from ..model.names import embedding_name, head_name, text_config
from .hub import confined_file, require_own_files
from .index import refuse_adapter, weight_headers

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "TensorSource",
    "embedding_rows",
]

_log = logging.getLogger(__name__)


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

    def entry(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first dimension, reading no other where that can be."""


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
            shards: Header of every weight file, by its name in ``directory``; no tensor is in two of them.
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
                f"{directory}: no model directory. Got {got}. Expected a directory with config.json and "
                "safetensors files. Check the path."
            )
        refuse_adapter(directory)
        config_path = confined_file(directory, "config.json")
        config = read_json(config_path, CheckpointError)
        _check_config(config, config_path, quantized=quantized)
        headers = weight_headers(directory)
        require_own_files(directory)
        _log.debug("original: %s, config.json and %s", directory, ", ".join(headers))
        checkpoint = cls(directory, config, headers)
        if not is_known(config):
            return checkpoint
        return cls(directory, complete_config(config, config_path, embedding_rows=embedding_rows(checkpoint)), headers)

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
        """The parsed ``config.json``, of a known family completed by ``complete_config``; not to be modified."""
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
        """Whether the output head is the token embedding, by the rules of Transformers; see ``_is_tied``."""
        return _is_tied(self)

    @property
    def changes(self) -> dict[str, Any]:
        """What is changed while reading, as plain JSON for provenance; empty here, see ``CheckpointView``."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify config and weights, independent of where the directory lies.

        SHA-256 over the names and the whole contents of ``config.json`` and of every shard. The first time all of it
        is read; digests are remembered for as long as files stay as they are, see ``file_digests``.

        Raises:
            CheckpointError: A file cannot be read, or changes meanwhile.
        """
        return self._fingerprint(silent)

    def prepare_fingerprint(self, progress: Progress) -> None:
        """Read what the fingerprint is made of, showing how far it is; ``fingerprint`` alone does so in silence.

        Raises:
            CheckpointError: As ``fingerprint``.
        """
        if "fingerprint" not in self.__dict__:
            self.fingerprint = self._fingerprint(progress)

    def _fingerprint(self, progress: Progress) -> str:
        names = ["config.json", *sorted(self._shards)]
        digests = file_digests([self.file(name) for name in names], CheckpointError, progress)
        parts = [f"{digest} {name}\n" for name, digest in zip(names, digests, strict=True)]
        return hashlib.sha256("".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]

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
            CheckpointError: The tensor is missing, of another dtype, or holds NaN or infinite values; a single number,
                which is no weight, may be infinite.
        """
        self.require_dtype(name)
        return self._finite(name, self.stored(name))

    def entry(self, name: str, index: int) -> Tensor:
        """Load one entry of a tensor's first dimension, as one of stacked experts, reading no other; see ``tensor``.

        Raises:
            CheckpointError: As ``tensor``.
        """
        self.require_dtype(name)
        return self._finite(name, self.stored(name, index))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        # Gemma 4's audio tower clips at bounds, which may be infinite.
        if tensor.dtype in FLOAT_DTYPES and not (tensor.ndim == 0 and tensor.isinf()):
            require_finite(tensor, f"{self.info(name).file}: tensor {name!r}")
        return tensor

    def require_dtype(self, name: str) -> None:
        """Refuse a tensor of a dtype that ``tensor`` does not read, without loading it.

        Raises:
            CheckpointError: The tensor is missing or of another dtype.
        """
        info = self.info(name)
        require_readable(info.dtype, f"{info.file}: tensor {name!r}")

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """Load one tensor, or one entry of its first dimension, as it lies in its file, with its values unchecked.

        Raises:
            CheckpointError: The tensor is missing, or its file is damaged.
        """
        shard, place = self._place(name)
        if index is not None:
            size = place.size_bytes // place.shape[0]
            place = HeaderEntry(place.shape[1:], place.dtype, place.offset_bytes + index * size, size)
        return read_entry(self.file(shard), place, CheckpointError)

    def _place(self, name: str) -> tuple[str, HeaderEntry]:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} is missing. Got {len(self._places)} other tensors. "
                f"{_missing_hint(name, sorted(self._places))}"
            ) from None


def _is_tied(source: TensorSource) -> bool:
    """Return whether the output head is the token embedding.

    ``tie_word_embeddings`` of the config, or of the language model's part of it, decides, and a true one over a
    false one, except that a stored head that differs from the embedding is a head of its own (looking loads both).
    Where the config is silent, the head is tied if it is not stored.
    """
    flags = [part.get("tie_word_embeddings") for part in (source.config, text_config(source.config))]
    flag = next((flag for flag in (True, False) if flag in flags), None)
    head, embedding = head_name(source.names), embedding_name(source.names)
    if head is None:
        return flag is not False
    if not flag or embedding is None:
        return bool(flag)
    return source.shape(head) == source.shape(embedding) and torch.equal(source.tensor(head), source.tensor(embedding))


def embedding_rows(source: TensorSource) -> int | None:
    """Return the number of rows of the token embeddings, or None if no tensor has one of the usual names."""
    name = embedding_name(source.names)
    return None if name is None or not source.shape(name) else source.shape(name)[0]


def _check_config(config: dict[str, Any], path: Path, *, quantized: bool) -> None:
    found = quantization_of(config)
    if found is not None and not quantized:
        raise CheckpointError(
            f"{path}: the model is already quantized. Got {found[0]!r}. Expected unquantized weights. "
            "Use the original model."
        )
    for part in (config, text_config(config)):
        flag = part.get("tie_word_embeddings")
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(
                f"{path}: wrong tie_word_embeddings. Got {flag!r}. Expected true or false. Correct it."
            )


def _missing_hint(name: str, others: Iterable[str]) -> str:
    near = next((other for other in others if other.endswith(f".{name}") or name.endswith(f".{other}")), None)
    if near is None:
        return "The checkpoint is incomplete, or its architecture is not what config.json says."
    return (
        f"{near!r} is there: the model was saved with another prefix, as without its head or within a wrapper. Load it "
        "with AutoModelForCausalLM and save that."
    )
