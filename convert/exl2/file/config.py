"""Settings on their way into an EXL2 directory and out of it: config.json, and what prepares images.

EXL2 readers look for older keys than current Transformers writes, some of them in one place or file only. Here they are
added, the newer ones left in place; on the way out they go again. Source: ExLlamaV2 0.3.2, config.py. It refuses a
model with vision that lacks any of this, for text too.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import read_json
from ....checkpoint.model.names import text_config
from ....checkpoint.model.positions import window_period
from ....checkpoint.source.hub import confined_file, side_files
from ....errors import CheckpointError, UnsupportedModelError

__all__ = ["add_image_processor", "dense_config", "exl2_config", "require_side_files", "stored_rates"]

_MOST_BITS = 16

# ExLlamaV2 0.3.2 (config.py) refuses `type` and `rope_type` together; it looks for llama3 under the newer key
# only and for these under the older one only.
_TYPES_UNDER_OLD_KEY = ("linear", "su", "longrope", "yarn", "mrope")

_OLDER_NAMES = {"norm_epsilon": "layer_norm_epsilon"}
"""Keys that readers look for under another name: StarCoder2's."""

_OLDER_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Where older configs state what ``rope_parameters`` holds."""

_AT_THE_TOP = (
    "attention_bias",
    "mlp_bias",
    "use_qk_norm",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
"""Keys of language models inside of others that readers look for outside of ``text_config`` alone."""

_AT_THE_TOP_FIRST = (
    "vocab_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "intermediate_size",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "sliding_window",
)
"""Keys that readers take from outside of ``text_config`` where they stand in both places, unlike Transformers."""


_PROCESSOR_FILE = "processor_config.json"
"""Where Transformers 5 keeps what prepares images."""

_IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
"""Where older ones kept it, and readers look."""


def exl2_config(config: Mapping[str, Any], quantization: Mapping[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    """Return the config.json of a quantized model.

    Args:
        config: The original model's config, complete (see ``complete_config``).
        quantization: Entries of ``quantization_config`` (version, bits, head_bits, calibration); the method
            is added.
        tied_embeddings: Whether the original model's head is its embedding.

    Returns:
        A new config with one architecture, every key where EXL2 readers look for it, and ``quantization_config``.

    Raises:
        UnsupportedModelError: The config names no architecture, by which readers choose the model's code.
    """
    result = deepcopy(dict(config))
    names = result.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f"config.json: architectures is {names!r}. Expected a list with one name. Add the model class's name."
        )
    result["architectures"] = names[:1]
    text: Any = text_config(result)
    _add_rope_keys(text)
    vision = result.get("vision_config")
    if isinstance(vision, dict):
        _add_vision_keys(vision)
    for key, older in _OLDER_NAMES.items():
        if key in text:
            text[older] = text[key]
    kinds = text.get("layer_types")  # anything at all where the model's class declares no such field
    period = window_period(kinds) if isinstance(kinds, list) else None
    if period is not None:
        result["sliding_window_pattern"] = period
    if text is not result:
        result |= {key: text[key] for key in _AT_THE_TOP if text.get(key)}
        result |= {key: text[key] for key in _AT_THE_TOP_FIRST if result.get(key) is not None and key in text}
    _set_common_keys(result, tied_embeddings)
    result["quantization_config"] = {"quant_method": "exl2", **deepcopy(dict(quantization))}
    return result


def dense_config(config: Mapping[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    """Return the config of the dense float16 model that an EXL2 model decodes to.

    Args:
        config: config.json of the EXL2 model, complete (see ``complete_config``).
        tied_embeddings: Whether the decoded model's head is its embedding. A quantized head no longer is,
            whatever the file says.
    """
    result = deepcopy(dict(config))
    result.pop("quantization_config", None)
    text: Any = text_config(result)
    if text is not result:
        for key in (*_AT_THE_TOP, *_AT_THE_TOP_FIRST):
            if key in result and result[key] == text.get(key):
                del result[key]
    if "rope_parameters" in text:
        for key in _OLDER_ROPE_KEYS:
            text.pop(key, None)
    if isinstance(result.get("vision_config"), dict):
        _remove_vision_keys(result["vision_config"])
    if "layer_types" in text:
        result.pop("sliding_window_pattern", None)
    for key, older in _OLDER_NAMES.items():
        if key in text:
            text.pop(older, None)
    _set_common_keys(result, tied_embeddings)
    return result


def stored_rates(config: Mapping[str, Any]) -> tuple[float | None, int | None]:
    """Return the bits per weight and the head's bits that an EXL2 model's config states, each None if it does not.

    Args:
        config: config.json of the EXL2 model, by whatever program.
    """
    stated = config.get("quantization_config")
    quantization = stated if isinstance(stated, dict) else {}
    bits = _sensible(quantization.get("bits"), (int, float))
    return None if bits is None else float(bits), _sensible(quantization.get("head_bits"), (int,))


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


def _sensible(bits: Any, types: tuple[type, ...]) -> Any:
    # type() and not isinstance(): JSON's true is a bool, which Python counts as an int.
    return bits if type(bits) in types and 0 < bits <= _MOST_BITS else None


def _set_common_keys(config: dict[str, Any], tied_embeddings: bool) -> None:
    config.pop("dtype", None)
    config["torch_dtype"] = "float16"
    config["tie_word_embeddings"] = tied_embeddings
    nested = config.get("text_config")
    if isinstance(nested, dict) and "tie_word_embeddings" in nested:
        nested["tie_word_embeddings"] = tied_embeddings


def _add_rope_keys(text: dict[str, Any]) -> None:
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    # Of one set per layer type: readers know the local layers' base themselves.
    rope = rope.get("full_attention") or rope
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            text[key] = rope[key]
    kind = rope.get("rope_type", "default")
    if kind == "default" and "mrope_section" in rope:
        kind = "mrope"
    if kind == "default":
        text.pop("rope_scaling", None)
        return
    if kind == "longrope":
        text["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    settings = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    text["rope_scaling"] = {"type" if kind in _TYPES_UNDER_OLD_KEY else "rope_type": kind, **settings}


def _add_vision_keys(vision: dict[str, Any]) -> None:
    """Add older keys to the ``vision_config`` of a config.json; changed in place."""
    rope = vision.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        vision.setdefault("rope_theta", rope["rope_theta"])
    if "temporal_patch_size" in vision and "patch_size" in vision:  # Qwen's
        vision.setdefault("spatial_patch_size", vision["patch_size"])


def _remove_vision_keys(vision: dict[str, Any]) -> None:
    """Remove what ``_add_vision_keys`` adds; changed in place."""
    if "rope_parameters" in vision:
        vision.pop("rope_theta", None)
    if vision.get("spatial_patch_size") == vision.get("patch_size"):
        vision.pop("spatial_patch_size", None)


def _image_processor(processor: Mapping[str, Any]) -> dict[str, Any] | None:
    # What preprocessor_config.json must hold; None if it is not there.
    images = processor.get("image_processor")
    if not isinstance(images, Mapping):
        return None
    size = images.get("size")
    pixels = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"} if "merge_size" in images else {}  # Qwen's
    found = {ours: size[theirs] for ours, theirs in pixels.items() if isinstance(size, Mapping) and theirs in size}
    return {**found, **images}
