"""Which type llama-quantize gives to each tensor of a model under one of its mixtures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from ....errors import ConfigError, UnsupportedModelError
from ..file.header import GgufHeader, GgufTensor
from ..file.roles import Role, layer_of, quantizable, role_of, trimmed, writing_order
from ..ggml.types import TYPES, GgmlType
from .mixtures import Mixture, Spot

__all__ = ["fallback", "mixture_types", "require_importance"]

_OWN_RULES = ("glm5-next", "bailingmoe3")
"""Architectures for which llama.cpp has rules that are not in the tables here."""


_BLIND_IS_GARBAGE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")

# What llama.cpp takes where a row is not a whole number of blocks of 256.
_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def mixture_types(chosen: Mixture, header: GgufHeader, *, importance: Container[str] | None) -> dict[str, GgmlType]:
    """Return the type that llama-quantize gives to each tensor of a model.

    Args:
        chosen: The mixture.
        header: The unquantized model.
        importance: Names of the tensors whose importances are known; None if no importance matrix is given.

    Returns:
        The type of every tensor, by name; tensors that stay as they are have the type that they have.

    Raises:
        ConfigError: A tensor would be garbage without importances, and has none.
        UnsupportedModelError: llama.cpp has rules of its own for this architecture.
    """
    architecture = str(header.metadata.get("general.architecture"))
    if architecture in _OWN_RULES:
        raise UnsupportedModelError(
            f"{header.path}: llama.cpp has rules of its own for architecture {architecture!r}, which bpwise does not "
            "know. Give a size instead of a mixture."
        )
    rules = _Rules(chosen, header, importance is not None)
    result = {name: rules.type_of(header.tensors[name]) for name in writing_order(header)}
    for name, kind in result.items():
        known = importance is not None and name in importance
        if not known and _needs_importance(name, kind, chosen) and kind != header.tensors[name].type:
            raise _blind(name, kind, chosen)
    return result


def require_importance(chosen: Mixture, row_weights: int) -> None:
    """Refuse a mixture that ``mixture_types`` would refuse without importances, before there is a file.

    It looks at the first query projection: every mixture that needs importances needs them for that.

    Args:
        chosen: The mixture.
        row_weights: Inputs of the projection.

    Raises:
        ConfigError: They would be garbage without importances.
    """
    first = Spot(index=0, count=1, queries_per_kv=1, experts=0, falcon=False, importance=False)
    asked = next((kind for holds, kind in chosen.exceptions.get(Role.Q, ()) if holds(first)), chosen.default)
    name, kind = "blk.0.attn_q.weight", fallback(TYPES[asked], row_weights)
    if _needs_importance(name, kind, chosen):
        raise _blind(name, kind, chosen)


class _Rules:
    """Goes through the tensors of a model in their order and counts them, as llama.cpp does."""

    def __init__(self, chosen: Mixture, header: GgufHeader, importance: bool) -> None:
        self._chosen = chosen
        self._importance = importance
        self._architecture = str(header.metadata["general.architecture"])
        self._layers = self._number(header, "block_count", 0)
        self._experts = self._number(header, "expert_count", 0)
        self._heads = self._number(header, "attention.head_count", 0)
        self._kv_heads = self._number(header, "attention.head_count_kv", self._heads)
        self._values = sum(role_of(name) is Role.V for name in header.tensors)
        self._tied = "output.weight" not in header.tensors
        self._seen: Counter[Role] = Counter()

    def type_of(self, tensor: GgufTensor) -> GgmlType:
        default = TYPES[self._chosen.default]
        if not quantizable(tensor.name, tensor.shape):
            return tensor.type
        if not default.quantized:
            return default
        return fallback(TYPES[self._name(tensor)], tensor.shape[-1])

    def _name(self, tensor: GgufTensor) -> str:
        chosen, role = self._chosen, role_of(tensor.name)
        if role is Role.OUTPUT or (role is Role.EMBEDDING and self._tied):
            fits = TYPES[chosen.default].fits(tensor.shape[-1]) and self._architecture != "falcon"
            return chosen.output if fits else "Q8_0"
        if chosen.name == "MXFP4_MOE":
            return "MXFP4" if len(trimmed(tensor.shape)) > 2 else "Q8_0"
        if role is Role.EMBEDDING:
            return chosen.embedding or chosen.default
        spot = self._spot(tensor.name, role)
        self._seen[role] += 1
        name = next((kind for holds, kind in chosen.exceptions.get(role, ()) if holds(spot)), chosen.default)
        if not chosen.low and role in (Role.V, Role.K):
            if role is Role.V and self._is_70b() and name in ("Q3_K", "Q4_K"):
                name = "Q5_K"
            if self._experts == 8:
                name = "Q8_0"
        return name

    def _spot(self, name: str, role: Role) -> Spot:
        index = self._seen[role]
        # llama.cpp's mixtures at two bits count the down projections even in models of experts.
        if self._experts > 1 and role in (Role.UP, Role.GATE, Role.DOWN) and not self._chosen.low:
            index = layer_of(name)
        return Spot(
            index=index,
            count=self._values if role is Role.V else self._layers,
            queries_per_kv=self._heads // self._kv_heads if self._kv_heads else 0,
            experts=self._experts,
            falcon=self._architecture == "falcon",
            importance=self._importance,
        )

    def _is_70b(self) -> bool:
        # The sizes that llama.cpp calls 70B; it gives their few values more bits.
        if self._architecture == "llama":
            return self._layers == 80 and self._heads != self._kv_heads and self._experts != 8
        return (self._architecture, self._layers) in (("deci", 80), ("olmo", 80), ("qwen2", 80), ("jais2", 68))

    def _number(self, header: GgufHeader, key: str, default: int) -> int:
        value = header.metadata.get(f"{self._architecture}.{key}", default)
        # Some models have one number a layer; llama.cpp then looks at the first.
        return int(value) if isinstance(value, int) else int(value[0])


def fallback(kind: GgmlType, row_weights: int) -> GgmlType:
    """Return the type that llama.cpp takes for rows of that many weights where it would take ``kind``."""
    if kind.fits(row_weights):
        return kind
    smaller = TYPES[_FALLBACKS.get(kind.name, kind.name)]
    return smaller if smaller.fits(row_weights) else TYPES["F16"]


def _blind(name: str, kind: GgmlType, chosen: Mixture) -> ConfigError:
    return ConfigError(
        f"{chosen.name}: {name} at {kind.name} would be garbage without importances. Got none. Measure the model, or "
        "give an imatrix file."
    )


def _needs_importance(name: str, kind: GgmlType, chosen: Mixture) -> bool:
    if role_of(name) in (Role.EMBEDDING, Role.OUTPUT):
        return False
    return kind.name in _BLIND_IS_GARBAGE or (kind.name == "Q2_K" and chosen.name == "Q2_K_S")
