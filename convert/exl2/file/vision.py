"""What EXL2 readers look for beside the language model, where current Transformers writes it otherwise.

Source: ExLlamaV2 0.3.2, config.py. It refuses a model with vision that lacks any of this, for text too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["IMAGE_PROCESSOR_FILE", "PROCESSOR_FILE", "add_vision_keys", "image_processor", "remove_vision_keys"]

PROCESSOR_FILE = "processor_config.json"
"""Where Transformers 5 keeps what prepares images."""

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
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


def image_processor(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what preprocessor_config.json must hold, from what stands in processor_config.json; None if not there."""
    images = processor.get("image_processor")
    if not isinstance(images, Mapping):
        return None
    size = images.get("size")
    pixels = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"} if "merge_size" in images else {}  # Qwen's
    found = {ours: size[theirs] for ours, theirs in pixels.items() if isinstance(size, Mapping) and theirs in size}
    return {**found, **images}
