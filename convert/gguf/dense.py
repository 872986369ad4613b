"""Turns a GGUF file back into a plain float16 checkpoint that Transformers loads."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.files.atomic import atomic_directory, write_json
from ...checkpoint.files.paths import named, refuse_inputs, reserved
from ...errors import CheckpointError
from ..dense import DENSE_SHARD_BYTES, write_dense
from ..exl2.file.carry import copy_side_files
from .file.reader import GgufModel

__all__ = ["dequantize_gguf"]


def dequantize_gguf(
    path: Path, out: Path, *, original: Path | None = None, shard_bytes: int = DENSE_SHARD_BYTES
) -> None:
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
    out = named(Path(out))
    refuse_inputs(out, directories=() if original is None else (original,), files=(path,))
    with reserved(out), atomic_directory(out) as target:
        if original is not None:
            copy_side_files(original, target)  # first: what is wrong with them shows before the long work
        write_dense(model, target, shard_bytes=shard_bytes)
        write_json(target / "config.json", {**model.config, "torch_dtype": "float16"})
