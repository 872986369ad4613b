"""Directories that llama.cpp's converter sees instead of a model's own: links to weights and side files, no code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....checkpoint.files.operations import link, make_directory, write
from ....checkpoint.files.schemas import read_json
from ....checkpoint.files.shards import DEFAULT_SHARD_BYTES, ShardWriter
from ....checkpoint.files.side_files import CONFIG_FILE, SETTINGS
from ....checkpoint.model.config import QUANTIZED_KEYS
from ....checkpoint.model.names import text_config
from ....checkpoint.source.checkpoint import Checkpoint
from ....checkpoint.source.hub import confined_file, side_files
from ....checkpoint.source.views import CheckpointView
from ....errors import CheckpointError
from ...names import CARD_NAME

__all__ = ["converter_files", "stage_model", "stage_projector", "stores_mtp", "vision_tensors"]

_CODE_KEYS = ("auto_map", "custom_pipelines")

_TEXT = re.compile(r"(?:(?:model|language_model)\.)*(?:layers\.([0-9]+)|embed_tokens|norm|rotary_emb|lm_head|mtp)\.")
"""Beginnings of the names of a language model's own tensors, by itself or as a part of another model."""

_VISION = re.compile(r"vision|visual|vit\b|vpm\b|siglip|image_newline")

_WITHOUT_MODEL = ("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
"""Model types of which the Hub's checkpoints have no ``model.`` before the vision part, as Transformers 5 has it."""


def converter_files(directory: Path) -> list[str]:
    """Return the names of all files but weights that the converter gets to see, each checked to be the model's own.

    Args:
        directory: The model directory.

    Raises:
        CheckpointError: As ``side_files``.
    """
    card = [CARD_NAME] if os.path.lexists(directory / CARD_NAME) else []
    for name in (CONFIG_FILE, *card):
        confined_file(directory, name)
    return [CONFIG_FILE, *card, *side_files(directory)]


def stores_mtp(checkpoint: Checkpoint) -> bool:
    """Return whether tensors for multi-token prediction are stored: ``mtp.*``, or blocks beyond the last one."""
    blocks = text_config(checkpoint.config).get("num_hidden_layers")
    for name in checkpoint.names:
        block = _TEXT.match(name)
        beyond = block is not None and block[1] is not None and isinstance(blocks, int) and int(block[1]) >= blocks
        if beyond or "mtp" in name.split("."):
            return True
    return False


def vision_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensors of the part that sees images: name as the Hub's checkpoints have it -> name in this one.

    Names as Transformers writes or has them in memory differ from those in a few model types. Empty where config.json
    knows no such part, or none is stored.
    """
    if not isinstance(checkpoint.config.get("vision_config"), dict):
        return {}
    model_type = str(checkpoint.config.get("model_type"))
    others = {_hub_name(name, model_type): name for name in checkpoint.names if _TEXT.match(name) is None}
    return others if any(map(_VISION.search, others)) else {}


def stage_model(checkpoint: Checkpoint, directory: Path) -> None:
    """Fill a directory with all that the converter needs of a model.

    Args:
        checkpoint: The model.
        directory: An empty directory.

    Raises:
        CheckpointError: A file leads outside the model's directory, or cannot be read.
    """
    _stage(checkpoint, {name: name for name in checkpoint.names}, directory)


def stage_projector(checkpoint: Checkpoint, directory: Path) -> None:
    """Fill a directory with what the converter needs of a model's vision part; as ``stage_model``."""
    _stage(checkpoint, vision_tensors(checkpoint), directory)


def _hub_name(name: str, model_type: str) -> str:
    if model_type in _WITHOUT_MODEL:
        name = name.removeprefix("model.")
    tower, found, rest = name.partition("vision_tower.")
    if model_type == "gemma3" and found and not tower and not rest.startswith("vision_model."):
        return f"vision_tower.vision_model.{rest}"
    return name


def _stage(checkpoint: Checkpoint, names: Mapping[str, str], directory: Path) -> None:
    source = checkpoint.directory
    if isinstance(checkpoint, CheckpointView) or any(name != stored for name, stored in names.items()):
        # What is changed while reading stands in no file: the converter gets files of its own, gone when it is done.
        _write_shards(checkpoint, names, directory)
    else:
        _link_shards(checkpoint, directory)
    for name in converter_files(source):
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
        # The converter takes files that begin with "model"; a single one may have had any name.
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        link(directory / name, confined_file(source, shard.relative_to(source).as_posix()).resolve())


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in _CODE_KEYS}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value
