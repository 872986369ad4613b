"""Differences between EXL2 readers and Transformers, by the config.json of a model: refused, or warned of.

Source: ExLlamaV2 0.3.2 (``config.py``, ``architecture.py``, ``rope.py``, ``model.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....checkpoint.model.config import parse_config
from ....checkpoint.model.families import composite_of, family_of
from ....checkpoint.model.names import text_config
from ....checkpoint.model.positions import attention_window, full_rope, window_period
from ....errors import UnsupportedModelError
from .table import ReaderComposite, ReaderFamily, known_architectures, reader_composite, reader_family

__all__ = ["reader_warnings", "require_reader"]

_READ_IN_EVERY_FAMILY: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "norm_head": (0,),
    "partial_rotary_factor": (1,),
}
"""Keys that EXL2 readers compute with in any model that states them, and the values that change nothing, as null does.
Source: ExLlamaV2 0.3.2, config.py and architecture.py."""

_ANY_LENGTH = "Rows of any length differ from the original."
_UNKNOWN = "EXL2 readers do not know"
_FORCE = "Use --force to quantize it nevertheless, for bpwise and Transformers to read."

_SAME = 1e-6
"""Relative difference of factors that counts as rounding."""


def require_reader(config: Mapping[str, Any]) -> None:
    """Refuse a model that EXL2 readers do not know or would compute otherwise, though it could be quantized.

    Args:
        config: Parsed config.json, of the whole model.

    Raises:
        UnsupportedModelError: The family is unknown; or readers do not know the first of its ``architectures`` (the
            message lists those they do), or would compute something else.
    """
    refused = "; ".join(dict.fromkeys(_departures(config)))
    if refused.startswith(f"{_UNKNOWN} the architecture"):
        refused += f", expected one of {', '.join(known_architectures())}"
    if refused:
        raise UnsupportedModelError(f"config.json: {refused}. {_FORCE}")


def reader_warnings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what EXL2 readers compute otherwise than Transformers, as sentences with the rows that it matters for.

    Args:
        config: Parsed config.json, of the whole model. What ``require_reader`` refuses of it comes first.
    """
    departures = dict.fromkeys(_departures(config))
    refused = (x + ("." if x.startswith(_UNKNOWN) else f". {_ANY_LENGTH}") for x in departures)
    return (*refused, *_limits(config))


def _departures(config: Mapping[str, Any]) -> Iterator[str]:
    family, language = _language(config)
    composite = None if composite_of(config) is None else reader_composite(config)
    name = (config.get("architectures") or [None])[0]
    if name not in (composite or family).architectures:
        yield f"{_UNKNOWN} the architecture {name!r}"
        return
    if composite is not None:
        unknown = list(_unknown_parts(config, composite))
        yield from unknown
        if unknown:
            return
    for key, values in family.assumptions.items():
        value = language.get(key)
        if value is not None and value not in values:
            yield f"{key} is {value!r}, but EXL2 readers take it for {values[0]!r}" if values else _unasked(key, value)
    for key, values in _READ_IN_EVERY_FAMILY.items():
        value = language.get(key) if config.get(key) is None else config[key]
        if value is not None and value not in values and key not in family.reads:
            yield _unasked(key, value)
    yield from _rope_departures(family, _parsed(config))


def _unasked(key: str, value: Any) -> str:
    return f"{key} is {value!r}, which EXL2 readers compute with and Transformers does not"


def _unknown_parts(config: Mapping[str, Any], composite: ReaderComposite) -> Iterator[str]:
    found = {
        "language model": (_language_type(config), composite.languages),
        "vision part": ((config.get("vision_config") or {}).get("model_type"), (composite.vision,)),
    }
    for part, (kind, known) in found.items():
        if known != (None,) and kind not in known:
            yield (
                f"{_UNKNOWN} {config['architectures'][0]!r} with a {part} of type {kind!r}, expected "
                f"{' or '.join(map(str, known))}"
            )


