"""config.json on its way into an EXL2 directory and out of it.

EXL2 readers look for older keys than current Transformers writes; here they are added, the newer ones left in
place.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ...errors import UnsupportedModelError
from .names import text_config
from .vision import add_vision_keys

__all__ = ["dense_config", "exl2_config", "stored_rates"]

_MOST_BITS = 16

# ExLlamaV2 0.3.2 (config.py) refuses `type` and `rope_type` together; it looks for llama3 under the newer key
# only and for these under the older one only.
_OLDER_NAMES = {"norm_epsilon": "layer_norm_epsilon"}
"""Keys that readers look for under another name: StarCoder2's."""

_TYPES_UNDER_OLD_KEY = ("linear", "su", "longrope", "yarn", "mrope")


def exl2_config(config: Mapping[str, Any], quantization: Mapping[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    """Return the config.json of a quantized model.

    Args:
        config: The original model's config.
        quantization: Entries of ``quantization_config`` (version, bits, head_bits, calibration); the method
            is added.
        tied_embeddings: Whether the original model's head is its embedding.

    Returns:
        A new config with one architecture, top-level ``rope_theta``, ``rope_scaling`` as EXL2 readers expect
        it, and ``quantization_config``.

    Raises:
        UnsupportedModelError: The config names no architecture, by which readers choose the model's code.
    """
    result = deepcopy(dict(config))
    names = result.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f"config.json: architectures is {names!r}, expected a list with one name. Add the model class's name."
        )
    result["architectures"] = names[:1]
    _add_rope_keys(result)
    nested, vision = result.get("text_config"), result.get("vision_config")
    if isinstance(nested, dict):
        _add_rope_keys(nested)
    if isinstance(vision, dict):
        add_vision_keys(vision)
    for key, older in _OLDER_NAMES.items():
        if key in result:
            result.setdefault(older, result[key])
    pattern = _sliding_window_pattern(text_config(result).get("layer_types"))
    if pattern is not None:
        result.setdefault("sliding_window_pattern", pattern)
    _set_common_keys(result, tied_embeddings)
    result["quantization_config"] = {"quant_method": "exl2", **deepcopy(dict(quantization))}
    return result


def dense_config(config: Mapping[str, Any], *, tied_embeddings: bool) -> dict[str, Any]:
    """Return the config of the dense float16 model that an EXL2 model decodes to.

    Args:
        config: config.json of the EXL2 model.
        tied_embeddings: Whether the decoded model's head is its embedding. A quantized head no longer is,
            whatever the file says.
    """
    result = deepcopy(dict(config))
    result.pop("quantization_config", None)
    for part in (result, result.get("text_config")):
        scaling = part.get("rope_scaling") if isinstance(part, dict) else None
        # Transformers knows the older key, but for Gemma 3; `mrope` it knows under that alone.
        if isinstance(scaling, dict) and "rope_type" not in scaling and scaling.get("type", "mrope") != "mrope":
            scaling["rope_type"] = scaling.pop("type")
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


def _sensible(bits: Any, types: tuple[type, ...]) -> Any:
    # type() and not isinstance(): JSON's true is a bool, which Python counts as an int.
    return bits if type(bits) in types and 0 < bits <= _MOST_BITS else None


def _sliding_window_pattern(kinds: Any) -> int | None:
    # Every how many blocks one attends to all that was before, by which readers tell it from the others.
    if not isinstance(kinds, list) or "full_attention" not in kinds or "sliding_attention" not in kinds:
        return None
    pattern = kinds.index("full_attention") + 1
    as_readers_see_it = [
        "sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(len(kinds))
    ]
    return pattern if kinds == as_readers_see_it else None


def _set_common_keys(config: dict[str, Any], tied_embeddings: bool) -> None:
    config.pop("dtype", None)
    config["torch_dtype"] = "float16"
    config["tie_word_embeddings"] = tied_embeddings
    nested = config.get("text_config")
    if isinstance(nested, dict) and "tie_word_embeddings" in nested:
        nested["tie_word_embeddings"] = tied_embeddings


def _add_rope_keys(config: dict[str, Any]) -> None:
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    sources = [s for s in (parameters, scaling) if isinstance(s, dict)]
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        # One set per layer type: readers know the local layers' base themselves.
        sources, parameters = [parameters["full_attention"]], parameters["full_attention"]
    if "rope_theta" not in config:
        bases = [source["rope_theta"] for source in sources if "rope_theta" in source]
        if bases:
            config["rope_theta"] = bases[0]
    for source in sources:
        if "partial_rotary_factor" in source:
            config.setdefault("partial_rotary_factor", source["partial_rotary_factor"])
    if not isinstance(scaling, dict):
        scaling = parameters
    if not isinstance(scaling, dict):
        return
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" and "mrope_section" in scaling:
        kind = "mrope"
    legacy = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type", "type")}
    if kind == "default":
        config.pop("rope_scaling", None)
        return
    config["rope_scaling"] = {"type" if kind in _TYPES_UNDER_OLD_KEY else "rope_type": kind, **legacy}
    if kind in ("su", "longrope") and "original_max_position_embeddings" in legacy:
        config.setdefault("original_max_position_embeddings", legacy["original_max_position_embeddings"])
