from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..families.conftest import llama_cpp
from . import pretend as device

__all__ = ["llama_cpp"]

device.register()  # PyTorch counts devices at the first backward pass: now, before any test runs


@pytest.fixture
def pretend() -> torch.device:
    """The pretend device."""
    return device.register()


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """On CPUs PyTorch has a kernel for attention that sums in another order; without it both devices do the same."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
