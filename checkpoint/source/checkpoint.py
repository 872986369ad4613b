"""Safe, lazy reading of a Hugging Face checkpoint: one tensor at a time, no code run."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...progress import Progress, silent
from ..files.digests import file_digests
from ..files.safetensors_file import HeaderEntry, SafetensorsHeader, read_entry, read_header
from ..files.schemas import read_json, read_schema
from ..model.config import complete_config
from ..model.families import is_known
from ..model.names import text_config
from .hub import confined_file, list_directory, require_own_files, resolve_model

__all__ = [
    "FLOAT_DTYPES",
    "QUANTIZED_KEYS",
    "Checkpoint",
    "TensorInfo",
    "TensorSource",
    "confined_file",
    "embedding_name",
    "embedding_rows",
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

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


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
        _refuse_adapter(directory)
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
        require_own_files(directory)
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
            CheckpointError: The tensor is missing, of another dtype, or holds NaN or infinite values.
        """
        self.require_dtype(name)
        info = self.info(name)
        tensor = self.stored(name)
        if info.dtype in FLOAT_DTYPES:
            require_finite(tensor, f"{info.file}: tensor {name!r}")
        return tensor

    def require_dtype(self, name: str) -> None:
        """Refuse a tensor of a dtype that ``tensor`` does not read, without loading it.

        Raises:
            CheckpointError: The tensor is missing or of another dtype.
        """
        info = self.info(name)
        if info.dtype not in FLOAT_DTYPES + _INTEGER_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has an unsupported dtype, got {_plain(info.dtype)}, expected float32, "
                "float16 or bfloat16 (or integers). Use the model's unquantized release, or save it in bfloat16."
            )

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
            hint = "The checkpoint is incomplete, or its architecture is not what config.json says."
            near = next((n for n in sorted(self._places) if n.endswith(f".{name}") or name.endswith(f".{n}")), None)
            if near is not None:
                hint = (
                    f"{near!r} is there: the model was saved with another prefix, as without its head or within a "
                    "wrapper. Load it with AutoModelForCausalLM and save that."
                )
            raise CheckpointError(
                f"{self._directory}: tensor {name!r} is missing, got {len(self._places)} other tensors. {hint}"
            ) from None


def embedding_name(source: TensorSource) -> str | None:
    """Return the name of the table of token embeddings, or None if no tensor has one of the usual names."""
    return next((name for name in _EMBEDDINGS if name in source.names), None)


def embedding_rows(source: TensorSource) -> int | None:
    """Return the number of rows of the token embeddings, or None if no tensor has one of the usual names."""
    name = embedding_name(source)
    return None if name is None or not source.shape(name) else source.shape(name)[0]


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


def _refuse_adapter(directory: Path) -> None:
    # Some trainers keep a copy of the base's config.json beside an adapter.
    there = {name for name in (_ADAPTER, _ADAPTER_WEIGHTS, _WEIGHTS, _INDEX) if os.path.lexists(directory / name)}
    if _ADAPTER not in there or there & {_WEIGHTS, _INDEX}:
        return
    if os.path.lexists(directory / "config.json") and _ADAPTER_WEIGHTS not in there:
        return
    base = read_json(confined_file(directory, _ADAPTER), CheckpointError).get("base_model_name_or_path")
    raise CheckpointError(
        f"{directory}: a LoRA adapter, not a model, got {_ADAPTER} without weights of a model. Give the base model"
        f"{f' ({base!r:.200})' if isinstance(base, str) and base else ''} as MODEL, and this directory with --lora."
    )


def _single_weight_file(directory: Path) -> str:
    files = [path.name for path in list_directory(directory)]
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
    weight_map = read_schema(path, _Index, CheckpointError).weight_map
    if not weight_map:
        raise CheckpointError(f"{path}: empty weight_map, expected names of tensors and files. Get it again.")
    for name, shard in weight_map.items():
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: wrong file for tensor {name!r:.200}, got {shard!r:.200}, expected a .safetensors file. "
                "Get it again."
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
                f"{directory / _INDEX}: the index is stale, or a file is incomplete: tensor {name!r:.200} is missing "
                f"from {shard!r}. Delete its entry from the index if the model needs no such tensor (as an output head "
                "that is tied to the embedding), else get the model again."
            )
        if holder[name] != shard:
            raise CheckpointError(
                f"{directory / _INDEX}: wrong file for tensor {name!r}, got {shard}, expected "
                f"{holder[name]}, which holds it. Get the model again."
            )
    if not holder:
        raise CheckpointError(f"{directory}: no weights, got files without tensors. Get the model again.")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
