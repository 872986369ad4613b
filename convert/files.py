"""Atomic writing: a file or a directory is there completely, or not at all.

Everything is built under a hidden temporary name next to its target, flushed to the disk and renamed into
place. A run that is killed leaves at most a ``.NAME.partial-...`` behind, which nothing loads.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec

from ..errors import BpwiseError, NumericalError, WorkDirectoryError

__all__ = [
    "Count",
    "NonNegative",
    "Number",
    "Positive",
    "atomic_directory",
    "atomic_file",
    "check_schema",
    "is_lfs_pointer",
    "parse_schema",
    "read_json",
    "read_schema",
    "require_room",
    "write_json",
    "write_text",
]

_LFS_START = b"version https://git-lfs.github.com/spec/v1"
_LFS_MOST_BYTES = 1024
"""Git LFS itself takes nothing larger for a pointer."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""In schemas: how many of something, 0 too."""

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
"""In schemas: a size, at least 1."""

NonNegative = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
"""In schemas: a number from 0 on, neither NaN nor infinite."""

Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""In schemas: a number, neither NaN nor infinite."""

_Schema = TypeVar("_Schema")

_REMEDY = "The file is damaged: make or get it again."

_EXPECTED = re.compile(r"Expected (.*?)(?:, got `(.*)`)?")

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces ``path`` in one step.

    Missing parent directories are made. An existing file is replaced, and stays untouched if the body raises.

    Args:
        path: The file to make.

    Yields:
        A hidden sibling of ``path`` that does not exist yet; the body must create it and close it.

    Raises:
        WorkDirectoryError: ``path`` is a directory, the disk is full, or the place cannot be written.
    """
    path = Path(path)
    temporary = _sibling(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise WorkDirectoryError(f"{path}: in the way, got a directory, expected a file. Choose another path.")
    try:
        with _explained(path, only=_DISK_FULL):
            yield temporary
        assert temporary.is_file(), f"{path}: the body wrote nothing"
        with _explained(path):
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    except BaseException:  # Ctrl-C too: whatever ends the body, no partial file stays behind.
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; on success it becomes ``path`` in one step.

    Missing parent directories are made. A symbolic link is followed, so the result stands where it points.

    Args:
        path: The directory to make: it must not exist, or be an empty directory.

    Yields:
        An existing, empty, hidden sibling of ``path``.

    Raises:
        WorkDirectoryError: ``path`` is a file or a directory with something in it (looked at before and after
            the body), the disk is full, or the place cannot be written.
    """
    path = Path(path)
    _refuse_occupied(path)
    with _explained(path):
        target = path.resolve()
        temporary = _sibling(target)
        temporary.mkdir(parents=True)
    try:
        with _explained(path, only=_DISK_FULL):
            yield temporary
        _refuse_occupied(path)
        with _explained(path):
            _sync_tree(temporary)
            temporary.replace(target)
            _sync(target.parent)
    except BaseException:  # Ctrl-C too: whatever ends the body, no partial directory stays behind.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_room(path: Path, size_bytes: int = 0) -> None:
    """Refuse a path at which nothing can be made, or nothing of this size, before the work that makes it.

    Args:
        path: The file or directory to make; parents that are missing would be made too.
        size_bytes: The least that it will take.

    Raises:
        WorkDirectoryError: A parent is no directory or may not be written, or the disk has too little room.
    """
    parent = next(each for each in Path(path).absolute().parents if each.exists())
    if not parent.is_dir():
        raise WorkDirectoryError(f"{path}: cannot be made, {parent} is not a directory. Choose another path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WorkDirectoryError(f"{path}: cannot be made, {parent} may not be written. Choose another path.")
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise WorkDirectoryError(
            f"{path}: will take {size_bytes} bytes, but its disk has {free} free. Free some space there, or choose a "
            "path on another disk."
        )


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
            f"{path}: not written, expected finite numbers only ({cause}). The computation before it went wrong."
        ) from cause
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    Args:
        path: The file to make or replace.
        text: Any text: of names that came from outside, halves of surrogate pairs are written as escapes.

    Raises:
        WorkDirectoryError: The file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_json(path: Path, error: type[BpwiseError]) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    NaN and Infinity are accepted: published ``config.json`` files hold them.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        BpwiseError: As the type given by ``error``: the file is missing, unreadable, not JSON or not an
            object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}). Check that it exists and is readable.") from cause
    return _parsed(data, str(path), error)


def read_schema(path: Path, schema: type[_Schema], error: type[BpwiseError], *, remedy: str = _REMEDY) -> _Schema:
    """Read a JSON file that has a schema.

    Args:
        path: The file.
        schema: As ``check_schema`` takes it.
        error: What to raise.
        remedy: The last sentence of the message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``: as ``read_json`` and ``check_schema``.
    """
    return check_schema(read_json(path, error), schema, error, where=str(path), remedy=remedy)


def parse_schema(
    text: str, schema: type[_Schema], error: type[BpwiseError], *, where: str, remedy: str = _REMEDY
) -> _Schema:
    """Read JSON that has a schema from a text, such as an entry of another file's metadata.

    Args:
        text: A JSON object.
        schema: As ``check_schema`` takes it.
        error: What to raise.
        where: The file, and the place in it.
        remedy: The last sentence of the message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``: as ``read_json`` and ``check_schema``.
    """
    data = text.encode("utf-8", "surrogatepass")
    return check_schema(_parsed(data, where, error), schema, error, where=where, remedy=remedy)


def check_schema(
    value: Any, schema: type[_Schema], error: type[BpwiseError], *, where: str, remedy: str = _REMEDY
) -> _Schema:
    """Return parsed JSON as what its schema says, every type and every range in it checked.

    Args:
        value: What ``read_json`` returned, or a part of it.
        schema: A dataclass, a ``TypedDict`` or another type that msgspec knows, with ranges as ``msgspec.Meta``. What
            it does not name may be there too. Its ``__post_init__`` raises ``ValueError`` for what types cannot say.
        error: What to raise.
        where: The file, and the place in it.
        remedy: The last sentence of the message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``: something is missing, of another type or out of range.
    """
    try:
        return msgspec.convert(value, schema, strict=True)
    except UnicodeEncodeError as cause:  # half of a surrogate pair: valid JSON
        raise error(f"{where}: the key {cause.object!r} is not valid Unicode. {remedy}") from cause
    except msgspec.ValidationError as cause:
        problem, _, place = str(cause).removesuffix("`").partition(" - at `$")
        at = f"{where}: {place.removeprefix('.')}" if place else where
        found = _EXPECTED.fullmatch(problem)
        if found is None:
            raise error(f"{at}: {problem.replace('`', '')}. {remedy}") from cause
        # msgspec does not tell the keys of free mappings.
        got = found[2] if "[...]" in place else reprlib.repr(_value_at(value, place))
        expected = found[1].replace("`", "")
        raise error(f"{at}: not a valid value. Got {got}. Expected {expected}. {remedy}") from cause


def _value_at(value: Any, place: str) -> Any:
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        value = value[name] if name else value[int(index)]
    return value


def _parsed(data: bytes, where: str, error: type[BpwiseError]) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid JSON ({cause}). The file is damaged: make or get it again.") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: wrong JSON, got {type(value).__name__} at the top level, expected an object.")
    return cast("dict[str, Any]", value)


@contextmanager
def _explained(path: Path, only: frozenset[int] | None = None) -> Iterator[None]:
    # Turns an OSError (those in ``only``, or all) into one that names the target, not the temporary file.
    try:
        yield
    except OSError as cause:
        if only is not None and cause.errno not in only:
            raise
        if cause.errno in _DISK_FULL:
            raise WorkDirectoryError(
                f"{path}: not written, the disk is full ({cause.strerror}). Free some space there, or "
                "choose a path on another disk, and run again."
            ) from cause
        raise WorkDirectoryError(
            f"{path}: cannot be written ({cause.strerror}). Choose a path that you may write to."
        ) from cause


def _sibling(path: Path) -> Path:
    # The process id tells people whose it is; the random part keeps threads and recycled ids apart.
    return path.parent / f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"


def _refuse_occupied(path: Path) -> None:
    with _explained(path):
        if path.is_dir():
            if any(path.iterdir()):
                raise WorkDirectoryError(
                    f"{path}: in the way, got a directory with files in it, expected none or an empty one. "
                    "Remove it, or choose another path."
                )
        elif path.exists():
            raise WorkDirectoryError(f"{path}: in the way, got a file, expected no such path. Choose another path.")


def _sync_tree(directory: Path) -> None:
    for entry in directory.rglob("*"):
        if not entry.is_symlink():
            _sync(entry)
    _sync(directory)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory, and needs no such flush.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is what ``git clone`` leaves in the place of a large one where Git LFS is not installed.

    Args:
        path: A regular file.

    Raises:
        OSError: It cannot be read.
    """
    if path.stat().st_size > _LFS_MOST_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_START)) == _LFS_START
