"""Plans: what every linear or tensor of a model gets, and what that is expected to cost."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from ..checkpoint.files.atomic import write_json
from ..checkpoint.files.schemas import check_schema
from ..errors import ConfigError
from ..tables import Table, bytes_text
from .model import Description

if TYPE_CHECKING:
    from ..measure.measurement import Measurement

__all__ = ["LinearCost", "Plan", "PlannedTensor", "TensorsPlan", "planned_context", "round_up", "shown_range"]

_IN_BLOCK = re.compile(r"(?:[^.]+\.)+?(\d{1,9})\..+", re.ASCII)


_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
_Some = Annotated[int, msgspec.Meta(ge=0, le=1 << 28)]


class _CacheConfig(msgspec.Struct):
    """What the size of a context's cache is computed from: measurements may come from anybody."""

    hidden_size: _Size
    vocab_size: _Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    num_attention_heads: _Size | msgspec.UnsetType = msgspec.UNSET
    intermediate_size: _Some | list[_Some] | None = None
    num_key_value_heads: _Some | None = None
    num_global_key_value_heads: _Some | None = None
    head_dim: _Some | None = None
    global_head_dim: _Some | None = None
    sliding_window: _Some | None = None
    kv_lora_rank: _Some | None = None
    qk_rope_head_dim: _Some | None = None
    num_kv_shared_layers: _Some | None = None
    attn_layer_period: _Some | None = None
    attn_layer_offset: _Some | None = None
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Size and expected damage of one linear, or of the token embeddings.

    Attributes:
        name: Full name of the module.
        bpw: Bits per weight, overheads included.
        damage_nats: Damage that the plan predicted, nats per token; None if it is not known.
        weights: Number of its weights; 0 where that does not matter.
    """

    name: str
    bpw: float
    damage_nats: float | None = None
    weights: int = 0

    @property
    def block(self) -> int | None:
        """Index of the decoder block; None outside of them."""
        match = _IN_BLOCK.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """Last part of the name, as ``q_proj``: what blocks have in common."""
        return self.name.rpartition(".")[2]


class Plan(ABC):
    """What every linear or tensor of a model gets. Made from a measurement, saved as JSON.

    A plan is a dataclass; by default all that it tells follows from its ``costs``.
    """

    format: ClassVar[str]
    """Name of its format."""

    def __repr__(self) -> str:
        """Return format, bits per weight and predicted damage."""
        damage = "" if self.damage_nats is None else f", predicted damage {self.damage_nats:.3g} nats/token"
        return f"{type(self).__name__}({self.bpw:.4f} bpw{damage})"

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    @abstractmethod
    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every linear gets and is expected to cost, in model order."""

    @property
    def damage_nats(self) -> float | None:
        """Predicted damage, nats per token; formats whose plans need no measurement return None for such."""
        return sum(cost.damage_nats or 0.0 for cost in self.costs())

    @property
    def bpw(self) -> float:
        """Bits per weight as a target in bits means them."""
        costs = self.costs()
        return sum(cost.weights * cost.bpw for cost in costs) / sum(cost.weights for cost in costs)

    @property
    def gap(self) -> float | None:
        """How far the predicted damage may be above the best possible, as a fraction of it; None if it is not known."""
        return None

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors together, roughly, in bytes."""
        return round(sum(cost.weights * cost.bpw for cost in self.costs()) / 8)

    @property
    def vram_bytes(self) -> int:
        """Those of them that readers keep in a GPU's memory, as far as it differs from plan to plan."""
        return self.stored_bytes

    def shares(self) -> dict[str, float]:
        """Return the share of the planned weights in each width or type, the largest first."""
        counts: Counter[float] = Counter()
        for cost in self.costs():
            counts[cost.bpw] += cost.weights
        return {f"{bpw:g} bits": counts[bpw] / counts.total() for bpw in sorted(counts, reverse=True)}

    def identity(self) -> Any:
        """Return all of it that rounding and written bytes depend on, as plain JSON."""
        return self._entries()

    def describe(self) -> Description:
        """Return what is in it."""
        rows = tuple((cost.name, f"{cost.bpw:.3f}", f"{cost.damage_nats or 0:.2e}") for cost in self.costs())
        return Description(
            kind=f"plan for {self.format}",
            facts=(f"{self.bpw:.4f} bits per weight, predicted damage {self.damage_nats or 0:.6f} nats/token",),
            table=Table(("linear", "bpw", "damage, nats/token"), rows),
            content=self.content(),
        )

    def content(self) -> dict[str, Any]:
        """Return what all formats' plans tell, for programs, in types that JSON has."""
        return {
            "format": self.format,
            "bpw": self.bpw,
            "tensors_bytes": self.stored_bytes,
            "damage_nats": self.damage_nats,
            "gap": self.gap,
            "shares": self.shares(),
            "linears": [{"name": cost.name, "bpw": cost.bpw, "damage_nats": cost.damage_nats} for cost in self.costs()],
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), {"bpwise_plan": 1, "format": self.format, **self._entries()})

    def _entries(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # formats' plans are dataclasses


class PlannedTensor(Protocol):
    """A tensor of a ``TensorsPlan``."""

    @property
    def weights(self) -> int:
        """Number of its weights."""

    @property
    def stored_bytes(self) -> int:
        """Size of its data."""

    @property
    def damage_nats(self) -> float | None:
        """Predicted damage, nats per token; None where nothing was measured of it."""


_Tensor = TypeVar("_Tensor", bound=PlannedTensor)


class TensorsPlan(Plan, Generic[_Tensor]):
    """A plan that gives every tensor of a model one type or scheme; bits per weight are over all of its tensors.

    Attributes:
        tensors: All that may be quantized: in model order what was measured, the token embeddings last.
        other_weights: Weights in tensors that stay as they are.
        other_bytes: Size of these.
        target_bytes: Most bytes that all tensors together may take.
        lower_bound_nats: No choice within the target has a smaller predicted damage.
        measurement: Fingerprint of the measurement behind the plan.
    """

    tensors: tuple[_Tensor, ...]
    other_weights: int
    other_bytes: int
    target_bytes: int
    lower_bound_nats: float
    measurement: str

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return sum(tensor.weights for tensor in self.tensors) + self.other_weights

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors' data, of those that stay too."""
        return sum(tensor.stored_bytes for tensor in self.tensors) + self.other_bytes

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.stored_bytes / self.weights

    @property
    def damage_nats(self) -> float:
        """Predicted damage, nats per token, of all that was measured."""
        return sum(tensor.damage_nats or 0.0 for tensor in self.tensors)

    @property
    def gap(self) -> float:
        """How far the predicted damage may be above the best possible, as a fraction of it."""
        return self.damage_nats / self.lower_bound_nats - 1 if self.lower_bound_nats > 0 else 0.0

    @property
    def facts(self) -> tuple[str, ...]:
        """Size, damage and shares, as lines."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items())
        return (
            f"{self.bpw:.4f} bits per weight over all tensors, {bytes_text(self.stored_bytes)} (at most "
            f"{bytes_text(self.target_bytes)} asked)",
            f"predicted damage {self.damage_nats:.6f} nats/token (no plan of this size can go below "
            f"{self.lower_bound_nats:.6f})",
            f"weights: {shares}",
        )


def planned_context(measurement: Measurement, asked: int | None) -> tuple[Mapping[str, Any], int]:
    """Return a measured model's config, and the length of the context whose cache a GPU should hold.

    Args:
        measurement: The measurement.
        asked: Tokens of the context; None for the most that the model has positions for.

    Raises:
        ConfigError: The measurement does not tell the config, or the config no length, or no possible sizes.
    """
    if not measurement.config:
        raise ConfigError("--vram: this measurement is of an earlier version and has no config.json. Measure again.")
    context = asked or measurement.config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise ConfigError("--vram: config.json says no length of the context. Give it with --context.")
    config = dict(measurement.config)
    check_schema(config, _CacheConfig, ConfigError, where="--vram: config.json", remedy="Measure the model again.")
    return config, context


def shown_range(lowest: float, highest: float) -> str:
    """Return a range of bits per weight for a message: four decimals, both ends large enough to be met from below."""
    return f"{round_up(lowest):.4f} to {round_up(highest):.4f}"


def round_up(bpw: float) -> float:
    """Return bits per weight rounded up to four decimals; 4.65 * 1e4 is a little above 46500."""
    return math.ceil(round(bpw * 1e4, 6)) / 1e4
