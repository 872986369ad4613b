"""Atomic writing: a file or a directory is there completely, or not at all.

Everything is built under a hidden temporary name next to its target, flushed to the disk and renamed into
place. A run that is killed leaves at most a ``.NAME.partial-...`` behind, which nothing loads, and which the next run
that makes the same output takes away; where no lock tells that it is nobody else's, an hour later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import NumericalError, WorkDirectoryError
from . import operations
from .disk_errors import explained, shown
from .partials import MOVING, clear_partials, sibling, take_back

__all__ = [
    "atomic_directory",
    "atomic_file",
    "in_directory",
    "private_directory",
    "remove_directory",
    "try_file",
    "write_json",
    "write_text",
]

_PROBE_BYTES = 4096
_TRIES = 20


@contextmanager
def atomic_file(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces ``path`` in one step.

    Missing parent directories are made. An existing file is replaced, and stays untouched if the body raises.

    Args:
        path: The file to make.
        new: Whether a file that exists is in the way (looked at before and after the body), not replaced.

    Yields:
        A hidden sibling of ``path`` that does not exist yet; the body must create it and close it.

    Raises:
        WorkDirectoryError: ``path`` is a directory or a device, or in the way; the disk is full, or the place cannot be
            written.
    """
    path = Path(path)
    temporary = sibling(path)
    _begin(path, temporary, new=new)
    try:
        with explained(path, body_of=temporary):
            yield temporary
        assert temporary.is_file(), f"{path}: the body wrote nothing"
        with explained(path):
            _refuse_in_the_way(path, new=new)
            operations.sync(temporary)
            operations.replace(temporary, path)
            operations.sync(path.parent)
    except BaseException:  # Ctrl-C too: whatever ends the body, no partial file stays behind.
        with suppress(OSError):
            operations.delete(temporary)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; on success it becomes ``path`` in one step.

    Missing parent directories are made. A symbolic link is followed, so the result stands where it points. An empty
    directory that exists is not replaced but filled, ``config.json`` last: it may be where a disk is mounted, or the
    current directory of a shell.

    Args:
        path: The directory to make: it must not exist, or be an empty directory.

    Yields:
        An existing, empty, hidden directory beside ``path``, or in it if that exists.

    Raises:
        WorkDirectoryError: ``path`` is a file or a directory with something in it (looked at before and after
            the body), the disk is full, or the place cannot be written.
    """
    path = Path(path)
    _refuse_occupied(path)
    with explained(path):
        target = path.resolve()
        filled = target.is_dir()
        temporary = sibling(target / target.name if filled else target)
        operations.make_directory(temporary, parents=True)
    try:
        with explained(path, body_of=temporary):
            yield temporary
        _refuse_occupied(path, but=temporary.name)
        with explained(path):
            _sync_tree(temporary)
            if filled:
                _move_up(temporary, target)
            else:
                operations.replace(temporary, target)
            operations.sync(target.parent)
    except BaseException:  # Ctrl-C too: whatever ends the body, no partial directory stays behind.
        operations.delete_tree(temporary)
        raise


@contextmanager
def private_directory(path: Path) -> Iterator[Path]:
    """Yield an empty hidden directory beside ``path``, for files that help to make it; it goes when the body ends.

    Args:
        path: The file that is being made; missing parent directories are made.

    Raises:
        WorkDirectoryError: The place cannot be written, or the disk is full.
    """
    directory = sibling(Path(path))
    with explained(path):
        operations.make_directory(directory, parents=True)
    try:
        with explained(path, body_of=directory):
            yield directory
    finally:
        operations.delete_tree(directory)


def remove_directory(path: Path) -> None:
    """Delete a directory with all in it, at once: it loses its name first, and what a killed run leaves has none.

    Args:
        path: The directory. What cannot be deleted stays, and is no error.
    """
    hidden = sibling(path)
    with suppress(OSError):
        operations.replace(path, hidden)
        operations.delete_tree(hidden)


def try_file(path: Path, *, name: Path | None = None) -> None:
    """Refuse a place where no file can be made, before any long work; nothing is left there, nor of killed runs.

    Args:
        path: The file that is to be made later. One that exists stays as it is.
        name: What to call the place; None for ``path``.

    Raises:
        WorkDirectoryError: As ``atomic_file``.
    """
    path = Path(path)
    with explained(name or path):
        missing = [each for each in path.parents if not each.exists()]
    try:
        _begin(path, sibling(path), name=name, data=bytes(_PROBE_BYTES))
    finally:
        for directory in missing:
            with suppress(OSError):
                operations.delete_directory(directory)


def in_directory(directory: Path, do: Callable[[], object]) -> None:
    """Do something in a directory, which is made first; again where another run that only tried it took it away.

    Args:
        directory: The directory; missing ones above it are made, too.
        do: What makes an entry in it.

    Raises:
        OSError: It cannot be made, or what ``do`` raises.
    """
    for left in reversed(range(_TRIES)):
        try:
            operations.make_directory(directory, parents=True, exist_ok=True)
            do()
            return
        except FileNotFoundError:
            if not left:
                raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically: indented by 1, keys in their order, a newline at the end.

    Args:
        path: The file to make or replace.
        value: Anything that ``json`` can write.

    Raises:
        NumericalError: ``value`` holds a NaN or an infinity, which JSON has no name for.
        WorkDirectoryError: The file cannot be written.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as cause:
        raise NumericalError(
            f"{path}: not written. Expected finite numbers only ({cause}). The computation before it went wrong."
        ) from cause
    with atomic_file(path) as temporary:
        operations.write(temporary, f"{text}\n".encode())


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    Args:
        path: The file to make or replace.
        text: Any text: of names that came from outside, halves of surrogate pairs are written as escapes.

    Raises:
        WorkDirectoryError: The file cannot be written.
    """
    with atomic_file(path) as temporary:
        operations.write(temporary, text.encode("utf-8", "backslashreplace"))


