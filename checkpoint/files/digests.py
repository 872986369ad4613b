"""Digests of whole files, remembered for as long as the files stay as they are.

A digest is found again by the file's real path, and holds while inode, size, mtime and ctime (in nanoseconds) are the
same. So a change is noticed after writing in place, after a rename over the file, and where a tool sets mtime back to
what it was (``cp -p``, ``rsync -t``, ``touch -r``): no tool can set ctime, and a new file has another inode. Files that
changed less than two seconds before they were read are not remembered: a second change could carry the same times.

What is not noticed: a change that keeps the size and sets mtime back, on a file system without a ctime of its own (FAT,
some network disks and FUSE); and blocks that change below the file system, as on a failing disk. Delete
``~/.cache/bpwise`` to have everything read again.

The digests lie in one small file in the user's cache directory. Without it, or where it is damaged or cannot be
written, files are read each time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Annotated

import msgspec

from ...errors import BpwiseError, FormatError, WorkDirectoryError
from ...progress import Progress, silent
from .atomic import write_json
from .disk_errors import explained_reading
from .schemas import read_schema

__all__ = ["cache_directory", "file_digests"]

_CHUNK_BYTES = 64 << 20
"""What one thread reads in a row: long for a spinning disk, short enough for one file to keep all cores busy."""

_READ_BYTES = 1 << 20
_SHOWN_PIECES = 32
"""Fewer take a few seconds."""

_SETTLED_NANOSECONDS = 2_000_000_000
"""The coarsest clock of a file system in use, FAT's."""

_CACHE_NAME = "file-digests.json"
_MOST_REMEMBERED = 4096
_MOST_CACHE_BYTES = 16 << 20


class _Remembered(msgspec.Struct):
    state: list[int]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Cache(msgspec.Struct):
    files: dict[str, _Remembered]


def cache_directory() -> Path:
    """Return where a user's caches lie, as XDG's base directories say: ``~/.cache/bpwise`` unless that was moved.

    Raises:
        RuntimeError: The user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpwise"


def file_digests(paths: Sequence[Path], error: type[BpwiseError], progress: Progress = silent) -> list[str]:
    """Return a digest of the whole content of each file; those that are not remembered are read, by all cores.

    A digest is the SHA-256 of the SHA-256 digests of the file's pieces of 64 MiB. SHA-256 is the fastest of the strong
    functions in Python's hashlib on processors that have instructions for it, and in threads it keeps up with a disk.

    Args:
        paths: The files.
        error: What to raise.
        progress: Wraps the pieces that are read, where they are more than some 2 GiB.

    Returns:
        Of each, 64 hexadecimal digits.

    Raises:
        BpwiseError: As the type given by ``error``: a file cannot be read, or changes while it is read.
    """
    settled_before = time.time_ns() - _SETTLED_NANOSECONDS
    known = _load()
    keys = [str(path.resolve()) for path in paths]
    states = [_state(path, error) for path in paths]
    found = {
        key: known[key].sha256
        for key, state in zip(keys, states, strict=True)
        if key in known and known[key].state == state
    }
    unread = {key: (path, state) for key, path, state in zip(keys, paths, states, strict=True) if key not in found}
    if unread:
        found |= _read(unread, error, progress)
        new = {
            key: _Remembered(state, found[key])
            for key, (_, state) in unread.items()
            if max(state[-2:]) < settled_before
        }
        if new:
            _save({key: each for key, each in known.items() if key not in new} | new)
    return [found[key] for key in keys]


def _state(path: Path, error: type[BpwiseError]) -> list[int]:
    with explained_reading(path, error):
        status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(files: dict[str, tuple[Path, list[int]]], error: type[BpwiseError], progress: Progress) -> dict[str, str]:
    digests = {key: hashlib.sha256() for key in files}
    chunks = [
        (key, path, start) for key, (path, state) in files.items() for start in range(0, state[1] or 1, _CHUNK_BYTES)
    ]
    keys, sources, starts = zip(*chunks, strict=True)
    shown = progress if len(chunks) > _SHOWN_PIECES else silent
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = pool.map(_chunk_digest, sources, starts, repeat(error))
        for key, digest in zip(shown(keys, "read: weights"), made, strict=True):
            digests[key].update(digest)
    for path, state in files.values():
        if _state(path, error) != state:
            raise error(f"{path}: changed while it was read. Leave the file alone and run again.")
    return {key: digest.hexdigest() for key, digest in digests.items()}


def _chunk_digest(path: Path, start: int, error: type[BpwiseError]) -> bytes:
    digest, left = hashlib.sha256(), _CHUNK_BYTES
    piece = memoryview(bytearray(_READ_BYTES))
    with explained_reading(path, error, advice="Check the disk."), path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(piece[:left])):
            digest.update(piece[:count])
            left -= count
    return digest.digest()


def _cache_file() -> Path | None:
    try:
        return cache_directory() / _CACHE_NAME
    except RuntimeError:
        return None


def _load() -> dict[str, _Remembered]:
    path = _cache_file()
    try:
        if path is None or not path.is_file() or path.stat().st_size > _MOST_CACHE_BYTES:
            return {}
        return read_schema(path, _Cache, FormatError).files
    except (OSError, FormatError):
        return {}


def _save(known: dict[str, _Remembered]) -> None:
    path = _cache_file()
    if path is None:
        return
    latest = dict(list(known.items())[-_MOST_REMEMBERED:])
    with suppress(WorkDirectoryError, OSError):
        write_json(path, msgspec.to_builtins(_Cache(latest)))
