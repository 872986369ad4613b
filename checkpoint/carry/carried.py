"""Parts of a model that outputs take over: files beside the weights, and tensors as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...errors import BpwiseError, NumericalError
from ..files.operations import copy, make_directory
from ..model.dtypes import FLOAT_DTYPES
from ..source.hub import confined_file, side_files

__all__ = ["copy_side_files", "require_float16_range", "require_float16_weights"]

_FLOAT16_MAX = 65504.0


def copy_side_files(source: Path, target: Path) -> None:
    """Copy a model's side files, as ``side_files`` names them; links are replaced by content.

    Args:
        source: Model directory to copy from.
        target: Existing directory to copy into.

    Raises:
        CheckpointError: As ``side_files``.
    """
    for name in side_files(source):
        make_directory((target / name).parent, exist_ok=True)
        copy(confined_file(source, name), target / name)


def require_float16_range(name: str, tensor: Tensor, error: type[BpwiseError]) -> None:
    """Check that a tensor can be loaded as float16.

    Args:
        name: Full name of the tensor.
        tensor: Of any shape and dtype.
        error: What to raise.

    Raises:
        BpwiseError: As the type given by ``error``: the dtype is not float16, bfloat16 or float32, or a value
            is NaN or of a magnitude beyond 65504. A single number may be beyond: bounds of clipping are as good at
            infinity.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise error(f"{name}: stored as {tensor.dtype}. Expected float16, bfloat16 or float32.")
    if not tensor.numel():
        return
    low, high = (float(end) for end in tensor.aminmax())
    if not max(-low, high) <= (math.inf if tensor.ndim == 0 else _FLOAT16_MAX):
        raise error(
            f"{name}: values range from {low} to {high}. Expected at most {_FLOAT16_MAX} in magnitude. "
            "Readers load this tensor as float16; the model cannot be stored without changing it."
        )


def require_float16_weights(weights: Mapping[str, Tensor]) -> None:
    """Check that the weights of linears can be loaded as float16.

    Args:
        weights: By the linear's full name, floating point.

    Raises:
        NumericalError: A weight is beyond float16's range.
    """
    for name, weight in weights.items():
        require_float16_range(f"{name}.weight", weight.float(), NumericalError)
