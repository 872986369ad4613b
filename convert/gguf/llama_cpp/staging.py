"""Directories that llama.cpp's converter sees instead of a model's own: links to weights and side files, no code."""

from __future__ import annotations

import re
from pathlib import Path

from ....checkpoint.carry.staging import stage_tensors
from ....checkpoint.model.names import text_config
from ....checkpoint.source.checkpoint import Checkpoint

__all__ = ["stage_model", "stage_projector", "stores_mtp", "vision_tensors"]

_TEXT = re.compile(r"(?:(?:model|language_model)\.)*(?:layers\.([0-9]+)|embed_tokens|norm|rotary_emb|lm_head|mtp)\.")
"""Beginnings of the names of a language model's own tensors, by itself or as a part of another model."""

_VISION = re.compile(r"vision|visual|vit\b|vpm\b|siglip|image_newline")

_WITHOUT_MODEL = ("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
"""Model types of which the Hub's checkpoints have no ``model.`` before the vision part, as Transformers 5 has it."""


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
    stage_tensors(checkpoint, {name: name for name in checkpoint.names}, directory)


def stage_projector(checkpoint: Checkpoint, directory: Path) -> None:
    """Fill a directory with what the converter needs of a model's vision part; as ``stage_model``."""
    stage_tensors(checkpoint, vision_tensors(checkpoint), directory)


def _hub_name(name: str, model_type: str) -> str:
    if model_type in _WITHOUT_MODEL:
        name = name.removeprefix("model.")
    tower, found, rest = name.partition("vision_tower.")
    if model_type == "gemma3" and found and not tower and not rest.startswith("vision_model."):
        return f"vision_tower.vision_model.{rest}"
    return name
