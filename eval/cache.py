"""The original's side of comparisons, kept on disk: its final hidden states, from which the head makes all logits.

They are what is small: 16 rows of 1024 tokens of an 8B model are 268 MB in float32, their logits would be 8.4 GB. They
are kept exactly, in the dtype that they were computed in: a second evaluation gives the same numbers to the last digit.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files.digests import cache_directory
from ..checkpoint.files.operations import delete, touch
from ..checkpoint.files.partials import clear_partials
from ..checkpoint.files.safetensors_file import load_metadata, load_tensors, save_tensors, tensor_bytes
from ..checkpoint.source.checkpoint import TensorSource
from ..errors import BpwiseWarning, ConfigError, FormatError, WorkDirectoryError
from ..version import __version__

__all__ = ["OriginalCache", "OriginalState", "default_cache_directory", "original_key"]

_VERSION = 3
_SUFFIX = ".original.safetensors"

_LIMIT_BYTES = 10 * 2**30
"""Room that a cache takes at most: some dozens of evaluations of an 8B model."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OriginalState:
    """What the original's passes give.

    Attributes:
        hidden: Output of the last block, shape (rows, tokens, hidden size), evaluation dtype, on the CPU.
        floor_nats: Mean KL divergence per token that arithmetic alone causes.
        bfloat16_nats: Mean KL divergence per token that running it in bfloat16 instead of float32 causes.
        floor_tokens: Length of the text that these two were measured on.
        trace: Hidden states at ``watched_positions`` after the embeddings and after each block, shape
            (blocks + 1, rows, positions, hidden size), evaluation dtype, on the CPU.
        domains: As ``hidden``, of the documents of each domain.
    """

    hidden: Tensor
    floor_nats: float
    bfloat16_nats: float
    floor_tokens: int
    trace: Tensor
    domains: tuple[Tensor, ...] = ()


class OriginalCache:
    """A directory of such states, each a file that is there completely or not at all.

    A file that is damaged in any way is taken for absent. If there is no room, or the directory cannot be written,
    a warning says so and evaluation goes on. Beyond 10 GiB the files that were used least recently go.
    """

    def __init__(self, directory: Path) -> None:
        """Touches nothing.

        Args:
            directory: Made when something is saved.
        """
        self._directory = Path(directory)

    def load(self, key: str) -> OriginalState | None:
        """Return what was saved under a key, or None if that is absent or damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            metadata = load_metadata(path, FormatError)
            tensors = load_tensors(path, FormatError)
            state = OriginalState(
                hidden=tensors["hidden"],
                trace=tensors["trace"],
                domains=tuple(tensors[f"domain.{number}"] for number in range(len(tensors) - 2)),
                floor_nats=float.fromhex(metadata["floor_nats"]),
                bfloat16_nats=float.fromhex(metadata["bfloat16_nats"]),
                floor_tokens=int(metadata["floor_tokens"]),
            )
            if metadata.get("digest") != _digest(key, state):
                return None
        except (FormatError, KeyError, ValueError, OverflowError, OSError):
            return None
        with suppress(OSError):  # one that may only be read serves as well
            touch(path)
        return state

    def save(self, key: str, state: OriginalState) -> None:
        """Keep a state under a key; whatever was there is replaced."""
        metadata = {
            "floor_nats": state.floor_nats.hex(),
            "bfloat16_nats": state.bfloat16_nats.hex(),
            "floor_tokens": str(state.floor_tokens),
            "digest": _digest(key, state),
        }
        try:
            domains = {f"domain.{number}": each for number, each in enumerate(state.domains)}
            save_tensors(self._path(key), {"hidden": state.hidden, "trace": state.trace, **domains}, metadata)
            self._prune()
        except (WorkDirectoryError, OSError) as error:
            warnings.warn(
                f"the original's evaluation is not kept for the next time: {error}", BpwiseWarning, stacklevel=2
            )

    def _prune(self) -> None:
        clear_partials(self._directory)
        kept = sorted(
            ((status.st_mtime_ns, status.st_size, path) for path, status in self._files()),
            reverse=True,
        )
        total = 0
        for number, (_, size, path) in enumerate(kept):
            total += size
            if total > _LIMIT_BYTES and number > 0:
                delete(path, missing_ok=True)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        return [(path, path.stat()) for path in self._directory.glob(f"*{_SUFFIX}")]

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{_SUFFIX}"


def default_cache_directory() -> Path:
    """Return where a user's caches lie; see ``cache_directory``.

    Raises:
        ConfigError: The user has no home directory, as in some containers.
    """
    try:
        return cache_directory()
    except RuntimeError as cause:
        raise ConfigError(
            "cache: there is no home directory to keep the original's evaluation in. Give --cache-dir or --no-cache."
        ) from cause


def original_key(source: TensorSource, texts: Sequence[Tensor], *, dtype: torch.dtype, device: str) -> str:
    """Return 32 hexadecimal digits that change with everything that the states depend on.

    Args:
        source: The original.
        texts: Token ids of the rows, then of each domain, int64, shape (rows, tokens).
        dtype: What it runs in.
        device: Name of what it runs on.
    """
    import transformers  # noqa: PLC0415 - seconds to import, and loaded by the run anyway

    parts = [
        str(_VERSION),
        __version__,
        torch.__version__,
        transformers.__version__,
        source.fingerprint,
        str(dtype),
        device,
        *(str(tuple(tokens.shape)) for tokens in texts),
    ]
    digest = hashlib.sha256("\n".join(parts).encode())
    for tokens in texts:
        digest.update(tokens.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()[:32]


def _digest(key: str, state: OriginalState) -> str:
    numbers = f"{state.floor_nats.hex()} {state.bfloat16_nats.hex()} {state.floor_tokens}"
    digest = hashlib.sha256(f"{key} {numbers}\n".encode())
    for tensor in (state.hidden, state.trace, *state.domains):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
