"""Double precision on devices that have it and on those that do not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["in_float64", "precise_device"]


def precise_device(device: torch.device) -> torch.device:
    """Return where float64 tensors that belong to a device can be: there, or on the CPU if it has none, as MPS."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.device("cpu")
    return device


def in_float64(values: Tensor) -> Tensor:
    """Return a tensor in float64, on its ``precise_device``."""
    return values.to(precise_device(values.device)).double()
