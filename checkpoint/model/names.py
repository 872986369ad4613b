"""What the names of tensors tell: their place in the model, and the size that config.json gives them.

Files store columns padded to a multiple of 32, so the true number of output features comes from the config
alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = [
    "HEAD",
    "config_features",
    "embedding_name",
    "head_name",
    "head_names",
    "is_linear",
    "model_order",
    "text_config",
]

HEAD = "lm_head"
"""Name of the output head, the one linear outside the decoder."""

_HEADS = (f"{HEAD}.weight", f"language_model.{HEAD}.weight")
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)

# For the last component of a linear's name: the config sizes that give its (input, output) features.
_FEATURES = {
    HEAD: ("hidden", "vocabulary"),
    "q_proj": ("hidden", "queries"),
    "k_proj": ("hidden", "keys"),
    "v_proj": ("hidden", "keys"),
    "o_proj": ("queries", "hidden"),
    "gate_proj": ("hidden", "intermediate"),
    "up_proj": ("hidden", "intermediate"),
    "down_proj": ("intermediate", "hidden"),
    "w1": ("hidden", "intermediate"),
    "w2": ("intermediate", "hidden"),
    "w3": ("hidden", "intermediate"),
    "c_fc": ("hidden", "intermediate"),
    "c_proj": ("intermediate", "hidden"),
}


_NUMBER = re.compile(r"[0-9]{1,9}")
"""A block's or an expert's; whatever else Unicode calls a digit is none."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config: ``text_config`` if there is one, else the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def config_features(name: str, config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return (input, output) features of a linear, each None if the config does not say.

    Args:
        name: Full name of the linear, without ``.weight``; its last component decides.
        config: Parsed config.json.
    """
    wanted = _FEATURES.get(name.rpartition(".")[2])
    if wanted is None:
        return None, None
    text = text_config(config)
    sizes: dict[str, Any] = {
        "hidden": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size", config.get("vocab_size")),
        "intermediate": _intermediate_size(name, text),
    }
    heads = text.get("num_attention_heads")
    head_size = text.get("head_dim")
    if not head_size and isinstance(heads, int) and heads and isinstance(sizes["hidden"], int):
        head_size = sizes["hidden"] // heads
    for key, count in (("queries", heads), ("keys", text.get("num_key_value_heads") or heads)):
        sizes[key] = count * head_size if isinstance(count, int) and isinstance(head_size, int) else None
    first, second = (sizes[key] if isinstance(sizes[key], int) else None for key in wanted)
    return first, second


def embedding_name(names: Collection[str]) -> str | None:
    """Return the name of the table of token embeddings, or None if no tensor has one of the usual names."""
    return next((name for name in _EMBEDDINGS if name in names), None)


def head_name(names: Collection[str]) -> str | None:
    """Return the name of the output head's weight, or None if none is stored."""
    return next((name for name in _HEADS if name in names), None)


def head_names(names: Iterable[str]) -> set[str]:
    """Return the names of the output head's tensors, whatever prefix they have."""
    return {name for name in names if HEAD in name.split(".")[:-1]}


def is_linear(name: str) -> bool:
    """Return whether a name is that of a linear that readers can take quantized, or as float16 ``.weight``.

    Args:
        name: Full name, without ``.weight``.
    """
    return name.rpartition(".")[2] in _FEATURES


def model_order(name: str) -> tuple[Any, ...]:
    """Return a sort key that puts tensors into model order: embedding, layers by number, final norm, head.

    Args:
        name: Full name of a tensor or a linear.
    """
    parts = tuple((0, int(part), "") if _NUMBER.fullmatch(part) else (1, 0, part) for part in name.split("."))
    if "embed" in name or ".wte" in name:
        rank = 0
    elif HEAD in name.split("."):
        rank = 3
    else:
        rank = 1 if re.search(r"\.\d+\.", name) else 2
    return (rank, parts)


def _intermediate_size(name: str, text: Mapping[str, Any]) -> Any:
    if ".shared_expert." in name and "shared_expert_intermediate_size" in text:
        return text["shared_expert_intermediate_size"]
    if ".experts." in name and "moe_intermediate_size" in text:
        return text["moe_intermediate_size"]
    return text.get("intermediate_size")
