"""Checkpoints in MXFP4, as gpt-oss is published, dequantized while they are read.

A weight ``X`` that stacks experts is stored as ``X_blocks``, two codes of 4 bits (E2M1) a byte with the earlier one in
the low half, and ``X_scales``, a power of two for every 32 weights. Transformers holds the dense weight turned: as
(experts, inputs, outputs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..model.dtypes import require_finite
from .checkpoint import Checkpoint, TensorInfo
from .views import DequantizedView

__all__ = ["Mxfp4View"]

_BLOCKS, _SCALES = "_blocks", "_scales"

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)])
"""What each code of E2M1 stands for."""

_EXPONENT_BIAS = 127
_NAN_SCALE = 255


class Mxfp4View(DequantizedView):
    """An MXFP4 checkpoint as the dense one that it stands for, in shapes as Transformers has them.

    A code times its scale has so few bits that bfloat16 holds it exactly.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Find every weight's scales and check their shape.

        Args:
            base: A checkpoint with MXFP4 weights.

        Raises:
            CheckpointError: Scales are missing or of a wrong shape.
        """
        super().__init__(base)
        self._shapes: dict[str, tuple[int, int, int]] = {}
        for stored in sorted(base.names):
            name = stored.removesuffix(_BLOCKS)
            if name != stored and base.info(stored).dtype == torch.uint8:
                self._shapes[name] = _dense_shape(base, name)
        taken = {name + end for name in self._shapes for end in (_BLOCKS, _SCALES)}
        self._names = base.names - taken | self._shapes.keys()

    @property
    def dequantized(self) -> frozenset[str]:
        """Names of the weights that are stored in MXFP4."""
        return frozenset(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it is read, and the file that holds it."""
        shape = self._shapes.get(name)
        if shape is None:
            return self._base.info(name)
        file = self._base.info(name + _BLOCKS).file
        return TensorInfo(shape, self._dtype, file, math.prod(shape) * self._dtype.itemsize)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, dequantized.

        Raises:
            CheckpointError: As ``Checkpoint.tensor``; a scale that is NaN counts as such.
        """
        shape = self._shapes.get(name)
        if shape is None:
            return self._base.tensor(name)
        weight = torch.empty(shape, dtype=self._dtype)
        for expert in range(shape[0]):  # one after another: in between, a weight takes four bytes
            weight[expert] = self.entry(name, expert)
        return weight

    def entry(self, name: str, index: int) -> Tensor:
        """Load one expert's weight, shape (inputs, outputs), dequantized.

        Raises:
            CheckpointError: As ``tensor``.
        """
        if name not in self._shapes:
            return self._base.entry(name, index)
        blocks, scales = (self._base.stored(name + end, index) for end in (_BLOCKS, _SCALES))
        values = _VALUES[torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2).long()]
        weight = torch.ldexp(values, scales[..., None].int() - _EXPONENT_BIAS)
        weight[scales == _NAN_SCALE] = torch.nan
        result = weight.flatten(-2).T.to(self._dtype).contiguous()
        require_finite(result, f"{self.info(name).file}: tensor {name!r}, dequantized,")
        return result


def _dense_shape(base: Checkpoint, name: str) -> tuple[int, int, int]:
    blocks = base.shape(name + _BLOCKS)
    if name + _SCALES not in base.names:
        raise CheckpointError(
            f"{base.info(name + _BLOCKS).file}: tensor {name + _BLOCKS!r} is MXFP4, but there is no {name}{_SCALES} "
            "beside it. The checkpoint is incomplete: get it again."
        )
    scales = base.shape(name + _SCALES)
    if len(blocks) != 4 or scales != blocks[:-1]:
        raise CheckpointError(
            f"{base.info(name + _SCALES).file}: tensor {name + _SCALES!r} has a wrong shape. Got {scales}. Expected "
            f"that of {name}{_BLOCKS}, {blocks}, without its last of four dimensions. The checkpoint is damaged: get "
            "it again."
        )
    experts, outputs, count, size = blocks
    return experts, count * size * 2, outputs
