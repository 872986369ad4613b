"""config.json as Transformers understands it: checked in one place, completed with what it leaves to a class.

Files leave sizes, epsilons and rotary bases to the defaults of Transformers' classes. Everything else reads the
completed config, so that what is measured, written and forecast is what Transformers computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from ...errors import BpwiseError, CheckpointError, UnsupportedModelError, reason
from .names import text_config
from .positions import check_rope

__all__ = [
    "QUANTIZED_KEYS",
    "complete_config",
    "decoder_config",
    "explain_transformers",
    "parse_config",
    "quantization_of",
]

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

_ALWAYS_THERE = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Keys that callers read of any decoder, by these names, even where a class has others: GPT-2's ``n_layer``."""

_PARTS = ("text_config", "vision_config")
"""Configs of a model's parts. Other keys may end in ``_config`` too: SmolLM2 ships ``is_llama_config: true``."""

_MOST_LEVELS = 20
"""Levels of objects and lists in a config; those of models have five."""

_MAY_BE_ZERO = ("shared_expert_intermediate_size", "num_experts", "num_local_experts")
"""Sizes that are zero where a model has none of these."""

_ACTIVATIONS = ("hidden_act", "hidden_activation")


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the key that says how weights are quantized, and its value; None if none does.

    Args:
        config: Parsed ``config.json``; the key may stand in the language model's part, too.
    """
    parts = (config, text_config(config))
    return next(((key, part[key]) for part in parts for key in QUANTIZED_KEYS if part.get(key) is not None), None)


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
    language = _text_of(parsed, path)
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
    check_rope(rope, text, path)
    return result


def decoder_config(alone: Mapping[str, Any], whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the config of a language model of any type, with what Transformers' class fills in.

    Args:
        alone: Config of the language model as its file has it.
        whole: Parsed ``config.json``; the same, or that of a model of which the language model is a part.
        path: Its file, for messages.

    Raises:
        CheckpointError: Transformers does not accept a value.
        UnsupportedModelError: This version of Transformers does not know the model type.
    """
    _check_parts(whole, path)
    parsed = parse_config(whole, path)
    text = _text_of(parsed, path)
    result = {**alone, "model_type": text.model_type}
    _complete(result, text)
    for part in (text, parsed):
        for key in _ALWAYS_THERE:
            value = getattr(part, key, None)
            if result.get(key) is None and value is not None:
                result[key] = value
    # The whole decides, by its class where its file is silent, but a part that is said to be tied is.
    stated = [part.get("tie_word_embeddings") for part in (alone, whole)]
    result["tie_word_embeddings"] = True in stated or getattr(parsed, "tie_word_embeddings", False)
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
    from transformers import __version__  # noqa: PLC0415 - seconds to import
    from transformers.activations import ACT2FN  # noqa: PLC0415
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{path}: Transformers {__version__} does not know model_type {model_type!r}. Expected one that it has "
            "code for: code that comes with a model is never run. Upgrade Transformers, or choose another model."
        )
    _check_sizes(config, path)
    with explain_transformers(path):  # which also tells of values that are nested too deep
        plain = {key: _with_floats(deepcopy(value)) for key, value in config.items() if key not in _NOT_PARSED}
        _rename_su(text_config(plain))
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


def _with_floats(value: Any) -> Any:
    # Transformers writes numbers that JSON has no word for as {"__float__": "Infinity"}.
    if isinstance(value, dict):
        named = value.get("__float__")
        if isinstance(named, str) and named in ("Infinity", "-Infinity", "NaN"):
            return float(named)
        return {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def _text_of(parsed: Any, path: Path) -> Any:
    text = parsed.get_text_config()
    if isinstance(text, Mapping):  # a class without parts keeps what the file has under this key
        raise CheckpointError(
            f"{path}: a text_config that no {parsed.model_type} model has. Got one in a model of a single part. "
            "Expected its keys at the top level. Move them there, or delete text_config."
        )
    return text


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
