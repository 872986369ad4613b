"""The C library's allocator, set so that what is freed goes back to the operating system."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

__all__ = ["give_back_large_blocks"]

_LARGE_BYTES = 16 << 20
"""Blocks of memory from this size on are given back as soon as they are freed."""

_KEPT_BYTES = 64 << 20
"""What may stay of smaller ones: without it, the activations of small models would be asked for again and again."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def give_back_large_blocks() -> None:
    """Have this process give freed tensors back to the system; does nothing where the C library is not glibc.

    Left alone, glibc raises the size from which it does so to 32 MiB, and keeps smaller freed blocks in the heaps of a
    dozen threads: 2 GiB while a block of Llama-3.2-1B is rounded. Passes that wait for each other have a thread each,
    but no more run at a time than there are cores: more heaps would only keep what each left. Source: mallopt(3).
    """
    if sys.platform == "linux":
        with suppress(AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            library.mallopt(_M_ARENA_MAX, len(os.sched_getaffinity(0)))
