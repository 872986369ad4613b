"""config.json as Transformers understands it: checked in one place, completed with what it leaves to a class.

Files leave sizes, epsilons and rotary bases to the defaults of Transformers' classes. Everything else reads the
completed config, so that what is measured, written and forecast is what Transformers computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from ...errors import BpwiseError, CheckpointError, UnsupportedModelError, reason
from .names import text_config

__all__ = ["QUANTIZED_KEYS", "complete_config", "explain_transformers", "parse_config"]

QUANTIZED_KEYS = ("quantization_config", "compression_config")
"""Keys that say how weights are quantized."""

_NOT_PARSED = (*QUANTIZED_KEYS, "auto_map")
"""Keys that Transformers must not act on: weights come from our own readers, and code of the model's own never runs."""

_NOT_COMPLETED = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "pretraining_tp",
        "router_jitter_noise",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
)
"""Keys whose default says nothing of the stored weights: ids belong to the tokenizer, ties and the vocabulary to the
tensors, and the rest to training."""

_LARGEST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "shared_expert_intermediate_size": 1 << 24,
    "vocab_size": 1 << 28,
    "max_position_embeddings": 1 << 40,
}
"""Sizes at least ten times those of any known model: beyond them even an empty model takes minutes to build."""

_PARTS = ("text_config", "vision_config")
"""Configs of a model's parts. Other keys may end in ``_config`` too: SmolLM2 ships ``is_llama_config: true``."""

_MOST_LEVELS = 20
"""Levels of objects and lists in a config; those of models have five."""

_MAY_BE_ZERO = ("shared_expert_intermediate_size", "num_experts", "num_local_experts")
"""Sizes that are zero where a model has none of these."""

_POSITIVE = sys.float_info.min

_ROPE_NUMBERS: Mapping[str, float] = {
    "rope_theta": _POSITIVE,
    "factor": _POSITIVE,
    "attention_factor": _POSITIVE,
    "mscale": 0,
    "mscale_all_dim": 0,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": 2,  # its logarithm divides
}
"""Numbers in rope_parameters, and the least that each can be."""

_ROPE_LISTS = ("short_factor", "long_factor")

_ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What Transformers computes with as it stands; of other keys it takes null for the default."""

_ACTIVATIONS = ("hidden_act", "hidden_activation")


def complete_config(config: Mapping[str, Any], path: Path, *, embedding_rows: int | None) -> dict[str, Any]:
    """Return a config with every key of its language model that Transformers' class would fill in.

    Stated values stay as they are, except the rope type ``su``, an older name of ``longrope``, and ``rope_parameters``:
    they become those that Transformers computes with, whichever key states them. Of a model with several parts the
    outer config and its ``vision_config`` are completed too.

    Args:
        config: Parsed ``config.json`` of a model type that Transformers knows; not modified.
        path: Its file, for messages.
        embedding_rows: Rows of the stored token embeddings; they give ``vocab_size`` where the config does not.

    Raises:
        CheckpointError: A value is impossible, contradicts another, or Transformers does not accept it.
        UnsupportedModelError: This version of Transformers does not know the model type.
    """
    _check_parts(config, path)
    result = deepcopy(dict(config))
    text: Any = text_config(result)
    _rename_su(text)
    if embedding_rows is not None and text.get("vocab_size") is None and config.get("vocab_size") is None:
        text["vocab_size"] = embedding_rows
    parsed = parse_config(result, path)
    language = parsed.get_text_config()
    if isinstance(language, Mapping):  # a class without parts keeps what the file has under this key
        raise CheckpointError(
            f"{path}: a text_config that no {config['model_type']} model has. Got one in a model of a single part. "
            "Expected its keys at the top level. Move them there, or delete text_config."
        )
    _complete(text, language)
    rope = getattr(language, "rope_parameters", None)
    if isinstance(rope, dict):
        text["rope_parameters"] = _without_older_type(rope)
    if language is not parsed:
        _complete(result, parsed)
        if isinstance(result.get("vision_config"), dict):
            _complete(result["vision_config"], parsed.vision_config)
    _check_heads(text, path)
    _check_experts(text, path)
    _check_padding(text, path)
    _check_rope(rope, text, path)
    return result


def parse_config(config: Mapping[str, Any], path: Path) -> Any:
    """Return the config object that Transformers makes of a parsed ``config.json``.

    Args:
        config: The parsed file; not modified.
        path: Its file, for messages.

    Raises:
        CheckpointError: A size is impossible, an activation unknown, or Transformers does not accept a value.
        UnsupportedModelError: This version of Transformers does not know the model type.
    """
    from transformers.activations import ACT2FN  # noqa: PLC0415 - seconds to import
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: this version of Transformers does not know model_type {model_type!r}. Upgrade Transformers."
        )
    _check_sizes(config, path)
    plain = {key: deepcopy(value) for key, value in config.items() if key not in _NOT_PARSED}
    _rename_su(text_config(plain))
    with explain_transformers(path):
        parsed = (kind := CONFIG_MAPPING[model_type]).from_dict(kind._decode_special_floats(plain))  # infinities
        text = parsed.get_text_config()
    for key in _ACTIVATIONS:
        name = getattr(text, key, None)
        if name is not None and (not isinstance(name, str) or name not in ACT2FN):
            raise CheckpointError(
                f"{path}: unknown {key}. Got {name!r}. Expected an activation that Transformers knows, such as 'silu' "
                "or 'gelu_pytorch_tanh'. Correct it."
            )
    return parsed


@contextmanager
def explain_transformers(path: Path) -> Iterator[None]:
    """Turn whatever Transformers raises about a user's config into one sentence.

    Its classes raise errors of a dozen types: of strict dataclasses, KeyError, TypeError, AssertionError and others.

    Args:
        path: The ``config.json`` that it was given.

    Raises:
        CheckpointError: The body raised any other error than our own.
    """
    try:
        yield
    except (BpwiseError, MemoryError):
        raise
    except Exception as cause:
        raise CheckpointError(
            f"{path}: Transformers does not accept this config ({type(cause).__name__}: {reason(cause)}). Correct it "
            "or get it again."
        ) from cause


def _complete(part: dict[str, Any], parsed: Any) -> None:
    aliases = {kept: alias for alias, kept in parsed.attribute_map.items()}
    for key, value in _declared(parsed).items():
        if part.get(key) is None and part.get(aliases.get(key, key)) is None and value is not None:
            part[key] = value


def _without_older_type(rope: dict[str, Any]) -> dict[str, Any]:
    # What it says beside `rope_type` is `mrope` at most, which the sections say too.
    return {
        key: _without_older_type(value) if isinstance(value, dict) else deepcopy(value)
        for key, value in rope.items()
        if key != "type"
    }


def _declared(parsed: Any) -> dict[str, Any]:
    # What the model's own class has, without what every Transformers config has and without its parts.
    from transformers import PretrainedConfig  # noqa: PLC0415 - seconds to import

    left_out = PretrainedConfig().to_dict().keys() | _NOT_COMPLETED
    return {
        key: value
        for key, value in parsed.to_dict().items()
        if key not in left_out and not key.startswith("_") and not key.endswith("_config")
    }


def _rename_su(text: Mapping[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        scaling = text.get(key)
        for name in ("type", "rope_type"):
            if isinstance(scaling, dict) and scaling.get(name) == "su":
                scaling[name] = "longrope"


def _check_parts(config: Mapping[str, Any], path: Path) -> None:
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(
            f"{path}: wrong architectures. Got {names!r}. Expected a list of names of model classes. Correct it."
        )
    for key in _PARTS:
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{path}: wrong {key}. Got {value!r}. Expected an object. Correct it.")
    level: list[Any] = [config]
    for _ in range(_MOST_LEVELS):
        children = [child for part in level for child in (part.values() if isinstance(part, Mapping) else part)]
        level = [child for child in children if isinstance(child, Mapping | list)]
    if level:
        raise CheckpointError(
            f"{path}: nested too deeply. Got more than {_MOST_LEVELS} levels. The file is damaged: get it again."
        )


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    # Before Transformers sees them: it builds lists and tensors of these sizes. Null means that the class decides.
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, largest in _LARGEST.items():
            value = part.get(key)
            if value is None:
                continue
            smallest = 0 if key in _MAY_BE_ZERO else 1
            if isinstance(value, int | float) and not smallest <= value <= largest:
                raise CheckpointError(
                    f"{path}: impossible {key}. Got {value!r}. Expected a whole number from {smallest} to {largest}. "
                    "Correct it."
                )


def _check_heads(text: Mapping[str, Any], path: Path) -> None:
    heads, groups = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise CheckpointError(
            f"{path}: num_attention_heads and num_key_value_heads do not fit together. Got {heads} and {groups}. "
            "Expected the first to be a multiple of the second. Correct them."
        )


def _check_experts(text: Mapping[str, Any], path: Path) -> None:
    chosen, experts = text.get("num_experts_per_tok"), text.get("num_experts") or text.get("num_local_experts")
    if isinstance(chosen, int) and isinstance(experts, int) and chosen > experts:
        raise CheckpointError(
            f"{path}: num_experts_per_tok is larger than the number of experts. Got {chosen}. Expected at most "
            f"{experts}. Correct it."
        )


def _check_padding(text: Mapping[str, Any], path: Path) -> None:
    padding, vocabulary = text.get("pad_token_id"), text.get("vocab_size")
    if isinstance(padding, int) and isinstance(vocabulary, int) and not -vocabulary <= padding < vocabulary:
        raise CheckpointError(
            f"{path}: pad_token_id is outside the vocabulary. Got {padding}. Expected an id below vocab_size, "
            f"{vocabulary}. Set it to null."
        )


def _check_rope(parameters: Any, text: Mapping[str, Any], path: Path) -> None:
    # Parameters as Transformers understands them, and what stands beside them.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415 - seconds to import

    if not isinstance(parameters, Mapping):
        return
    by_kind = [value for key, value in parameters.items() if key.endswith("_attention") and value is not None]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    for rope in by_kind or [parameters]:
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else rope
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if kind not in known:
            raise CheckpointError(
                f"{path}: unknown rope_type. Got {kind!r}. Expected one of {', '.join(known)}. Correct it."
            )
        for key, expected in _impossible(rope, head_dim):
            raise CheckpointError(f"{path}: impossible {key}. Got {rope.get(key)!r}. Expected {expected}. Correct it.")
    stated, used = text.get("rope_theta"), (parameters.get("full_attention") or parameters).get("rope_theta")
    if stated is not None and used is not None and stated != used:
        raise CheckpointError(
            f"{path}: two different rotary bases. Got rope_theta {stated!r} at the top level and {used!r} in "
            "rope_parameters. Expected the same. Transformers uses the second, other readers the first: delete the "
            "wrong one."
        )


def _impossible(rope: Mapping[str, Any], head_dim: int) -> Iterator[tuple[str, str]]:
    # Keys, and what is expected of them.
    needed = ("rope_theta", "partial_rotary_factor", *_ROPE_NEEDS.get(rope["rope_type"], ()))
    stated = {"rope_theta": None, **rope}
    checked = [key for key in stated if stated[key] is not None or key in needed]
    for key in checked:
        least = _ROPE_NUMBERS.get(key)
        if least is not None and not _is_number(stated[key], least):
            yield key, f"a number from {least} on" if least != _POSITIVE else "a positive number"
    share = stated.get("partial_rotary_factor", 1)
    if not _is_number(share, _POSITIVE, 1):
        yield "partial_rotary_factor", "a number from 0 to 1"
    pairs = int(head_dim * share) // 2
    for key in _ROPE_LISTS if rope["rope_type"] == "longrope" else ():
        factors = stated[key]
        if not isinstance(factors, list) or [_is_number(each, _POSITIVE) for each in factors] != [True] * pairs:
            yield key, f"a list of {pairs} positive numbers, as many as head_dim {head_dim} has rotated pairs"
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        yield "high_freq_factor", f"more than low_freq_factor, {rope['low_freq_factor']!r}"


def _is_number(value: Any, least: float, most: float = sys.float_info.max) -> bool:
    # JSON's true is a bool, which Python counts as an int.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
