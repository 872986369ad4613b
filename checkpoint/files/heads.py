"""First bytes of files, which tell their kind whatever comes after."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_lfs_pointer", "metadata_begins"]

_LFS_START = b"version https://git-lfs.github.com/spec/v1"
_LFS_MOST_BYTES = 1024
"""Git LFS itself takes nothing larger for a pointer."""

_LENGTH_BYTES = 8
"""At the beginning of a safetensors file: the length of its header."""


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
