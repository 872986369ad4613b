"""Has mlx-lm load a model, and finds by their values which of the original's tensors each of its own is.

mlx-lm renames tensors, joins linears, stacks experts and leaves out what it does not run. No table of names is needed:
a tensor whose rows are those of linears, one after another, is made of these. What equals nothing (norms with one
added, convolutions that were turned) is kept as mlx-lm has it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.carry.program import last_line, run_program
from ....checkpoint.carry.staging import stage_tensors
from ....checkpoint.files.atomic import private_directory
from ....checkpoint.files.operations import make_directory
from ....checkpoint.files.resume import ResumeStore
from ....checkpoint.files.safetensors_file import HeaderEntry, read_entry, read_header, tensor_bytes
from ....checkpoint.source.checkpoint import Checkpoint
from ....checkpoint.source.language import LanguageModel
from ....errors import BpwiseError, CheckpointError, FormatError, install_command
from ....progress import Progress
from ..file.layout import Layout, StoredTensor, layout_from_json
from . import child
from .keys import published_keys

__all__ = ["STEP", "KeptModel", "is_installed", "layout_identity", "load_layout", "require_mlx_lm"]

STEP = "mlx"
"""Name of the step in the work directory that holds the layout."""

_ARTIFACT = "layout"
_LAYOUT, _KEPT = "layout", "kept."

_LEAST_SECONDS = 1800.0
_SLOWEST_BYTES_PER_SECOND = 2e6
"""Time after which mlx-lm counts as stuck: it takes seconds for a GB, and minutes from the slowest disks."""

_PACKAGES = ("mlx-lm", "mlx")


@dataclass(frozen=True, slots=True, eq=False)
class KeptModel:
    """A model as mlx-lm has it.

    Attributes:
        layout: All of its tensors.
        kept: Those that equal nothing of the original, by name.
    """

    layout: Layout
    kept: Mapping[str, Tensor]


def is_installed() -> bool:
    """Return whether MLX and mlx-lm are."""
    return "" not in _versions()


def require_mlx_lm() -> None:
    """Refuse to go on where mlx-lm is not installed.

    Raises:
        BpwiseError: It is not.
    """
    if not is_installed():
        raise BpwiseError(f"MLX: mlx-lm is not installed, which knows MLX's models. Run: {install_command('mlx')}.")


def layout_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all that a layout depends on, as ``ResumeStore`` takes it."""
    return {"model": checkpoint.fingerprint, **dict(zip(_PACKAGES, _versions(), strict=True))}


def load_layout(checkpoint: Checkpoint, source: LanguageModel, store: ResumeStore, progress: Progress) -> KeptModel:
    """Return a model as mlx-lm has it, from a resume store if it is there, and kept there otherwise.

    Args:
        checkpoint: The model. No code of it is run.
        source: Its language model.
        store: Where it is kept. While mlx-lm runs, a copy of the model lies beside it.
        progress: Wraps the tensors that are compared.

    Raises:
        BpwiseError: mlx-lm is not installed.
        CheckpointError: It does not load the model, or is stuck.
        WorkDirectoryError: The place cannot be written.
    """
    if not store.has(_ARTIFACT):
        kept = _loaded(checkpoint, source, store.path / _ARTIFACT, progress)
        text = json.dumps(kept.layout.to_json()).encode()
        tensors = {f"{_KEPT}{name}": tensor for name, tensor in kept.kept.items()}
        store.save(_ARTIFACT, {_LAYOUT: torch.tensor(list(text), dtype=torch.uint8), **tensors})
    found = store.load(_ARTIFACT)
    raw = json.loads(bytes(found[_LAYOUT].numpy()))
    layout = layout_from_json(raw, where=str(store.path), remedy="Run the same command again.")
    return KeptModel(layout, {x.removeprefix(_KEPT): found[x] for x in found if x.startswith(_KEPT)})


def _loaded(checkpoint: Checkpoint, source: LanguageModel, place: Path, progress: Progress) -> KeptModel:
    with private_directory(place) as private:
        staged = private / (checkpoint.directory.resolve().name or "model")
        converted = private / "converted"
        make_directory(staged)
        stage_tensors(checkpoint, {name: name for name in checkpoint.names}, staged)
        modules = _run(checkpoint, staged, converted)
        entries = {
            name: (path, entry)
            for path in sorted(converted.glob("model*.safetensors"))
            for name, entry in read_header(path, FormatError).entries.items()
        }
        return _compared(source, entries, modules, progress)


