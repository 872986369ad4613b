"""Turns an EXL2 model back into a plain float16 checkpoint that Transformers loads."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.files.atomic import atomic_directory, write_json
from ..checkpoint.files.paths import named, refuse_inputs, reserved
from ..checkpoint.files.shards import ShardWriter
from ..checkpoint.model.names import model_order
from ..checkpoint.source.checkpoint import TensorSource
from ..checkpoint.source.language import HfNames
from ..errors import FormatError
from .exl2.file.carry import copy_side_files, require_float16_range
from .exl2.file.reader import Exl2Model

__all__ = ["DENSE_SHARD_BYTES", "dequantize_model", "write_dense"]

DENSE_SHARD_BYTES = 5120 << 20
"""Largest file, in bytes; as Transformers shards by default or smaller."""


def dequantize_model(directory: Path, out: Path, *, shard_bytes: int = DENSE_SHARD_BYTES) -> None:
    """Write the dense float16 checkpoint that an EXL2 model decodes to.

    A model whose head is quantized becomes untied, since its head is no longer its embedding.

    Args:
        directory: An EXL2 directory.
        out: Directory to make; it must not exist, or be empty.
        shard_bytes: Largest weight file in bytes; only a single larger tensor may exceed it.

    Raises:
        FormatError: What is stored breaks a rule of the format, or does not fit float16.
        CheckpointError: config.json is missing or damaged, or a file leads outside the directory.
        WorkDirectoryError: ``out`` is in the way or cannot be written, or the disk is full.
    """
    model = Exl2Model.open(directory)
    out = named(Path(out))
    refuse_inputs(out, directories=(model.directory,))
    with reserved(out), atomic_directory(out) as target:
        copy_side_files(model.directory, target)  # first: what is wrong with them shows before the long work
        fused = HfNames(model)
        write_dense(fused, target, shard_bytes=shard_bytes)
        write_json(target / "config.json", fused.config)


def write_dense(model: TensorSource, target: Path, *, shard_bytes: int) -> None:
    """Write all tensors of a model as float16, with an index where there are several files.

    Args:
        model: What is decoded.
        target: Existing directory.
        shard_bytes: Largest weight file in bytes; only a single larger tensor may exceed it.

    Raises:
        FormatError: A value does not fit float16.
    """
    with ShardWriter(target, "model", names=model.names, shard_bytes=shard_bytes) as shards:
        for name in sorted(model.names, key=model_order):
            tensor = model.tensor(name)
            require_float16_range(name, tensor, FormatError)
            shards.add({name: tensor.half()})
        weight_map = shards.finish()
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)
