"""How far a model's blocks look and how their positions are rotated: what readers of other formats may leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

__all__ = ["attention_window", "full_rope", "stated_rope", "window_period"]

_SLIDING, _FULL = "sliding_attention", "full_attention"


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
