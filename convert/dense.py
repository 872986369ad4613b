"""Turns a quantized model back into a plain float16 checkpoint that Transformers loads."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from ..checkpoint.carry.carried import copy_side_files, require_float16_range
from ..checkpoint.files.atomic import atomic_directory, write_json
from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.disk_errors import require_room
from ..checkpoint.files.paths import named, refuse_inputs, reserved
from ..checkpoint.files.schemas import read_json
from ..checkpoint.files.shards import ShardWriter
from ..checkpoint.model.names import model_order
from ..checkpoint.source.checkpoint import Checkpoint, TensorSource
from ..checkpoint.source.hub import confined_file, side_files
from ..checkpoint.source.original import open_model
from ..errors import BpwiseError, CheckpointError, FormatError
from ..version import __version__
from .model import QuantizedModel
from .registry import require_format

__all__ = ["DENSE_SHARD_BYTES", "dequantize_model"]

DENSE_SHARD_BYTES = 5120 << 20
"""Largest file, in bytes; as Transformers shards by default or smaller."""

_FLOAT16_BYTES = 2

_MADE_FROM = "bpwise_dequantized"
"""Entry of config.json: a digest of all that the checkpoint was made from."""

_log = logging.getLogger(__name__)


def dequantize_model(
    path: str | Path, out: str | Path, *, original: str | Path | None = None, shard_bytes: int = DENSE_SHARD_BYTES
) -> bool:
    """Write the dense float16 checkpoint that a quantized model decodes to; nothing is done if it is there.

    A model whose head is quantized becomes untied, since its head is no longer its embedding.

    Args:
        path: A quantized model of any format.
        out: Directory to make; it must not exist, be empty, or be the finished output of this very call.
        original: Model directory to copy tokenizer, generation and licence files from, and what a model in one file
            does not tell (see ``QuantizedModel.beside``). None takes the model's own, if it is a directory; what a
            model in one file tells of its tokenizer does not make it whole.
        shard_bytes: Largest weight file in bytes; only a single larger tensor may exceed it.

    Returns:
        Whether there was a directory to copy such files from.

    Raises:
        FormatError: What is stored breaks a rule of the format, or does not fit float16.
        UnsupportedModelError: The architecture is unknown.
        CheckpointError: config.json is missing or damaged, or a file leads outside its directory.
        WorkDirectoryError: ``out`` is in the way or cannot be written, or the disk is full.

    Example:
        >>> from bpwise import dequantize_model
        >>> dequantize_model("llama-6bpw", "dense")
        True
    """
    path, out, original = Path(path), named(Path(out)), None if original is None else Path(original)
    model: QuantizedModel = require_format(path).open(path)
    if original is not None and not original.is_dir():
        raise CheckpointError(
            f"{original}: no directory. Expected the original's, to copy its tokenizer. Check the path."
        )
    if original is not None:
        model = model.beside(open_model(original))
    source = original or (model.directory if model.directory == model.path else None)
    refuse_inputs(out, directories=[each for each in (source, path) if each is not None])
    dense = model.as_transformers()
    made_from = _made_from(model, source, shard_bytes)
    if _is_finished(out, dense, made_from):
        _log.info("finished already: %s holds what this makes", out)
        return source is not None
    with reserved(out), atomic_directory(out) as target:
        require_room(out, _FLOAT16_BYTES * sum(math.prod(dense.shape(name)) for name in dense.names))
        if source is not None:
            copy_side_files(source, target)  # first: what is wrong with them shows before the long work
        _write(dense, target, shard_bytes=shard_bytes)
        config = {**dense.config, "torch_dtype": "float16", _MADE_FROM: made_from}
        write_json(target / "config.json", _named_floats(config))
    return source is not None


def _made_from(model: QuantizedModel, source: Path | None, shard_bytes: int) -> str:
    names = [] if source is None else side_files(source)
    digests = file_digests([confined_file(source, name) for name in names], CheckpointError) if source else []
    parts = [__version__, model.fingerprint, shard_bytes, list(zip(names, digests, strict=True))]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _is_finished(out: Path, dense: TensorSource, made_from: str) -> bool:
    # A checkpoint appears whole; what became of it since shows in its headers.
    try:
        if read_json(out / "config.json", CheckpointError).get(_MADE_FROM) != made_from:
            return False
        return Checkpoint.open(out).names == dense.names
    except BpwiseError:
        return False


def _write(model: TensorSource, target: Path, *, shard_bytes: int) -> None:
    # All tensors as float16, with an index where there are several files.
    with ShardWriter(target, "model", names=model.names, shard_bytes=shard_bytes) as shards:
        for name in sorted(model.names, key=model_order):
            tensor = model.tensor(name)
            require_float16_range(name, tensor, FormatError)
            shards.add({name: tensor.half()})
        weight_map = shards.finish()
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def _named_floats(value: Any) -> Any:
    # JSON has no word for infinity; Transformers writes it so.
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _named_floats(each) for key, each in value.items()}
    return [_named_floats(each) for each in value] if isinstance(value, list) else value
