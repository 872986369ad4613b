from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bpwise.linalg import products

from ..families.conftest import llama_cpp
from . import pretend as device

__all__ = ["llama_cpp"]

device.register()  # PyTorch counts devices at the first backward pass: now, before any test runs


@pytest.fixture
def pretend() -> torch.device:
    """The pretend device."""
    return device.register()


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have both devices do the same: on CPUs attention and large products have kernels that sum in another order."""
    monkeypatch.setattr(products, "_cpu_setting", lambda _precision: "ieee")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
