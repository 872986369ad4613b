"""The output head, which is large: kept as it is stored, and brought into the dtype of the run slice by slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CastOnUseLinear"]

_SLICE_OUTPUTS = 8192
"""Outputs whose weights are brought into another dtype at once: 128 MiB in float32 for 4096 inputs."""


class CastOnUseLinear(nn.Linear):
    """A linear whose weight may have another dtype than its inputs and its outputs; it gets no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        """Take the sizes of a linear, and none of its weights."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, shape (..., out), in the dtype of ``inputs``, shape (..., K)."""
        outputs: Tensor = _Product.apply(inputs, self.weight)  # type: ignore[no-untyped-call]
        return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)


class _Product(torch.autograd.Function):
    """Inputs times the transpose of a weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        flat = inputs.flatten(0, -2)
        outputs = flat.new_empty(len(flat), len(weight))
        for part, into in zip(weight.split(_SLICE_OUTPUTS), outputs.split(_SLICE_OUTPUTS, dim=1), strict=True):
            torch.mm(flat, part.to(flat.dtype).T, out=into)
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        flat = gradients[0].flatten(0, -2)
        before = flat.new_zeros(len(flat), weight.shape[1])
        for part, given in zip(weight.split(_SLICE_OUTPUTS), flat.split(_SLICE_OUTPUTS, dim=1), strict=True):
            before.addmm_(given, part.to(flat.dtype))
        return before.view(*gradients[0].shape[:-1], -1), None
