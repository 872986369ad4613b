"""Reading what comes in: JSON, whose types and ranges a schema checks, and first bytes, which tell a file's kind."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec

from ...errors import BpwiseError
from .disk_errors import explained_reading

__all__ = [
    "Count",
    "NonNegative",
    "Number",
    "Positive",
    "check_checksum",
    "check_schema",
    "checksummed",
    "is_lfs_pointer",
    "metadata_begins",
    "parse_schema",
    "read_checksummed",
    "read_json",
    "read_schema",
]

_LFS_START = b"version https://git-lfs.github.com/spec/v1"
_LFS_MOST_BYTES = 1024
"""Git LFS itself takes nothing larger for a pointer."""

_LENGTH_BYTES = 8
"""At the beginning of a safetensors file: the length of its header."""


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

_CHECKSUM = "sha256"

_EXPECTED = re.compile(r"Expected (.*?)(?:, got `(.*)`)?")


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
    with explained_reading(path, error):
        data = Path(path).read_bytes()
    return _parsed(data, str(path), error)


def read_schema(path: Path, schema: type[_Schema], error: type[BpwiseError]) -> _Schema:
    """Read a JSON file that has a schema.

    Args:
        path: The file.
        schema: As ``check_schema`` takes it.
        error: What to raise.

    Raises:
        BpwiseError: As the type given by ``error``: as ``read_json`` and ``check_schema``.
    """
    return check_schema(read_json(path, error), schema, error, where=str(path))


def read_checksummed(
    path: Path, schema: type[_Schema], error: type[BpwiseError], *, version: tuple[str, int], remedy: str = _REMEDY
) -> _Schema:
    """Read a JSON file that was ``checksummed``, has a schema and tells its version.

    Args:
        path: The file.
        schema: As ``check_schema`` takes it.
        error: What to raise.
        version: Key of the version, and the only one that is read.
        remedy: The last sentence of a message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``: as ``read_json``, ``check_checksum`` and ``check_schema``, or the
            file is of another version.
    """
    raw = read_json(path, error)
    key, expected = version
    if raw.get(key) != expected:
        raise error(f"{path}: {key} is {raw.get(key)!r}. Expected {expected}. {remedy}")
    check_checksum(raw, error, where=str(path), remedy=remedy)
    return check_schema(raw, schema, error, where=str(path), remedy=remedy)


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
        # msgspec does not tell the keys of free mappings, and of a value there its type alone.
        got = (found[2] or "a value out of range") if "[...]" in place else reprlib.repr(_value_at(value, place))
        expected = found[1].replace("`", "")
        raise error(f"{at}: not a valid value. Got {got}. Expected {expected}. {remedy}") from cause


def checksummed(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object of plain JSON with the SHA-256 of all its entries as the last one."""
    return {**value, _CHECKSUM: _checksum(value)}


def check_checksum(value: Mapping[str, Any], error: type[BpwiseError], *, where: str, remedy: str = _REMEDY) -> None:
    """Refuse an object that was ``checksummed`` and has changed since; one without a checksum may be anything.

    Args:
        value: What ``read_json`` returned.
        error: What to raise.
        where: The file.
        remedy: The last sentence of the message: what to do.

    Raises:
        BpwiseError: As the type given by ``error``: it does not match its checksum.
    """
    found = value.get(_CHECKSUM)
    if found is not None and found != _checksum({key: each for key, each in value.items() if key != _CHECKSUM}):
        raise error(f"{where}: does not match its checksum: it has changed since it was written. {remedy}")


def _checksum(value: Mapping[str, Any]) -> str:
    read = json.loads(json.dumps(value))  # as it is once it was written: keys are text
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


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
        raise error(f"{where}: wrong JSON. Got {type(value).__name__} at the top level. Expected an object.")
    return cast("dict[str, Any]", value)


def metadata_begins(path: Path, start: str) -> bool:
    """Return whether the metadata at the head of a safetensors file begins so; what comes after may be damaged.

    Args:
        path: The file, which need not exist.
        start: The first entry or its beginning, as compact JSON.
    """
    head = f'{{"__metadata__":{{{start}'.encode()
    try:
        with path.open("rb") as file:
            return file.read(_LENGTH_BYTES + len(head)).endswith(head)
    except OSError:
        return False


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
