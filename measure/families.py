"""How each model family is cut into blocks and linears: data, one entry a family.

A block is worked through in stages. The linears of a stage read one common input, so they share its Gram matrix, and
none of them depends on the others. Stages come in the order in which the block computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError

__all__ = ["BLOCK_OUTPUT", "HEAD", "Family", "Stage", "family_of"]

BLOCK_OUTPUT = ""
"""The place where a block's last stage meets the residual stream: the block's own output."""

HEAD = "lm_head"
"""Full name of the output head."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Linears of a block that read the same input.

    Attributes:
        linears: Names inside the block, for example ``self_attn.q_proj``.
        joins: Where the stage's output has been added to the residual stream: the name of the submodule that
            reads the sum, ``BLOCK_OUTPUT``, or None for a stage whose output stays inside the block.
    """

    linears: tuple[str, ...]
    joins: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Architecture families that share names and structure.

    Attributes:
        stages: Stages of every decoder block, in the order of computation.
        blocks: Name of the list of decoder blocks; block i is ``{blocks}.{i}``.
    """

    stages: tuple[Stage, ...]
    blocks: str = "model.layers"

    def linear_names(self, block: int, stage: Stage) -> tuple[str, ...]:
        """Return the full names of a stage's linears in one block."""
        return tuple(f"{self.blocks}.{block}.{name}" for name in stage.linears)


_PRE_NORM = Family(
    stages=(
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(("self_attn.o_proj",), joins="post_attention_layernorm"),
        Stage(("mlp.gate_proj", "mlp.up_proj")),
        Stage(("mlp.down_proj",), joins=BLOCK_OUTPUT),
    )
)

_FAMILIES = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names in ``model_type``.

    Raises:
        UnsupportedModelError: The model type is unknown; the message lists those that are known.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not supported, expected one of {', '.join(_FAMILIES)}."
        )
    return family
