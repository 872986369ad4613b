"""Work directories: a step keeps every finished artifact on disk, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BpwiseWarning, BrokenModelError, BudgetError, WorkDirectoryError
from . import operations
from .atomic import remove_directory, write_json
from .disk_errors import delete_file, explained, shown
from .partials import clear_partials
from .paths import WORK_SUFFIX, locked, named, try_directory
from .safetensors_file import HeaderEntry, NewTensor, load_tensors, read_entry, read_header, save_tensors, tensor_bytes
from .schemas import read_json

__all__ = ["ResumeStore", "RunArtifacts", "discard_artifacts", "locked_work", "run_artifacts"]

_IDENTITY = "identity.json"
_SUFFIX = ".safetensors"

_CHECKSUM = "checksum"
_READ_BYTES = 16 << 20


class ResumeStore:
    """The finished artifacts of one step of one run.

    The directory's name ends in a digest of everything that the artifacts depend on (model, calibration, options), so
    artifacts of different runs never mix, and the same run finds its own again. They are complete files only, with a
    checksum: one that is damaged counts as not finished, and is made again. Some may have gone since they were made, as
    cleaners of temporary directories take what is oldest: whoever goes on looks.

    Attributes:
        path: The directory, ``WORK/STEP-DIGEST``.
    """

    def __init__(self, work: Path, step: str, identity: Mapping[str, Any]) -> None:
        """Open or make the directory.

        Args:
            work: The run's work directory.
            step: Name of the step.
            identity: Plain JSON: all that the artifacts depend on. Kept in ``identity.json`` for people.

        Raises:
            WorkDirectoryError: The directory cannot be made.
        """
        self._intact: set[str] = set()
        self.path = _path(work, step, identity)
        clear_partials(self.path)
        if not (self.path / _IDENTITY).exists():
            write_json(self.path / _IDENTITY, dict(identity))

    @classmethod
    def existing(cls, work: Path, step: str, identity: Mapping[str, Any]) -> ResumeStore | None:
        """Return the directory of a step that has begun, None where there is none."""
        return cls(work, step, identity) if _path(work, step, identity).exists() else None

    def has(self, artifact: str) -> bool:
        """Whether an artifact is finished and undamaged; one that another process wrote is read for that, once.

        Raises:
            WorkDirectoryError: It is damaged, and cannot be deleted.
        """
        file = self._file(artifact)
        if not file.exists():
            return False
        if artifact not in self._intact and not _is_intact(file, artifact):
            warnings.warn(f"{shown(file)}: damaged. It is made again now.", BpwiseWarning, stacklevel=2)
            self.discard(artifact)
            return False
        self._intact.add(artifact)
        return True

    def save(self, artifact: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an artifact: it is there completely or not at all.

        Raises:
            WorkDirectoryError: It cannot be written, or the directory has gone, and all earlier artifacts with it.
        """
        if not (self.path / _IDENTITY).exists():
            raise WorkDirectoryError(
                f"{shown(self.path)}: the work directory has gone while it was in use. Run the same command again, "
                "with a --work-dir that nothing clears up."
            )
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        parts = {name: [tensor_bytes(tensor)] for name, tensor in here.items()}
        described = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in here.items()}
        save_tensors(self._file(artifact), here, {_CHECKSUM: _checksum(artifact, described, parts)})
        self._intact.add(artifact)

    def load(self, artifact: str, new: NewTensor = torch.empty) -> dict[str, Tensor]:
        """Return the tensors of a finished artifact, each in what ``new`` made for it.

        Raises:
            WorkDirectoryError: It has gone, or is damaged. It is let go, so that the next run makes it again.
        """
        if self.has(artifact):
            try:
                return load_tensors(self._file(artifact), WorkDirectoryError, new=new)
            except WorkDirectoryError:  # it has changed since it was looked at
                self.discard(artifact)
        raise WorkDirectoryError(
            f"{shown(self._file(artifact))}: an artifact of finished work has gone, or is damaged. Run the same "
            "command again: it makes what is missing."
        )

    def number(self, artifact: str, name: str) -> float | None:
        """Return a number that an artifact keeps under a name, None if there is none; reads nothing else of it."""
        entry = read_header(self._file(artifact), WorkDirectoryError).entries.get(name)
        return None if entry is None else float(read_entry(self._file(artifact), entry, WorkDirectoryError))

    def discard(self, artifact: str) -> None:
        """Let an artifact go that no later step needs.

        Raises:
            WorkDirectoryError: It cannot be deleted.
        """
        self._intact.discard(artifact)
        delete_file(self._file(artifact))

    def _file(self, artifact: str) -> Path:
        return self.path / f"{artifact}{_SUFFIX}"


