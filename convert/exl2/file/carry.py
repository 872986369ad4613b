"""What a written model takes over from the original: files beside the weights, and unquantized tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import read_json
from ....checkpoint.source.hub import confined_file, side_files
from ....errors import BpwiseError, CheckpointError
from .vision import IMAGE_PROCESSOR_FILE, PROCESSOR_FILE, image_processor

__all__ = ["copy_side_files", "require_float16_range", "require_side_files"]

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT16_MAX = 65504.0


def copy_side_files(source: Path, target: Path) -> None:
    """Copy a model's side files, as ``side_files`` names them; links are replaced by content.

    What prepares images also gets the file of its own in which EXL2 readers look, if it has none.

    Args:
        source: Model directory to copy from.
        target: Existing directory to copy into.

    Raises:
        CheckpointError: As ``side_files``, or processor_config.json is damaged.
    """
    for name in side_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(confined_file(source, name), target / name)
    if (target / PROCESSOR_FILE).exists() and not (target / IMAGE_PROCESSOR_FILE).exists():
        images = image_processor(read_json(target / PROCESSOR_FILE, CheckpointError))
        if images is not None:
            write_json(target / IMAGE_PROCESSOR_FILE, images)


def require_side_files(source: Path) -> None:
    """Refuse side files that ``copy_side_files`` would refuse; nothing is copied.

    Args:
        source: Model directory that they will be copied from.

    Raises:
        CheckpointError: As ``copy_side_files``.
    """
    if PROCESSOR_FILE in side_files(source):
        image_processor(read_json(confined_file(source, PROCESSOR_FILE), CheckpointError))


def require_float16_range(name: str, tensor: Tensor, error: type[BpwiseError]) -> None:
    """Check that a tensor can be loaded as float16, as EXL2 readers load everything unquantized.

    Args:
        name: Full name of the tensor.
        tensor: Of any shape and dtype.
        error: What to raise.

    Raises:
        BpwiseError: As the type given by ``error``: the dtype is not float16, bfloat16 or float32, or a value
            is NaN or of a magnitude beyond 65504.
    """
    if tensor.dtype not in _FLOAT_DTYPES:
        raise error(f"{name}: stored as {tensor.dtype}, expected float16, bfloat16 or float32.")
    if not tensor.numel():
        return
    low, high = (float(end) for end in tensor.aminmax())
    if not max(-low, high) <= _FLOAT16_MAX:
        raise error(
            f"{name}: values range from {low} to {high}, expected at most {_FLOAT16_MAX} in magnitude. "
            "Readers load this tensor as float16; the model cannot be stored as EXL2 without changing it."
        )
