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
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import BrokenModelError, FormatError, WorkDirectoryError
from .files import write_json
from .safetensors_file import NewTensor, load_tensors, read_entry, read_header, save_tensors

__all__ = ["StageDirectory", "claimed", "discard_stages", "stages_in"]


class StageDirectory:
    """The finished pieces of one stage of one run.

    The directory's name ends in a digest of everything that the pieces depend on (model, calibration, options), so
    pieces of different runs never mix, and the same run finds its own again. Pieces are complete files only.

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
        if not (self.path / "identity.json").exists():
            write_json(self.path / "identity.json", dict(identity))

    @classmethod
    def existing(cls, work: Path, stage: str, identity: Mapping[str, Any]) -> StageDirectory | None:
        """Return the directory of a stage that has begun, None where there is none."""
        return cls(work, stage, identity) if _path(work, stage, identity).exists() else None

    def has(self, piece: str) -> bool:
        """Whether a piece is finished."""
        return self._file(piece).exists()

    def save(self, piece: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep a piece: it is there completely or not at all."""
        save_tensors(self._file(piece), tensors, metadata)

    def load(self, piece: str, new: NewTensor = torch.empty) -> dict[str, Tensor]:
        """Return the tensors of a finished piece, each in what ``new`` made for it."""
        return load_tensors(self._file(piece), new=new)

    def number(self, piece: str, name: str) -> float | None:
        """Return a number that a finished piece keeps under a name, None if there is none; reads nothing else of it."""
        entry = read_header(self._file(piece), FormatError).entries.get(name)
        return None if entry is None else float(read_entry(self._file(piece), entry, FormatError))

    def discard(self, piece: str) -> None:
        """Let a piece go that no later step needs."""
        self._file(piece).unlink(missing_ok=True)

    def _file(self, piece: str) -> Path:
        return self.path / f"{piece}.safetensors"


def _path(work: Path, stage: str, identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"{stage}-{digest}"


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Keep a work directory to one run; it goes afterwards if nothing is left in it.

    The operating system lets go of the claim when the process ends, however it does.

    Raises:
        WorkDirectoryError: Another run works there, or the directory cannot be made.
    """
    lock = FileLock(work / ".lock", timeout=0)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise WorkDirectoryError(
            f"{work}: another run is at work there. Wait until it has ended, or name another --work-dir."
        ) from error
    except OSError as error:
        raise WorkDirectoryError(
            f"{work}: cannot be used as a work directory ({error.strerror}). Name another --work-dir."
        ) from error
    try:
        yield
    finally:
        (work / ".lock").unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            work.rmdir()


def discard_stages(work: Path) -> None:
    """Delete all stage directories of a run that is complete; files beside them (measurement, plan) stay."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def stages_in(work: Path) -> Iterator[None]:
    """Claim a work directory for stages; what they keep in it goes at the end, unless the run is cut off.

    Args:
        work: The directory.

    Raises:
        BpwiseError: As ``claimed``.
    """
    with claimed(work):
        try:
            yield
        except BrokenModelError:  # nothing is left to go on with
            discard_stages(work)
            raise
        discard_stages(work)
