"""Work directories: a stage keeps every finished piece on disk, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import BpwiseWarning, BrokenModelError, WorkDirectoryError, printable
from .files import write_json
from .safetensors_file import HeaderEntry, NewTensor, load_tensors, read_entry, read_header, save_tensors

__all__ = ["StageDirectory", "claimed", "discard_stages", "stages_in"]

_CHECKSUM = "checksum"
_READ_BYTES = 16 << 20


class StageDirectory:
    """The finished pieces of one stage of one run.

    The directory's name ends in a digest of everything that the pieces depend on (model, calibration, options), so
    pieces of different runs never mix, and the same run finds its own again. Pieces are complete files only, with a
    checksum: one that is damaged counts as not finished, and is made again.

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
        self._intact: set[str] = set()
        self.path = _path(work, stage, identity)
        if not (self.path / "identity.json").exists():
            write_json(self.path / "identity.json", dict(identity))

    @classmethod
    def existing(cls, work: Path, stage: str, identity: Mapping[str, Any]) -> StageDirectory | None:
        """Return the directory of a stage that has begun, None where there is none."""
        return cls(work, stage, identity) if _path(work, stage, identity).exists() else None

    def has(self, piece: str) -> bool:
        """Whether a piece is finished and undamaged; one that another process wrote is read for that, once.

        Raises:
            WorkDirectoryError: It is damaged, and cannot be deleted.
        """
        if piece in self._intact:
            return True
        file = self._file(piece)
        if not file.exists():
            return False
        if not _is_intact(file, piece):
            warnings.warn(f"{printable(str(file))}: damaged. It is made again now.", BpwiseWarning, stacklevel=2)
            self.discard(piece)
            return False
        self._intact.add(piece)
        return True

    def save(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a piece: it is there completely or not at all."""
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        parts = {name: [tensor.reshape(-1).view(torch.uint8).numpy().data] for name, tensor in here.items()}
        described = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in here.items()}
        save_tensors(self._file(piece), here, {_CHECKSUM: _checksum(piece, described, parts)})
        self._intact.add(piece)

    def load(self, piece: str, new: NewTensor = torch.empty) -> dict[str, Tensor]:
        """Return the tensors of a finished piece, each in what ``new`` made for it.

        Raises:
            WorkDirectoryError: It is missing or damaged.
        """
        if not self.has(piece):
            raise WorkDirectoryError(
                f"{self._file(piece)}: missing or damaged. Delete {self.path} and run the same command again: what was "
                "in it is made anew."
            )
        return load_tensors(self._file(piece), WorkDirectoryError, new=new)

    def number(self, piece: str, name: str) -> float | None:
        """Return a number that a finished piece keeps under a name, None if there is none; reads nothing else of it."""
        entry = read_header(self._file(piece), WorkDirectoryError).entries.get(name)
        return None if entry is None else float(read_entry(self._file(piece), entry, WorkDirectoryError))

    def discard(self, piece: str) -> None:
        """Let a piece go that no later step needs.

        Raises:
            WorkDirectoryError: It cannot be deleted.
        """
        self._intact.discard(piece)
        try:
            self._file(piece).unlink(missing_ok=True)
        except OSError as error:
            raise WorkDirectoryError(
                f"{self._file(piece)}: cannot be deleted ({error.strerror}). Delete it by hand."
            ) from error

    def _file(self, piece: str) -> Path:
        return self.path / f"{piece}.safetensors"


def _path(work: Path, stage: str, identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"{stage}-{digest}"


def _is_intact(file: Path, piece: str) -> bool:
    try:
        header = read_header(file, WorkDirectoryError)
        described = {name: f"{entry.dtype} {entry.shape}" for name, entry in header.entries.items()}
        parts = {name: _stored_bytes(file, entry) for name, entry in header.entries.items()}
        return header.metadata.get(_CHECKSUM) == _checksum(piece, described, parts)
    except (WorkDirectoryError, OSError):
        return False


def _checksum(piece: str, described: Mapping[str, str], parts: Mapping[str, Iterable[bytes | memoryview]]) -> str:
    # CRC-32 of everything, the piece's name too: it tells damage, at several GB a second; nobody forges pieces.
    total = zlib.crc32(piece.encode())
    for name in sorted(described):
        own = zlib.crc32(f"{name} {described[name]}".encode())
        for part in parts[name]:
            own = zlib.crc32(part, own)
        total = zlib.crc32(own.to_bytes(4, "little"), total)
    return f"{total:08x}"


def _stored_bytes(path: Path, entry: HeaderEntry) -> Iterator[bytes]:
    # A tensor's data, a part at a time: states of all rows are as large as memory may be.
    with path.open("rb") as file:
        file.seek(entry.offset_bytes)
        for first in range(0, entry.size_bytes, _READ_BYTES):
            yield file.read(min(_READ_BYTES, entry.size_bytes - first))


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
