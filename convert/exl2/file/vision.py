"""What EXL2 readers look for beside the language model, where current Transformers writes it otherwise.

Source: ExLlamaV2 0.3.2, config.py. It refuses a model with vision that lacks any of this, for text too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import read_json
from ....checkpoint.source.hub import confined_file, side_files
from ....errors import CheckpointError

__all__ = ["add_image_processor", "add_vision_keys", "remove_vision_keys", "require_side_files"]

_PROCESSOR_FILE = "processor_config.json"
"""Where Transformers 5 keeps what prepares images."""

_IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
"""Where older ones kept it, and readers look."""


def add_vision_keys(vision: dict[str, Any]) -> None:
    """Add older keys to the ``vision_config`` of a config.json; changed in place."""
    rope = vision.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        vision.setdefault("rope_theta", rope["rope_theta"])
    if "temporal_patch_size" in vision and "patch_size" in vision:  # Qwen's
        vision.setdefault("spatial_patch_size", vision["patch_size"])


def remove_vision_keys(vision: dict[str, Any]) -> None:
    """Remove what ``add_vision_keys`` adds; changed in place."""
    if "rope_parameters" in vision:
        vision.pop("rope_theta", None)
    if vision.get("spatial_patch_size") == vision.get("patch_size"):
        vision.pop("spatial_patch_size", None)


def add_image_processor(directory: Path) -> None:
    """Give what prepares images the file of its own in which readers look, if it has none.

    Args:
        directory: Model directory, with side files.

    Raises:
        CheckpointError: processor_config.json is damaged.
    """
    path = directory / _PROCESSOR_FILE
    if path.exists() and not (directory / _IMAGE_PROCESSOR_FILE).exists():
        images = _image_processor(read_json(path, CheckpointError))
        if images is not None:
            write_json(directory / _IMAGE_PROCESSOR_FILE, images)


def require_side_files(source: Path) -> None:
    """Refuse side files that cannot be copied, or that ``add_image_processor`` would refuse; nothing is written.

    Args:
        source: Model directory that they will be copied from.

    Raises:
        CheckpointError: As ``side_files`` and ``add_image_processor``.
    """
    if _PROCESSOR_FILE in side_files(source):
        _image_processor(read_json(confined_file(source, _PROCESSOR_FILE), CheckpointError))


def _image_processor(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    # What preprocessor_config.json must hold; None if it is not there.
    images = processor.get("image_processor")
    if not isinstance(images, Mapping):
        return None
    size = images.get("size")
    pixels = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"} if "merge_size" in images else {}  # Qwen's
    found = {ours: size[theirs] for ours, theirs in pixels.items() if isinstance(size, Mapping) and theirs in size}
    return {**found, **images}
