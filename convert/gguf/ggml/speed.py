"""Which of ggml's types are slow on which of llama.cpp's backends: plain data.

Sources: the table of features in llama.cpp's wiki (github.com/ggml-org/llama.cpp/wiki/Feature-matrix) marks I-quants as
"slower than K-quants of comparable size" on CPUs (AVX, AVX2 and NEON) and with Metal, and not with CUDA. With Vulkan
they were not supported when it was made; measurements since (github.com/ggml-org/llama.cpp/pull/11595) put IQ2_S at 262
GFLOPS where Q2_K has 451, on a Radeon 780M.
"""

from __future__ import annotations

from collections.abc import Mapping

from .types import TYPES

__all__ = ["SLOW_TYPES"]

_CODEBOOKS = tuple(name for name in TYPES if name.startswith("IQ"))

SLOW_TYPES: Mapping[str, tuple[str, ...]] = {
    "cpu": _CODEBOOKS,
    "cuda": (),
    "metal": _CODEBOOKS,
    "vulkan": _CODEBOOKS,
}
"""Names of types that are slower than others of their size, by backend."""