def _rope_departures(family: ReaderFamily, text: Any) -> Iterator[str]:
    rope = full_rope(text)
    kind = rope["rope_type"]
    if kind not in family.rope_types:
        yield f"EXL2 readers leave out rope_type {kind!r}, expected one of {', '.join(family.rope_types)}"
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1 and "partial_rotary_factor" not in family.reads:
        yield _unasked("partial_rotary_factor", share)
    if kind == "longrope":
        yield from _longrope_departures(rope, text)
    if family.local_rope is not None:
        local = text.rope_parameters["sliding_attention"]
        for key, value in family.local_rope.items():
            if local[key] != value:
                yield f"{key} of blocks with a sliding window is {local[key]!r}, but EXL2 readers take it for {value!r}"
        if window_period(text.layer_types) is None:
            yield "layer_types has no period, but EXL2 readers rotate positions otherwise in every Nth block"


def _longrope_departures(rope: Mapping[str, Any], text: Any) -> Iterator[str]:
    longest, trained = text.max_position_embeddings, rope["original_max_position_embeddings"]
    computed = rope.get("attention_factor") or _longrope_attention(rope.get("factor") or longest / trained, trained)
    read = _longrope_attention(longest / trained, trained)
    if not math.isclose(read, computed, rel_tol=_SAME):
        yield f"rope_type 'longrope' scales attention by {computed:.6g}, but EXL2 readers by {read:.6g}"


def _longrope_attention(factor: float, trained: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def _limits(config: Mapping[str, Any]) -> Iterator[str]:
    text, (family, _) = _parsed(config), _language(config)
    if family.quirk and not (family.periodic_windows and "full_attention" not in text.layer_types):
        yield f"{family.quirk}. {_ANY_LENGTH}"
    window = attention_window(text)
    if window is not None and not family.periodic_windows:
        yield (
            f"EXL2 readers leave out sliding_window {window}: every token sees all before it. Rows of more than "
            f"{window} tokens differ from the original."
        )
    elif window is not None and family.local_rope is None and window_period(text.layer_types) is None:
        yield (
            "EXL2 readers take layer_types to have a period, so other blocks have the sliding window. Rows of more "
            f"than {window} tokens differ from the original."
        )
    yield from _rope_limits(text)
    if composite_of(config) is not None:
        yield from _image_limits(config, reader_composite(config))


def _rope_limits(text: Any) -> Iterator[str]:
    rope, longest = full_rope(text), text.max_position_embeddings
    trained = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "dynamic":
        yield (
            f"EXL2 readers leave out rope_type 'dynamic'. Rows of more than {longest} tokens differ from the original."
        )
    elif rope["rope_type"] == "yarn" and longest <= trained:
        yield (
            f"EXL2 readers leave out rope_type 'yarn', since max_position_embeddings is {longest} and the model was "
            f"trained on {trained}. {_ANY_LENGTH}"
        )
    elif rope["rope_type"] == "yarn":
        yield (
            f"EXL2 readers take rope_type 'yarn' for that of a model trained on {longest} positions instead of "
            f"{trained}. {_ANY_LENGTH}"
        )
    elif rope["rope_type"] == "longrope" and longest > trained:
        yield (
            f"EXL2 readers use long_factor for short rows too. Rows of up to {trained} tokens differ from the original."
        )


def _image_limits(config: Mapping[str, Any], composite: ReaderComposite) -> Iterator[str]:
    for key, values in composite.images.items():
        value: Any = config
        for part in key.split("."):
            value = (value or {}).get(part)
        if value is not None and value not in values:
            yield (
                f"{key} is {value!r}, but EXL2 readers take it for {values[0]!r}. Answers about images differ from the "
                "original."
            )


def _language(config: Mapping[str, Any]) -> tuple[ReaderFamily, Mapping[str, Any]]:
    alone = {"model_type": _language_type(config)}
    family_of(alone)  # refuses a family that is not in the table
    return reader_family(alone), text_config(config)


def _language_type(config: Mapping[str, Any]) -> Any:
    composite = composite_of(config)
    return (composite and composite.text) or text_config(config).get("model_type")


def _parsed(config: Mapping[str, Any]) -> Any:
    return parse_config(config, Path("config.json")).get_text_config()
