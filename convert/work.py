"""Work directories: a stage keeps every finished piece on disk, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BrokenModelError, FormatError, WorkDirectoryError
from .files import clear_partials, explained, read_json, shown, write_json
from .places import locked, named, try_directory
from .safetensors_file import NewTensor, load_tensors, save_tensors

__all__ = ["RunStages", "StageDirectory", "claimed", "discard_stage", "stages_in"]

_IDENTITY = "identity.json"
_SUFFIX = ".safetensors"


class StageDirectory:
    """The finished pieces of one stage of one run.

    The directory's name ends in a digest of everything that the pieces depend on (model, calibration, options), so
    pieces of different runs never mix, and the same run finds its own again. Pieces are complete files only. Some may
    have gone since they were made, as cleaners of temporary directories take what is oldest: whoever goes on looks.

    Attributes:
        path: The directory, ``WORK/STAGE-DIGEST``.
    """

    def __init__(self, work: Path, stage: str, identity: Mapping[str, Any]) -> None:
        """Open or make the directory.

        Args:
            work: The run's work directory.
            stage: Name of the stage.
            identity: Plain JSON: all that the pieces depend on. Kept in ``identity.json`` for people.

        Raises:
            WorkDirectoryError: The directory cannot be made.
        """
        self.path = _path(work, stage, identity)
        if not (self.path / _IDENTITY).exists():
            write_json(self.path / _IDENTITY, dict(identity))

    @classmethod
    def existing(cls, work: Path, stage: str, identity: Mapping[str, Any]) -> StageDirectory | None:
        """Return the directory of a stage that has begun, None where there is none."""
        return cls(work, stage, identity) if _path(work, stage, identity).exists() else None

    def has(self, piece: str) -> bool:
        """Whether a piece is finished."""
        return self._file(piece).exists()

    def save(self, piece: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep a piece: it is there completely or not at all.

        Raises:
            WorkDirectoryError: It cannot be written, or the directory has gone, and all earlier pieces with it.
        """
        if not (self.path / _IDENTITY).exists():
            raise WorkDirectoryError(
                f"{shown(self.path)}: the work directory has gone while it was in use. Run the same command again, "
                "with a --work-dir that nothing clears up."
            )
        save_tensors(self._file(piece), tensors, metadata)

    def load(self, piece: str, new: NewTensor = torch.empty) -> dict[str, Tensor]:
        """Return the tensors of a finished piece, each in what ``new`` made for it.

        Raises:
            WorkDirectoryError: It has gone, or is damaged. It is let go, so that the next run makes it again.
        """
        try:
            return load_tensors(self._file(piece), FormatError, new=new)
        except FormatError as cause:
            with suppress(OSError):
                self.discard(piece)
            raise WorkDirectoryError(
                f"{shown(self._file(piece))}: a piece of finished work has gone, or is damaged. Run the same command "
                "again: it makes what is missing."
            ) from cause

    def clear(self) -> None:
        """Let all pieces go."""
        for path in self.path.glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def discard(self, piece: str) -> None:
        """Let a piece go that no later step needs."""
        self._file(piece).unlink(missing_ok=True)

    def _file(self, piece: str) -> Path:
        return self.path / f"{piece}{_SUFFIX}"


def _path(work: Path, stage: str, identity: Mapping[str, Any]) -> Path:
    return work / f"{stage}-{_digest(identity)}"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Keep a work directory to one run; if the run made it, it goes afterwards if nothing is left in it.

    Raises:
        WorkDirectoryError: Another run works there, or files cannot be made in it.
        KeyboardInterrupt: As it comes, with a sentence on what is kept.
    """
    work = named(work)
    try_directory(work)
    emptied = _has_stages(work)
    with locked(work / ".lock", work, "name another --work-dir"):
        clear_partials(work)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.args = (f"The same command goes on where it stopped, from what is finished in {shown(work)}.",)
            raise
    if emptied:
        with suppress(OSError):
            work.rmdir()


class RunStages:
    """The stages of one run, which are let go when it is complete. Nothing else in the work directory is touched."""

    def __init__(self, work: Path) -> None:
        """Begin without any.

        Args:
            work: The run's work directory.
        """
        self._work = work
        self._stages: list[tuple[str, Mapping[str, Any]]] = []

    def add(self, stage: str, identity: Mapping[str, Any]) -> None:
        """Name a stage of the run, whether its directory was made now, by an earlier run that was cut off, or not."""
        self._stages.append((stage, identity))

    def discard(self) -> None:
        """Delete the directories of all stages."""
        for stage, identity in self._stages:
            discard_stage(self._work, stage, identity)


def discard_stage(work: Path, stage: str, identity: Mapping[str, Any]) -> None:
    """Delete the directory of a stage, if it is there and says itself that it is that.

    Args:
        work: The run's work directory.
        stage: Name of the stage.
        identity: As for ``StageDirectory``.
    """
    path = _path(work, stage, identity)
    if _carries_identity(path):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def stages_in(work: Path) -> Iterator[RunStages]:
    """Claim a work directory for a run; its stages go at the end, unless the run is cut off.

    Args:
        work: The directory.

    Yields:
        What the run names its stages to.

    Raises:
        BpwiseError: As ``claimed``.
    """
    with claimed(work):
        stages = RunStages(work)
        try:
            yield stages
        except BrokenModelError:  # nothing is left to go on with
            stages.discard()
            raise
        stages.discard()


def _has_stages(work: Path) -> bool:
    with explained(work):
        return work.is_dir() and any(map(_carries_identity, work.iterdir()))


def _carries_identity(path: Path) -> bool:
    # The name ends in the digest of what the file in it says: no other program's directory does.
    file = path / _IDENTITY
    if path.is_symlink() or not file.is_file():
        return False
    try:
        return path.name.endswith(f"-{_digest(read_json(file, WorkDirectoryError))}")
    except WorkDirectoryError:
        return False