def _begin(path: Path, temporary: Path, *, new: bool = False, name: Path | None = None, data: bytes = b"") -> None:
    # A place that cannot be written shows here, under the target's name, and not in a body that does other things too.
    with explained(name or path):
        str(path).encode()  # reports and terminals show it
        _refuse_in_the_way(path, new=new)
        clear_partials(path.parent, {path.name}, locked=False)
        try:
            in_directory(path.parent, lambda: operations.write(temporary, data))
        except (FileExistsError, NotADirectoryError) as cause:
            raise WorkDirectoryError(
                f"{shown(name or path)}: cannot be written, a parent of it is not a directory. Choose another path."
            ) from cause
        finally:
            with suppress(OSError):
                operations.delete(temporary)


def _refuse_in_the_way(path: Path, *, new: bool) -> None:
    if path.is_dir():
        raise WorkDirectoryError(f"{shown(path)}: in the way. Got a directory. Expected a file. Choose another path.")
    if path.exists() and not path.is_file():
        raise WorkDirectoryError(
            f"{shown(path)}: in the way. Got a device or a pipe. Expected a file. Choose another path."
        )
    if new and path.exists():
        raise WorkDirectoryError(
            f"{shown(path)}: in the way. Got a file. Expected no such path. Remove it, or choose another path."
        )


def _move_up(temporary: Path, target: Path) -> None:
    # No loader takes a directory without config.json for a model. What is moved when a run is killed is named by the
    # list, so that it can be told from what is somebody else's.
    names = sorted((entry.name for entry in temporary.iterdir()), key=lambda name: (name == "config.json", name))
    operations.write(temporary / MOVING, json.dumps(names).encode())
    operations.sync(temporary / MOVING)
    operations.sync(temporary)
    try:
        for name in names[:-1]:
            operations.replace(temporary / name, target / name)
        operations.sync(target)
        for name in names[-1:]:
            operations.replace(temporary / name, target / name)
        operations.sync(target)
    except BaseException:
        take_back(temporary, target)
        raise
    operations.delete_tree(temporary)


def _refuse_occupied(path: Path, but: str = "") -> None:
    with explained(path):
        if path.is_dir():
            if any(entry.name != but for entry in path.iterdir()):
                raise WorkDirectoryError(
                    f"{shown(path)}: in the way. Got a directory with files in it. Expected none or an empty one. "
                    "Remove it, or choose another path."
                )
        elif path.exists():
            raise WorkDirectoryError(
                f"{shown(path)}: in the way. Got a file. Expected no such path. Choose another path."
            )


def _sync_tree(directory: Path) -> None:
    for entry in directory.rglob("*"):
        if not entry.is_symlink():
            operations.sync(entry)
    operations.sync(directory)
