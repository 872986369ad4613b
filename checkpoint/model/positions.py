"""How far a model's blocks look and how their positions are rotated: what readers of other formats may leave out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

__all__ = ["attention_window", "check_rope", "full_rope", "stated_rope", "window_period"]

_SLIDING, _FULL = "sliding_attention", "full_attention"

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


def attention_window(text: Any) -> int | None:
    """Return the most positions that blocks with a sliding window look back on.

    Args:
        text: Transformers' config object of a language model.

    Returns:
        The window in tokens, the current one included; None if no block has one, or none that is shorter than the
        model's longest row.
    """
    # A config object keeps whatever the file states; its class computes with the fields that it declares.
    declared = {field.name for field in fields(text)}
    window = text.sliding_window if "sliding_window" in declared else None
    if not window or ("layer_types" in declared and _SLIDING not in text.layer_types):
        return None
    return int(window) if window < text.max_position_embeddings else None


def full_rope(text: Any) -> dict[str, Any]:
    """Return how positions are rotated, of a model with two ropes that of the blocks with full attention.

    Args:
        text: Transformers' config object of a language model.
    """
    parameters: dict[str, Any] = text.rope_parameters
    full = parameters.get(_FULL)
    return full if isinstance(full, dict) else parameters


def stated_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_type, rope_theta and what belongs to them, in the names of Transformers 5; of two ropes as above.

    Args:
        config: config.json of a language model, of a family that is known here or not.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling")
    found = found if isinstance(found, dict) else {}
    full = found.get(_FULL)
    rope = dict(full if isinstance(full, dict) else found)
    rope.setdefault("rope_type", rope.get("type"))
    rope.setdefault("rope_theta", config.get("rope_theta"))
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return rope


def window_period(kinds: Sequence[str]) -> int | None:
    """Return every how many blocks one has full attention where all others have a sliding window.

    Args:
        kinds: ``layer_types`` of a config.

    Returns:
        At least 2, and more than the number of blocks if none has full attention; None if there is no such period.
    """
    period = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
    periodic = [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(len(kinds))]
    return period if period > 1 and list(kinds) == periodic else None


def check_rope(parameters: Any, text: Mapping[str, Any], path: Path) -> None:
    """Refuse rotary embeddings that Transformers cannot compute, or that contradict what stands beside them.

    Args:
        parameters: ``rope_parameters`` as Transformers understands them.
        text: Config of the language model.
        path: Its file, for messages.

    Raises:
        CheckpointError: A value is impossible, or there are two different ones.
    """
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
