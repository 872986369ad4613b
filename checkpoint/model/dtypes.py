"""Dtypes that tensors are read in, and values that they may not hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CheckpointError

__all__ = ["FLOAT_DTYPES", "require_finite", "require_readable"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def require_readable(dtype: torch.dtype, where: str) -> None:
    """Refuse a dtype that is neither that of dense weights nor an integer's.

    Args:
        dtype: The tensor's.
        where: Begins the message.

    Raises:
        CheckpointError: It is another one.
    """
    if dtype not in FLOAT_DTYPES + _INTEGER_DTYPES:
        raise CheckpointError(
            f"{where} has an unsupported dtype. Got {str(dtype).removeprefix('torch.')}. Expected float32, float16 or "
            "bfloat16 (or integers). Use the model's unquantized release, or save it in bfloat16."
        )


def require_finite(tensor: Tensor, where: str) -> None:
    """Refuse weights that hold NaN or infinite values.

    Args:
        tensor: Of any shape, floating point.
        where: Begins the message.

    Raises:
        CheckpointError: It does.
    """
    # min and max pass NaN on and need no temporary the size of the tensor, unlike isfinite().all().
    if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{where} holds NaN or infinite values. Got {bad} of {tensor.numel()}. Expected none. "
            "The checkpoint is damaged: get it again, or use another one."
        )
