"""Multiplies weights that are encoded, by their blocks' float16 scales: codes and scales of sub-blocks stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ....errors import ConfigError
from .kernels import Bytes, GgmlType

__all__ = ["SCALED_TYPES", "multiplied"]

_FIRST = dict.fromkeys(
    ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S"), (0,)
)

_PLACES: Mapping[str, tuple[int, ...]] = {
    **_FIRST,
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Bytes of a block at which its float16 scale starts and, where there is one, that of its minima: ``ggml-common.h``."""

SCALED_TYPES = frozenset(_PLACES)
"""Names of the types that can be multiplied; IQ1_M has its scale in parts, MXFP4 powers of two only."""

_LARGEST = 65504.0


def multiplied(data: Bytes, kind: GgmlType, factors: Tensor) -> Bytes:
    """Return encoded rows times a factor for every block, as far as float16 scales go: to about 0.05 %.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes).
        kind: Their type, one of ``SCALED_TYPES``.
        factors: Float32, on the CPU, shape (rows, blocks of a row), or 1 in the place of either.

    Raises:
        ConfigError: The type has no such scales.
    """
    if kind.name not in SCALED_TYPES:
        raise ConfigError(
            f"{kind.name}: no float16 scales. Got this type. Expected one of {', '.join(_PLACES)}. Choose another."
        )
    blocks = data.reshape(len(data), -1, kind.block_bytes).copy()
    for place in _PLACES[kind.name]:
        scales = np.ascontiguousarray(blocks[:, :, place : place + 2]).view("<f2")[:, :, 0].astype(np.float32)
        changed = np.clip(scales * factors.numpy(), -_LARGEST, _LARGEST).astype("<f2")
        blocks[:, :, place : place + 2] = changed[:, :, None].view(np.uint8)
    return blocks.reshape(data.shape)
