"""A model seen with its positions stretched, as ExLlamaV2's ``-rs`` and ``-ra`` run it.

ExLlamaV2 forgets both when it has converted a model. Here they become part of the model: they stand in the config that
is measured, evaluated and written, in keys that every reader knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ConfigError
from ..model.names import text_config
from .checkpoint import Checkpoint, TensorSource
from .views import CheckpointView, SourceView

__all__ = ["RopeChange", "RopeView", "with_positions_of"]

_KEYS = ("rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings")
"""Where configs say how positions are rotated."""

_PLAIN = (None, "default", "linear")
"""Kinds of scaling that a linear factor can take the place of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeChange:
    """How rotary positions are stretched for contexts longer than a model was trained for.

    Attributes:
        scale: What positions are divided by, instead of what the config says; None leaves it.
        alpha: NTK alpha: the base is multiplied by alpha ** (d / (d - 2)), d being the rotated features of a head; None
            leaves it.
    """

    scale: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        for name, value in asdict(self).items():
            if value is not None and not 1 <= value < float("inf"):
                raise ConfigError(f"rope {name} must be a number from 1 up, got {value}.")

    def applied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's config with positions so stretched, and the most positions raised as much.

        Of a model with a base for each type of layer only the layers with full attention are changed: the others look
        no further than their window.

        Args:
            config: Parsed ``config.json``, as Transformers 4 or 5 writes it.

        Raises:
            ConfigError: The config states no base, or scales positions in a way that a factor cannot replace.
        """
        result = deepcopy(dict(config))
        text: Any = text_config(result)
        places = _places(text)
        if self.scale is not None:
            _set_scale(text, places, self.scale)
        if self.alpha is not None:
            _raise_base(text, places, self.alpha)
        positions = text.get("max_position_embeddings")
        if isinstance(positions, int):
            text["max_position_embeddings"] = round(positions * (self.scale or 1) * (self.alpha or 1))
        return result


class RopeView(CheckpointView):
    """A checkpoint whose config has its positions stretched; its weights are the same."""

    def __init__(self, base: Checkpoint, change: RopeChange) -> None:
        """Change a checkpoint's config.

        Args:
            base: The checkpoint.
            change: How.

        Raises:
            ConfigError: The config does not allow it.
        """
        super().__init__(base)
        self._change = change
        self._config = change.applied(base.config)

    @property
    def config(self) -> dict[str, Any]:
        """The changed config; not to be modified."""
        return self._config

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, of the base's fingerprint and the change."""
        return hashlib.sha256(f"{self._base.fingerprint} {self._change}".encode()).hexdigest()[:32]

    @property
    def changes(self) -> dict[str, Any]:
        """The base's changes and this one's."""
        named = {f"rope_{name}": value for name, value in asdict(self._change).items() if value is not None}
        return {**self._base.changes, **named}


class _Repositioned(SourceView):
    """A source with another config."""

    def __init__(self, base: TensorSource, config: dict[str, Any]) -> None:
        super().__init__(base)
        self._config = config

    @property
    def config(self) -> dict[str, Any]:
        return self._config


def with_positions_of(original: TensorSource, other: TensorSource) -> TensorSource:
    """Return a model as it must run to be compared with its original.

    Args:
        original: The original; if its positions are stretched, the other's become the same.
        other: What was made of it, whether its config says so already or not.
    """
    if not isinstance(original, RopeView):
        return other
    config = deepcopy(other.config)
    source = text_config(original.config)
    target: Any = text_config(config)
    for key in _KEYS:
        target.pop(key, None)
    target |= {key: source[key] for key in _KEYS if key in source}
    return _Repositioned(other, config)


def _places(text: dict[str, Any]) -> list[dict[str, Any]]:
    # Where settings of rotary positions stand beside the config's top level.
    found = [text[key] for key in ("rope_parameters", "rope_scaling") if isinstance(text.get(key), dict)]
    return [place["full_attention"] if isinstance(place.get("full_attention"), dict) else place for place in found]


def _set_scale(text: dict[str, Any], places: list[dict[str, Any]], scale: float) -> None:
    for place in places:
        kind = place.get("rope_type", place.get("type"))
        if kind not in _PLAIN or "mrope_section" in place:
            raise ConfigError(
                f"config.json: positions are scaled already, by rope_type {kind!r}, which --rope-scale cannot replace. "
                "Use --rope-alpha, or change that scaling in config.json."
            )
    for place in places:
        place.pop("type", None)
        place |= {"rope_type": "linear", "factor": scale}
    if not places:
        text["rope_scaling"] = {"rope_type": "linear", "factor": scale}


def _raise_base(text: dict[str, Any], places: list[dict[str, Any]], alpha: float) -> None:
    owners = [owner for owner in (text, *places) if isinstance(owner.get("rope_theta"), int | float)]
    if not owners:
        raise ConfigError(
            "config.json: no rope_theta, so there is no base that --rope-alpha could raise. Add the model's own."
        )
    features = _rotated_features(text, places)
    for owner in owners:
        owner["rope_theta"] = float(owner["rope_theta"] * alpha ** (features / (features - 2)))


def _rotated_features(text: dict[str, Any], places: list[dict[str, Any]]) -> int:
    if isinstance(text.get("qk_rope_head_dim"), int):
        return int(text["qk_rope_head_dim"])
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    shares = (owner.get("partial_rotary_factor") for owner in (text, *places))
    return int(head * next((share for share in shares if share is not None), 1.0))
