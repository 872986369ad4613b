"""How far a model's blocks look and how their positions are rotated: what readers of other formats may leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

__all__ = ["attention_window", "full_rope", "window_period"]

_SLIDING, _FULL = "sliding_attention", "full_attention"


def attention_window(text: Any) -> int | None:
    """Return the most positions that blocks with a sliding window look back on.

    Args:
        text: Transformers' config object of a language model.

    Returns:
        The window in tokens, the current one included; None if no block has one, or none that is shorter than the
        model's longest row.
    """
    window = getattr(text, "sliding_window", None)
    by_block = any(field.name == "layer_types" for field in fields(text))
    if not window or (by_block and _SLIDING not in text.layer_types):
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
