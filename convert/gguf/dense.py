"""Turns a GGUF file back into a plain float16 checkpoint that Transformers loads."""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError, FormatError
from ..exl2.carry import copy_side_files, require_float16_range
from ..exl2.names import model_order
from ..exl2.shards import ShardWriter
from ..files import atomic_directory, write_json
from .reader import GgufModel

__all__ = ["dequantize_gguf"]

_SHARD_BYTES = 5120 << 20
"""Largest file, in bytes; as Transformers shards by default or smaller."""


def dequantize_gguf(path: Path, out: Path, *, original: Path | None = None, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write the dense float16 checkpoint that a GGUF file decodes to.

    config.json is rebuilt from the file. A tokenizer is not: what the file tells of it does not make it whole (how text
    is cut up before the merges is a name that only llama.cpp understands), so its files are copied from the original.

    Args:
        path: A GGUF file.
        out: Directory to make; it must not exist, or be empty.
        original: Model directory to copy tokenizer, generation and licence files from; None to go without.
        shard_bytes: Largest weight file in bytes; only a single larger tensor may exceed it.

    Raises:
        FormatError: The file breaks a rule of the format, or a value does not fit float16.
        UnsupportedModelError: The architecture is unknown.
        CheckpointError: A file of the original leads outside its directory.
        WorkDirectoryError: ``out`` is in the way or cannot be written, or the disk is full.
    """
    model = GgufModel.open(path)
    if original is not None and not original.is_dir():
        raise CheckpointError(
            f"{original}: no directory, expected the original's, to copy its tokenizer. Check the path."
        )
    with atomic_directory(Path(out)) as target:
        with ShardWriter(target, "model", names=model.names, shard_bytes=shard_bytes) as shards:
            for name in sorted(model.names, key=model_order):
                tensor = model.tensor(name)
                require_float16_range(name, tensor, FormatError)
                shards.add({name: tensor.half()})
            weight_map = shards.finish()
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
            write_json(target / "model.safetensors.index.json", index)
        write_json(target / "config.json", {**model.config, "torch_dtype": "float16"})
        if original is not None:
            copy_side_files(original, target)
