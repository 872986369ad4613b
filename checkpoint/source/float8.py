"""Checkpoints in 8-bit floating point, dequantized while they are read.

A weight ``X`` is stored in float8 (E4M3), and beside it ``X_scale_inv`` or ``X_scale``, which both multiply: of every
block of 128 x 128 weights (DeepSeek, Qwen3-FP8), of every output feature (fbgemm, compressed-tensors) or of the whole
tensor (compressed-tensors, Mistral, vLLM).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..model.config import quantization_of
from ..model.dtypes import require_finite
from .checkpoint import Checkpoint, TensorInfo
from .views import DequantizedView

__all__ = ["Float8View"]

_SCALES = ("_scale_inv", "_scale")
_BLOCK = 128
"""Rows and columns of a block where the config does not say."""

# Of activations and of the cache of keys and values: not ours to apply.
_RUNTIME_SCALES = tuple(
    f".{name}"
    for name in (
        "input_scale",
        "input_scale_ub",
        "activation_scale",
        "output_scale",
        "q_scale",
        "k_scale",
        "v_scale",
        "prob_scale",
    )
)


class Float8View(DequantizedView):
    """A float8 checkpoint as the dense one that it stands for.

    Weights are multiplied in float32 and rounded to the dtype that config.json names (bfloat16 if it names none), as
    DeepSeek's own conversion does. Sizes are those of the dense weights.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Find every weight's scale and check its shape.

        Args:
            base: A checkpoint with float8 weights.

        Raises:
            CheckpointError: A scale is missing or of a wrong shape.
        """
        super().__init__(base)
        block = _block(base.config)
        self._scales: dict[str, str] = {}
        for name in sorted(base.names):
            if base.info(name).dtype == torch.float8_e4m3fn:
                scale = next((name + suffix for suffix in _SCALES if name + suffix in base.names), None)
                if scale is None:
                    raise CheckpointError(
                        f"{base.info(name).file}: tensor {name!r} is float8, but there is no {name}_scale_inv or "
                        f"{name}_scale beside it. The checkpoint is incomplete: get it again."
                    )
                _check_scale(base, name, scale, block)
                self._scales[name] = scale
        hidden = {name for name in base.names if name.endswith(_RUNTIME_SCALES)}
        self._names = base.names - hidden - set(self._scales.values())
        self._block = block or (_BLOCK, _BLOCK)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors but the scales."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it is read, and the file that holds it."""
        stored = self._base.info(name)
        if name not in self._scales:
            return stored
        return TensorInfo(stored.shape, self._dtype, stored.file, math.prod(stored.shape) * self._dtype.itemsize)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, dequantized.

        Raises:
            CheckpointError: As ``Checkpoint.tensor``; a float8 code that is NaN counts as such.
        """
        if name not in self._scales:
            return self._base.tensor(name)
        scale = self._base.tensor(self._scales[name])
        return self._dense(name, self._base.stored(name), scale)

    def entry(self, name: str, index: int) -> Tensor:
        """Load one entry of a tensor's first dimension, dequantized.

        Raises:
            CheckpointError: As ``tensor``.
        """
        if name not in self._scales:
            return self._base.entry(name, index)
        scale = self._scales[name]
        stack = self._base.shape(name)
        if len(stack) < 3:
            return super().entry(name, index)
        own = self._base.shape(scale)[:1] == stack[:1]
        scales = self._base.entry(scale, index) if own else self._base.tensor(scale)
        return self._dense(name, self._base.stored(name, index), scales)

    def _dense(self, name: str, codes: Tensor, scale: Tensor) -> Tensor:
        weight, scale = codes.float(), scale.float()
        if scale.numel() == 1:
            weight *= scale.reshape(())
        elif scale.shape == _per_row(weight.shape, scale.shape):
            weight *= scale.view(*weight.shape[:-1], 1)
        else:
            rows, columns = self._block
            for index in range(scale.shape[-2]):  # a row of blocks at a time: no second tensor of the weight's size
                band = weight[..., index * rows : (index + 1) * rows, :]
                wide = scale[..., index : index + 1, :].repeat_interleave(columns, dim=-1)
                band *= wide[..., : weight.shape[-1]]
        result = weight.to(self._dtype)
        require_finite(result, f"{self.info(name).file}: tensor {name!r}, dequantized,")
        return result


def _block(config: dict[str, Any]) -> tuple[int, int] | None:
    # Of a block's rows and columns, as the config names them; None if scales are not of blocks.
    found = quantization_of(config)
    settings = {} if found is None else found[1]
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    named = [settings.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, dict))]
    block = next((sizes for sizes in named if sizes is not None), None)
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(
            f"config.json: the size of float8 blocks is {block!r}. Expected two numbers. Get the model again."
        )
    return block[0], block[1]


def _per_row(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:-1]) if len(scale) < len(shape) else (*shape[:-1], 1)


def _check_scale(base: Checkpoint, name: str, scale: str, block: tuple[int, int] | None) -> None:
    shape, got = base.shape(name), base.shape(scale)
    if math.prod(got) == 1 and (block is None or math.prod(shape) <= math.prod(block) or not got):
        return
    if block is None or len(shape) < 2:
        fits, expected = got == _per_row(shape, got), f"() or {(*shape[:-1], 1)}"
    else:
        sizes = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        fits, expected = got == sizes, f"{sizes} for blocks of {block[0]} x {block[1]}"
    if not fits:
        raise CheckpointError(
            f"{base.info(scale).file}: tensor {scale!r} has a wrong shape. Got {got}. Expected {expected} beside a "
            f"weight of {shape}. The checkpoint is damaged: get it again."
        )