def _run(checkpoint: Checkpoint, staged: Path, converted: Path) -> tuple[str, ...]:
    # The names of the modules that can be quantized.
    config = json.dumps(published_keys(checkpoint.config))
    command = [sys.executable, child.__file__, str(staged.resolve()), str(converted.resolve()), config]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"}
    most_seconds = _LEAST_SECONDS + checkpoint.total_bytes / _SLOWEST_BYTES_PER_SECOND
    status, said = run_program(command, staged, {**os.environ, **offline}, most_seconds, "mlx-lm")
    if status == child.CANNOT_IMPORT:
        raise BpwiseError(f"MLX: mlx-lm cannot be imported ({last_line(said)}). Run: {install_command('mlx')}.")
    if status != 0:
        reason = f"ended by signal {-status}, as where memory is short" if status < 0 else last_line(said)
        raise CheckpointError(
            f"{checkpoint.directory}: mlx-lm does not load this model of type {checkpoint.config.get('model_type')!r} "
            f"({reason}). Look whether a newer mlx-lm supports it; code that comes with a model is not run."
        )
    names: list[str] = json.loads(said.decode("utf-8", "replace").strip().splitlines()[-1])
    return tuple(names)


def _compared(
    source: LanguageModel,
    entries: Mapping[str, tuple[Path, HeaderEntry]],
    modules: tuple[str, ...],
    progress: Progress,
) -> KeptModel:
    known = _Originals(source, progress)
    tensors: dict[str, StoredTensor] = {}
    kept: dict[str, Tensor] = {}
    for name in progress(sorted(entries), "convert: tensors"):
        path, entry = entries[name]
        values = read_entry(path, entry, FormatError)
        parts, equal = known.linears_in(name, values), None
        if not parts:
            equal = known.equal_to(name, values)
            if equal is None:
                kept[name] = values
        dtype = str(values.dtype).removeprefix("torch.")
        tensors[name] = StoredTensor(
            shape=entry.shape or (1,),
            dtype=dtype,
            linears=tuple(part.name for part in parts),
            outputs=tuple(part.outputs for part in parts),
            source=equal,
        )
    return KeptModel(Layout(tensors=tensors, modules=modules), kept)


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear of the original: its outputs, and the SHA-256 of the bytes of its first row and of the whole weight."""

    name: str
    outputs: int
    first: bytes
    digest: bytes


class _Originals:
    """The original's tensors by digest; in memory is one at a time."""

    def __init__(self, source: LanguageModel, progress: Progress) -> None:
        self._linears: dict[bytes, list[_Linear]] = {}
        self._others: dict[tuple[bytes, tuple[int, ...]], list[str]] = {}
        for name in progress(sorted(source.names), "convert: original"):
            tensor = source.tensor(name)
            digest = _digest(tensor)
            if name.endswith(".weight") and tensor.ndim == 2:
                linear = _Linear(name.removesuffix(".weight"), len(tensor), _digest(tensor[0]), digest)
                self._linears.setdefault(linear.first, []).append(linear)
            self._others.setdefault((digest, tuple(tensor.shape)), []).append(name)

    def linears_in(self, name: str, values: Tensor) -> tuple[_Linear, ...]:
        """Return the linears that a tensor is made of, each whole and taken once; none where it is not."""
        if values.ndim < 2:
            return ()
        rows = values.flatten(0, -2)
        taken: list[_Linear] = []
        first = 0
        while first < len(rows):
            found = next(self._fitting(name, rows, first, taken), None)
            if found is None:
                return ()
            taken.append(found)
            first += found.outputs
        for linear in taken:
            self._linears[linear.first].remove(linear)
        return tuple(taken)

    def _fitting(self, name: str, rows: Tensor, first: int, taken: list[_Linear]) -> Iterator[_Linear]:
        # Of several that are equal, as of experts that were copied, the one with the most of the name in common.
        alike = [each for each in self._linears.get(_digest(rows[first]), []) if each not in taken]
        for linear in sorted(alike, key=lambda each: -_common(name, each.name)):
            if _digest(rows[first : first + linear.outputs]) == linear.digest:
                yield linear

    def equal_to(self, name: str, values: Tensor) -> str | None:
        """Return the name of the tensor that has the same values in the same shape; None if there is none."""
        alike = self._others.get((_digest(values), tuple(values.shape)), [])
        return max(alike, key=lambda each: _common(name, each), default=None)


def _common(name: str, other: str) -> int:
    return len(set(name.split(".")) & set(other.split(".")))


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor_bytes(tensor)).digest()


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.append("")
    return found
