"""Hidden states of all tokens at once: in memory, or in files that the operating system pages in and out."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.files import operations
from ...checkpoint.files.disk_errors import DISK_FULL
from ...errors import DiskFullError, WorkDirectoryError

__all__ = ["new_state"]


def new_state(shape: Sequence[int], dtype: torch.dtype, directory: Path | None) -> Tensor:
    """Return a tensor to be filled.

    A file has no name, so that nothing of it is left when the tensor goes, or the process ends in whatever way. Its
    pages count as resident while they are in memory, but the system writes them out when memory is needed.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        directory: Directory to make a file in; it is made too. None for memory.

    Raises:
        DiskFullError: There is no room for the file.
        WorkDirectoryError: The file cannot be made.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if directory is None or size_bytes == 0:
        return torch.empty(*shape, dtype=dtype)
    try:
        operations.make_directory(directory, parents=True, exist_ok=True)
        with operations.unnamed(directory, size_bytes=size_bytes) as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), size_bytes), dtype=dtype).view(*shape)
    except OSError as error:
        message = (
            f"{directory}: no place for {size_bytes / 2**20:.0f} MiB of hidden states ({error.strerror}). Free some "
            "space, or name another --offload-dir."
        )
        if error.errno in DISK_FULL:
            raise DiskFullError(message, directory) from error
        raise WorkDirectoryError(message) from error
