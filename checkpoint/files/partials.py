"""Partial files and directories: how they are named, whose they are, and what becomes of those of killed runs."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from . import operations

__all__ = ["MOVING", "clear_partials", "sibling", "take_back"]

MOVING = ".moving"
"""In a directory whose entries are about to go up into an existing one: a list of their names, the last one last."""

_ABANDONED_SECONDS = 3600.0
"""What was not written to for so long is nobody's work: its process may have run on another machine, or in a container
with numbers of its own, so that it cannot be asked."""

_made: set[str] = set()
"""Names of partial files and directories that this process is making."""

_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<process>[0-9]+)-[0-9a-f]{8}", re.DOTALL)


def clear_partials(directory: Path, names: Collection[str] | None = None, *, locked: bool = True) -> None:
    """Delete what killed runs left half made in a directory; what a process that still lives is making stays.

    Args:
        directory: The directory, which need not exist.
        names: Names of the files or directories that were to be made; None for all, and for files that were about to
            go up into the directory itself, which are taken back.
        locked: Whether whoever calls keeps other runs from making the same; else only what was long abandoned goes.
    """
    try:
        found = [(path, _PARTIAL.fullmatch(path.name)) for path in directory.iterdir()]
    except OSError:  # it is not there, or not to be read: nothing can be taken away
        return
    for path, match in found:
        if match is None or (names is not None and match["name"] not in names) or _lives(match):
            continue
        if not locked and not _is_abandoned(path):
            continue
        if path.is_dir() and not path.is_symlink():
            if names is None and match["name"] == directory.name:
                with suppress(OSError):
                    take_back(path, directory)
            operations.delete_tree(path)
        else:
            with suppress(OSError):
                operations.delete(path)


def take_back(temporary: Path, target: Path) -> None:
    """Delete what a directory's entries left where they were about to go: all of them have gone up, or none has.

    Args:
        temporary: The directory; its file ``MOVING`` lists them.
        target: Where they go.

    Raises:
        OSError: One of them cannot be deleted.
    """
    try:
        names = json.loads((temporary / MOVING).read_bytes())
    except (OSError, ValueError):  # they were not about to
        return
    if not _are_names(names) or not os.path.lexists(temporary / names[-1]):
        return
    for path in (target / name for name in names):
        if path.is_dir() and not path.is_symlink():
            operations.delete_tree(path)
        else:
            operations.delete(path, missing_ok=True)


def _are_names(names: object) -> bool:
    # A folder of somebody else's may hold any list; paths in it lead anywhere.
    return (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name for name in names)
    )


def _is_abandoned(path: Path) -> bool:
    try:
        entries = [path, *path.iterdir()] if path.is_dir() and not path.is_symlink() else [path]
        return time.time() - max(each.lstat().st_mtime for each in entries) >= _ABANDONED_SECONDS
    except OSError:
        return False


def _lives(partial: re.Match[str]) -> bool:
    process = int(partial["process"])
    if process == os.getpid():  # a number may be used again, as in every new container
        return partial[0] in _made
    if os.name == "nt":  # where asking would end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def sibling(path: Path) -> Path:
    """Return a hidden name for what is to become ``path``, beside it.

    The process id in it tells whose it is; the random part keeps threads and recycled ids apart.
    """
    name = f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    _made.add(name)
    return path.parent / name
