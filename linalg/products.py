"""How matrix products of float32 are computed: on the CPU by the faster library, on request with shorter factors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["BFLOAT16", "FLOAT32", "PRECISIONS", "TF32", "float32_products", "kept_bytes", "pass_precision", "products"]

FLOAT32 = "float32"
BFLOAT16 = "bfloat16"
TF32 = "tf32"
"""What the factors of products are rounded to; sums are float32."""

PRECISIONS = ("auto", FLOAT32)
"""What can be asked for; see ``pass_precision``."""

# oneDNN keeps a kernel for every shape of a product, 0.6 MiB each. By default it keeps 1024, and the products of error
# feedback have a shape for every row group. It reads this when it multiplies for the first time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

_ONEDNN: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by the module's own class

_ONEDNN_BYTES = 500 << 20
"""What a run takes more with oneDNN than with MKL: kernels, and factors as those want them; SmolLM2-135M's shapes."""

_AMPERE = (8, 0)
"""First CUDA capability with TF32."""


def pass_precision(device: torch.device, precision: str) -> str:
    """Return how products are computed where three significant digits are enough.

    Args:
        device: Where they are computed.
        precision: ``float32``, or ``auto`` for the fastest that the device has.

    Returns:
        ``bfloat16`` on CPUs with AMX, ``tf32`` on NVIDIA GPUs since Ampere, otherwise ``float32``.
    """
    if precision == FLOAT32:
        return FLOAT32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE:
        return TF32
    return BFLOAT16 if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else FLOAT32


@contextmanager
def products(device: torch.device, precision: str) -> Iterator[None]:
    """Compute products of float32 matrices so while the context lasts, in all threads.

    On a CPU with AVX-512 but without AMX, float32 products go to oneDNN: what PyTorch calls products in bfloat16 is
    computed there in float32 by that library, twice as fast on AMD's processors as by MKL, PyTorch's own choice.

    Args:
        device: Where they are computed.
        precision: As ``pass_precision`` returns it.
    """
    with ExitStack() as settings:
        if device.type == "cuda":
            chosen = "tf32" if precision == TF32 else "ieee"
            settings.enter_context(_setting(torch.backends.cuda.matmul, chosen))
        elif device.type == "cpu":
            settings.enter_context(_setting(_ONEDNN, _cpu_setting(precision)))
        yield


def kept_bytes(device: torch.device) -> int:
    """Return roughly how much memory the library of float32 products keeps for itself while a run lasts."""
    return _ONEDNN_BYTES if device.type == "cpu" and _onednn_is_exact() else 0


def _cpu_setting(precision: str) -> str:
    return "bf16" if precision == BFLOAT16 or _onednn_is_exact() else "ieee"


def _onednn_is_exact() -> bool:
    # With AMX, and on Arm, the same setting does round factors.
    return torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """As ``products``, in float32."""
    with products(device, FLOAT32):
        yield


@contextmanager
def _setting(backend: Any, precision: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
