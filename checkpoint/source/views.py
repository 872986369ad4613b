"""Models seen through a change: dequantized, merged with an adapter or under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...progress import Progress
from ..model.config import QUANTIZED_KEYS
from ..model.dtypes import FLOAT_DTYPES
from .checkpoint import Checkpoint, TensorInfo, TensorSource

__all__ = ["CheckpointView", "DequantizedView", "SourceView"]


class SourceView:
    """Another source as it is; what a view changes, its class overrides.

    Attributes:
        base: What is viewed.
    """

    def __init__(self, base: TensorSource) -> None:
        """Look at a source."""
        self.base = base

    @property
    def directory(self) -> Path:
        """Where ``config.json`` and the tokenizer's files are."""
        return self.base.directory

    @property
    def config(self) -> dict[str, Any]:
        """That of what is viewed; not to be modified."""
        return self.base.config

    @property
    def fingerprint(self) -> str:
        """That of what is viewed."""
        return self.base.fingerprint

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""
        return self.base.names

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding."""
        return self.base.tied_embeddings

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        return self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        return self.base.tensor(name)

    def entry(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first dimension."""
        return self.tensor(name)[index].clone()


class CheckpointView(Checkpoint):
    """Another checkpoint as it is; what a view changes, its class overrides. Views may lie on views.

    Names, shapes, dtypes and sizes are those of what is read; ``directory`` and the files in it are the base's.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Look at a checkpoint.

        Args:
            base: A directory's checkpoint, or a view of one.
        """
        self._base = base

    @property
    def directory(self) -> Path:
        """The base's model directory."""
        return self._base.directory

    @property
    def directories(self) -> tuple[Path, ...]:
        """All directories that the base is read from."""
        return self._base.directories

    @property
    def config(self) -> dict[str, Any]:
        """The base's ``config.json``; not to be modified."""
        return self._base.config

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""
        return self._base.names

    @property
    def fingerprint(self) -> str:
        """The base's fingerprint, for a view that follows from the base alone."""
        return self._base.fingerprint

    def prepare_fingerprint(self, progress: Progress) -> None:
        """Read what the base's fingerprint is made of, showing how far it is."""
        self._base.prepare_fingerprint(progress)

    @property
    def base(self) -> Checkpoint:
        """What is viewed."""
        return self._base

    @property
    def changes(self) -> dict[str, Any]:
        """What the base and this view change while reading."""
        return self._base.changes

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it is read, and the file that holds it."""
        return self._base.info(name)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor; see ``Checkpoint.tensor``."""
        return self._base.tensor(name)

    def entry(self, name: str, index: int) -> Tensor:
        """Load one entry of a tensor's first dimension; see ``Checkpoint.entry``."""
        return self.tensor(name)[index].clone()

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """Load one tensor, or one entry of its first dimension, as it lies in the base's file."""
        return self._base.stored(name, index)


class DequantizedView(CheckpointView):
    """A quantized checkpoint as the dense one that it stands for; weights get the dtype that config.json names."""

    _names: frozenset[str]

    @property
    def config(self) -> dict[str, Any]:
        """The base's config without what says that it is quantized."""
        config = {key: value for key, value in self._base.config.items() if key not in QUANTIZED_KEYS}
        if isinstance(config.get("text_config"), dict):
            text = config["text_config"].items()
            config["text_config"] = {key: value for key, value in text if key not in QUANTIZED_KEYS}
        return config

    @property
    def names(self) -> frozenset[str]:
        """Names of all dense tensors."""
        return self._names

    @property
    def _dtype(self) -> torch.dtype:
        named = self._base.config.get("dtype") or self._base.config.get("torch_dtype")
        return next((dtype for dtype in FLOAT_DTYPES if str(dtype) == f"torch.{named}"), torch.bfloat16)
