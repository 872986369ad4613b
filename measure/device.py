"""Which device an option names, and how much memory this machine has."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import ConfigError

__all__ = ["free_memory", "installed_memory", "resolve_device"]

_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)


def resolve_device(name: str) -> torch.device:
    """Return the device that an option names.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: cannot be used here ({error}). Got {name!r}. Expected one that there is. Try 'cpu' or 'auto'."
        ) from error
    return device


def installed_memory() -> int | None:
    """Return the bytes of memory that this machine has; None where the system does not tell, as on Windows."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that are free; all that is installed where only that is known, else 0."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):  # not on Linux
        found = _AVAILABLE.search(Path("/proc/meminfo").read_text(encoding="ascii"))
        if found is not None:
            return 1024 * int(found[1])
    return installed_memory() or 0
