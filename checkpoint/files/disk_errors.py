"""Refusals of the system, as errors that name the file and say what to do: a full disk, a path, rights."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...errors import BpwiseError, DiskFullError, WorkDirectoryError
from . import operations

__all__ = ["DISK_FULL", "delete_file", "explained", "explained_reading", "require_room", "require_rooms", "shown"]

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where there is no room: on the disk, in a quota, or under a limit on the size of files."""

_WRITING = DISK_FULL | {errno.EROFS}
"""What only writing can meet, so that it needs no name of a file to tell whose error it is."""


def require_room(path: Path, size_bytes: int) -> None:
    """Refuse a disk that has too little room for what is to be made, before the work that makes it.

    Args:
        path: The file or directory to make.
        size_bytes: The least that it will take.

    Raises:
        DiskFullError: The disk has less free.
    """
    with explained(path):
        free = shutil.disk_usage(next(each for each in Path(path).absolute().parents if each.exists())).free
    if free < size_bytes:
        raise DiskFullError(
            f"{shown(path)}: will take {size_bytes} bytes, but its disk has {free} free. Free some space there, or "
            "choose a path on another disk.",
            path,
        )


def require_rooms(sizes: Mapping[Path, int]) -> None:
    """Refuse disks that have too little room for all that is to be made on them together.

    Args:
        sizes: The least bytes of each file or directory to make, by its path.

    Raises:
        DiskFullError: A disk has less free.
    """
    disks: dict[int, dict[Path, int]] = {}
    for path, size in sizes.items():
        place = path / "*" if path.is_dir() else path
        with explained(path):
            existing = next(each for each in place.absolute().parents if each.exists())
            disks.setdefault(existing.stat().st_dev, {})[place] = size
    for made in disks.values():
        require_room(_together(made), sum(made.values()))


def _together(paths: Iterable[Path]) -> Path:
    several = list(paths)
    if len(several) == 1:
        return several[0]
    return Path(os.path.commonpath([path.absolute().parent for path in several])) / "*"


def shown(path: Path) -> str:
    """Return a path as messages can hold it: bytes that are no UTF-8 and control characters escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(path))


@contextmanager
def explained(path: Path, *, body_of: Path | None = None) -> Iterator[None]:
    """Turn what the system refuses into an error that names the target, not a temporary file.

    Args:
        path: What is to be made.
        body_of: The temporary file or directory that stands for it, where other files are worked with too: what does
            not concern it stays as it is.

    Raises:
        DiskFullError: The disk is full.
        WorkDirectoryError: The place cannot be written.
    """
    try:
        yield
    except (ValueError, RuntimeError) as cause:  # a NUL, half of a surrogate pair; before Python 3.13, a loop of links
        if body_of is not None:
            raise
        raise WorkDirectoryError(f"{shown(path)}: not a valid path ({cause}). Choose another one.") from cause
    except OSError as cause:
        if body_of is not None and cause.errno not in _WRITING and not _concerns(cause, body_of):
            raise
        if cause.errno in DISK_FULL:
            raise DiskFullError(
                f"{shown(path)}: not written, the disk is full ({cause.strerror}). Free some space there, or "
                "choose a path on another disk, and run again.",
                path,
            ) from cause
        raise WorkDirectoryError(
            f"{shown(path)}: cannot be written ({cause.strerror or cause}). Choose a path that you may write to."
        ) from cause


@contextmanager
def explained_reading(
    path: Path, error: type[BpwiseError], *, advice: str = "Check that it exists and is readable."
) -> Iterator[None]:
    """Turn what the system refuses while a file is read into an error that names it.

    Args:
        path: The file.
        error: What to raise.
        advice: The last sentence of the message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``.
    """
    try:
        yield
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}). {advice}") from cause


def delete_file(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        WorkDirectoryError: It cannot be deleted.
    """
    try:
        operations.delete(path, missing_ok=True)
    except OSError as cause:
        raise WorkDirectoryError(f"{path}: cannot be deleted ({cause.strerror}). Delete it by hand.") from cause


def _concerns(cause: OSError, temporary: Path) -> bool:
    names = [Path(os.fsdecode(name)) for name in (cause.filename, cause.filename2) if isinstance(name, str | bytes)]
    return any(name == temporary or temporary in name.parents for name in names)