def _path(work: Path, step: str, identity: Mapping[str, Any]) -> Path:
    return work / f"{step}-{_digest(identity)}"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _is_intact(file: Path, artifact: str) -> bool:
    try:
        header = read_header(file, WorkDirectoryError)
        described = {name: f"{entry.dtype} {entry.shape}" for name, entry in header.entries.items()}
        parts = {name: _stored_bytes(file, entry) for name, entry in header.entries.items()}
        return header.metadata.get(_CHECKSUM) == _checksum(artifact, described, parts)
    except (WorkDirectoryError, OSError):
        return False


def _checksum(artifact: str, described: Mapping[str, str], parts: Mapping[str, Iterable[bytes | memoryview]]) -> str:
    # CRC-32 of everything, the artifact's name too: it tells damage, at several GB a second; nobody forges artifacts.
    total = zlib.crc32(artifact.encode())
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
def locked_work(work: Path) -> Iterator[None]:
    """Keep a work directory to one run; if a run made it, it goes afterwards if nothing is left in it.

    Raises:
        WorkDirectoryError: Another run works there, or files cannot be made in it.
        KeyboardInterrupt: As it comes, with a sentence on what is kept.
    """
    work = named(work)
    try_directory(work)
    lock = work / ".lock"
    # What a killed run leaves is made by it, even where nothing else is left in it.
    emptied = work.suffix == WORK_SUFFIX or lock.exists() or _has_steps(work)
    with locked(lock, work, "name another --work-dir"):
        clear_partials(work)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.args = (f"Run the same command to resume. Finished work is kept in {shown(work)}.",)
            raise
    if emptied:
        with suppress(OSError):
            operations.delete_directory(work)


class RunArtifacts:
    """The steps of one run, which are let go when it is complete. Nothing else in the work directory is touched."""

    def __init__(self, work: Path) -> None:
        """Begin without any.

        Args:
            work: The run's work directory.
        """
        self._work = work
        self._steps: list[tuple[str, Mapping[str, Any]]] = []
        self._earlier = set(work.iterdir())

    def add(self, step: str, identity: Mapping[str, Any]) -> None:
        """Name a step of the run, whether its directory was made now, by an earlier run that was cut off, or not."""
        self._steps.append((step, identity))

    def discard(self, *, earlier: bool = True) -> None:
        """Delete the directories of all steps; ``earlier``: also those that an earlier run has begun."""
        for step, identity in self._steps:
            if earlier or _path(self._work, step, identity) not in self._earlier:
                discard_artifacts(self._work, step, identity)


def discard_artifacts(work: Path, step: str, identity: Mapping[str, Any]) -> None:
    """Delete the directory of a step, if it is there and says itself that it is that.

    Args:
        work: The run's work directory.
        step: Name of the step.
        identity: As for ``ResumeStore``.
    """
    path = _path(work, step, identity)
    clear_partials(work, {path.name})
    if _carries_identity(path):
        remove_directory(path)


@contextmanager
def run_artifacts(work: Path) -> Iterator[RunArtifacts]:
    """Claim a work directory for a run; its steps go at the end, unless the run is cut off.

    Args:
        work: The directory.

    Yields:
        What the run names its steps to.

    Raises:
        BpwiseError: As ``locked_work``.
    """
    with locked_work(work):
        steps = RunArtifacts(work)
        try:
            yield steps
        except BrokenModelError:  # nothing is left to go on with
            steps.discard()
            raise
        except BudgetError:  # nothing is measured yet; what a run of another size has begun is its own
            steps.discard(earlier=False)
            raise
        steps.discard()


def _has_steps(work: Path) -> bool:
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
