"""Entries of config.json under the names that models are published with, which mlx-lm looks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

__all__ = ["published_keys"]


def published_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to add to a config that Transformers 5 has saved, which renames entries and gathers those of RoPE.

    ``save_pretrained`` writes ``num_local_experts`` for what the files of Qwen3 and mlx-lm call ``num_experts``, and
    ``rope_parameters`` for ``rope_theta`` and ``rope_scaling``: without these mlx-lm computes other positions.

    Args:
        config: A config.json; of what it has under either name, nothing is returned.
    """
    kind = str(config.get("model_type"))
    renamed = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    found = {old: config[new] for old, new in renamed.items() if new in config and isinstance(old, str)}
    ropes = config.get("rope_parameters")
    if isinstance(ropes, Mapping):
        found |= _rope_keys(ropes)
    return {key: value for key, value in found.items() if key not in config}


def _rope_keys(ropes: Mapping[str, Any]) -> dict[str, Any]:
    # Of a model with two, that of the blocks with full attention; of the other its base.
    rope = ropes.get("full_attention") or ropes
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    sliding = ropes.get("sliding_attention")
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return found
