"""Directories that other programs see instead of a model's own: links to weights and side files, no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..files.operations import link, make_directory, write
from ..files.schemas import read_json
from ..files.shards import DEFAULT_SHARD_BYTES, ShardWriter
from ..files.side_files import CARD_NAME, CONFIG_FILE, SETTINGS
from ..model.config import QUANTIZED_KEYS
from ..source.checkpoint import Checkpoint
from ..source.hub import confined_file, side_files
from ..source.views import CheckpointView

__all__ = ["stage_tensors", "staged_files"]

_CODE_KEYS = ("auto_map", "custom_pipelines")


def staged_files(directory: Path) -> list[str]:
    """Return the names of all files but weights that a program gets to see, each checked to be the model's own.

    Args:
        directory: The model directory.

    Raises:
        CheckpointError: As ``side_files``.
    """
    card = [CARD_NAME] if os.path.lexists(directory / CARD_NAME) else []
    for name in (CONFIG_FILE, *card):
        confined_file(directory, name)
    return [CONFIG_FILE, *card, *side_files(directory)]


def stage_tensors(checkpoint: Checkpoint, names: Mapping[str, str], directory: Path) -> None:
    """Fill a directory with tensors of a model, and with the files beside its weights.

    Args:
        checkpoint: The model.
        names: Names that tensors get in the directory, and those that they have in the model.
        directory: An empty directory.

    Raises:
        CheckpointError: A file leads outside the model's directory, or cannot be read.
    """
    source = checkpoint.directory
    if isinstance(checkpoint, CheckpointView) or any(name != stored for name, stored in names.items()):
        # What is changed while reading stands in no file: the program gets files of its own, gone when it is done.
        _write_shards(checkpoint, names, directory)
    else:
        _link_shards(checkpoint, directory)
    for name in staged_files(source):
        target = directory / name
        make_directory(target.parent, exist_ok=True)
        if name == CONFIG_FILE or name in SETTINGS:
            value = read_json(source / name, CheckpointError)
            if name == CONFIG_FILE:
                value = {
                    key: item for key, item in value.items() if key in checkpoint.config or key not in QUANTIZED_KEYS
                }
            write(target, json.dumps(_without_code(value)).encode())
        else:
            link(target, (source / name).resolve())


def _write_shards(checkpoint: Checkpoint, names: Mapping[str, str], directory: Path) -> None:
    with ShardWriter(directory, "model", names=names, shard_bytes=DEFAULT_SHARD_BYTES) as shards:
        for name in sorted(names):
            shards.add({name: checkpoint.tensor(names[name])})
        shards.finish()


def _link_shards(checkpoint: Checkpoint, directory: Path) -> None:
    source = checkpoint.directory
    shards = sorted({checkpoint.info(name).file for name in checkpoint.names})
    for number, shard in enumerate(shards, 1):
        # Programs take files that begin with "model"; a single one may have had any name.
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        link(directory / name, confined_file(source, shard.relative_to(source).as_posix()).resolve())


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value
