"""What llama.cpp and its converter compute otherwise than Transformers, by the config.json of a model.

Source: the converter's ``conversion/base.py`` and ``conversion/llama.py``, llama.cpp's ``src/models/`` and
``ggml_rope_ext``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....checkpoint.model.config import parse_config
from ....checkpoint.model.names import text_config
from ....checkpoint.model.positions import attention_window, full_rope, stated_rope
from ....errors import UnsupportedModelError

__all__ = ["require_llama_cpp"]

_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "num_experts": (0,),
    "num_local_experts": (0,),
}
"""Key of config.json -> the values by which llama.cpp computes what Transformers does; null or absent always is."""

_MODEL_TYPES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": _COMPUTED,
    "mistral": _COMPUTED,
    "qwen2": _COMPUTED,
    "qwen3": {**_COMPUTED, "attention_bias": (False,)},  # it has no bias of o_proj
}
"""Model types that are looked at as a whole; of the others only rope_type is."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")

_COMPUTED_ROPE_TYPES = (None, "none", "default", "linear", "llama3", "yarn", "longrope", "su", "proportional", "mrope")
"""Those that llama.cpp computes in some model type; None where config.json has none."""

_YARN: Mapping[str, Any] = {"truncate": True, "beta_fast": 32, "beta_slow": 1}
"""Settings of YaRN that llama.cpp does not look at here, and what it takes them for."""

_SAME = 1e-6
"""Relative difference of factors that counts as rounding."""


def require_llama_cpp(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse a model that llama.cpp would compute otherwise, and return what matters for some rows only.

    Args:
        config: Parsed config.json, of the whole model.

    Returns:
        Sentences to show, with the rows that they matter for.

    Raises:
        UnsupportedModelError: llama.cpp would compute another model on rows of any length.
    """
    language = text_config(config)
    if language.get("model_type") not in _MODEL_TYPES:
        return tuple(_rope_limits(language))
    text = parse_config(config, Path("config.json")).get_text_config()
    departures = "; ".join((*_departures(language), *_rope_departures(full_rope(text))))
    if departures:
        raise UnsupportedModelError(
            f"config.json: {departures}. A GGUF file of it would be another model. Choose an EXL2 output."
        )
    return (*_window_limits(text), *_rope_limits(language))


def _departures(language: Mapping[str, Any]) -> Iterator[str]:
    kind = language["model_type"]
    computed = {**_MODEL_TYPES[kind]}
    if kind == "qwen2":
        computed["head_dim"] = (language["hidden_size"] // language["num_attention_heads"],)
    for key, values in computed.items():
        value = language.get(key)
        if value is not None and value not in values:
            yield f"{key} is {value!r}, but llama.cpp takes it for {values[0]!r}"


def _rope_departures(rope: Mapping[str, Any]) -> Iterator[str]:
    kind = rope["rope_type"]
    if kind not in _ROPE_TYPES:
        yield f"llama.cpp does not know rope_type {kind!r} here, expected one of {', '.join(_ROPE_TYPES)}"
    if kind != "yarn":
        return
    for key, value in _YARN.items():
        stated = rope.get(key, value)
        # Transformers takes null for the default, but that of truncate for false.
        if stated != value and (stated is not None or key == "truncate"):
            yield f"{key} of rope_type 'yarn' is {stated!r}, but llama.cpp takes it for {value!r}"
    first, second = rope.get("mscale"), rope.get("mscale_all_dim")
    if not first or not second:
        first, second = 1, 0
    computed = rope.get("attention_factor") or _yarn_attention(rope, first) / _yarn_attention(rope, second)
    read = _yarn_attention(rope, 1)
    if not math.isclose(read, computed, rel_tol=_SAME):
        yield f"rope_type 'yarn' scales attention by {computed:.6g}, but llama.cpp by {read:.6g}"


def _yarn_attention(rope: Mapping[str, Any], weight: float) -> float:
    return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0


def _window_limits(text: Any) -> Iterator[str]:
    window = attention_window(text)
    if window is not None:
        yield (
            f"llama.cpp's converter leaves out sliding_window {window}: every token sees all before it. Rows of more "
            f"than {window} tokens differ from the original."
        )


def _rope_limits(language: Mapping[str, Any]) -> Iterator[str]:
    kind = stated_rope(language)["rope_type"]
    if kind not in _COMPUTED_ROPE_TYPES:
        longest = language.get("max_position_embeddings", "max_position_embeddings")
        yield f"llama.cpp leaves out rope_type {kind!r}. Rows of more than {longest} tokens differ from the original."
