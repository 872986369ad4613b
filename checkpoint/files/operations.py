"""Operations that change files and directories: everything that is written goes through here, and nothing else does.

Each is one call of the operating system, or a row of them, so that what a crash can leave behind is known: between two
of these, or half-way through a write. Reading needs none of them. Other programs and libraries (llama.cpp's converter,
lock files, the Hub's cache) write by themselves: into places that are hidden until ``sync`` and ``replace`` here
make them whole, or that no result is read from.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

__all__ = [
    "append",
    "copy",
    "create",
    "delete",
    "delete_directory",
    "delete_tree",
    "link",
    "make_directory",
    "replace",
    "sync",
    "touch",
    "unnamed",
    "write",
]

_COPIED_BYTES = 1 << 20


class _File(io.FileIO):
    """A file whose errors name it, as those of other operations do."""

    def write(self, data: Any) -> int:
        with _naming(self.name):
            return os.write(self.fileno(), data)


def create(path: Path) -> BinaryIO:
    """Open a file for writing; one that exists is emptied."""
    return io.BufferedWriter(_File(path, "wb", opener=_opened))


def append(path: Path) -> BinaryIO:
    """Open a file for writing at its end; one that is missing is made."""
    return io.BufferedWriter(_File(path, "ab", opener=_opened))


def unnamed(directory: Path | None = None, *, size_bytes: int = 0) -> BinaryIO:
    """Open a file for reading and writing that has no name, so that nothing of it outlives the process.

    Args:
        directory: Whose disk it takes room on; None for the system's temporary one.
        size_bytes: Its length. The room is taken at once where that is possible: without any, a page of it that is
            mapped and touched would end the process.
    """
    file = cast("BinaryIO", tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - whoever asks closes it
    try:
        with _naming(directory):
            if size_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                file.truncate(size_bytes)
    except BaseException:
        file.close()
        raise
    return file


def write(path: Path, data: bytes) -> None:
    """Make or empty a file, and write all of it."""
    with create(path) as file:
        file.write(data)


def copy(source: Path, target: Path) -> None:
    """Make or empty a file, and write the content of another into it; a link is followed."""
    with source.open("rb") as read, create(target) as file:
        while data := read.read(_COPIED_BYTES):
            file.write(data)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory, and needs no such flush.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, target: Path) -> None:
    """Rename a file or a directory; a file of the new name, or an empty directory, is gone in the same step."""
    os.replace(path, target)


def link(path: Path, target: Path) -> None:
    """Make a symbolic link at ``path`` that leads to ``target``."""
    os.symlink(target, path)


def touch(path: Path) -> None:
    """Say of a file that it was used now."""
    os.utime(path)


def delete(path: Path, *, missing_ok: bool = False) -> None:
    """Delete a file or a link."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def make_directory(path: Path, *, parents: bool = False, exist_ok: bool = False) -> None:
    """Make a directory; its name is on the disk afterwards, so that what is synchronised in it can be found.

    Args:
        path: The directory.
        parents: Whether missing directories above it are made, too.
        exist_ok: Whether it may be there.
    """
    try:
        os.mkdir(path)
    except FileNotFoundError:
        if not parents or path.parent == path:
            raise
        make_directory(path.parent, parents=True, exist_ok=True)
        make_directory(path, exist_ok=exist_ok)
        return
    except OSError:  # as pathlib: which error a directory gives that is there depends on the system
        if not exist_ok or not path.is_dir():
            raise
        return
    with suppress(OSError):  # a parent that may be written and not read
        sync(path.parent)


def delete_directory(path: Path) -> None:
    """Delete an empty directory."""
    os.rmdir(path)


def delete_tree(path: Path) -> None:
    """Delete a directory with all in it; what cannot be deleted stays, and is no error."""
    with suppress(OSError):
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                delete_tree(entry)
            else:
                with suppress(OSError):
                    os.unlink(entry)
    with suppress(OSError):
        os.rmdir(path)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags, 0o666)


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    # The system's errors at descriptors do not say which file it is.
    try:
        yield
    except OSError as cause:
        if cause.filename is None and path is not None:
            cause.filename = os.fspath(path)
        raise
