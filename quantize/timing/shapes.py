"""Shapes of a model's blocks, as far as the work of a run depends on them. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoint.model.cache import head_dim
from ...checkpoint.model.structure import BlockStructure
from ...checkpoint.source.language import LanguageModel
from ...checkpoint.source.linears import model_linears

__all__ = ["BlockShape", "GroupShape", "ModelShape"]

_CHOSEN_KEYS = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_k", "moe_topk")
"""Names that configs have for the number of experts that a token goes through."""

_CHOSEN = 2
"""That number where a config has another name for it."""

_ATTENDING = ("full_attention", "attention", "hybrid", "sliding_attention", "chunked_attention", "*")
"""What configs call blocks with attention; others mix positions at a cost that does not grow with their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """Linears that read the same input.

    Attributes:
        inputs: K, input channels.
        outputs: Output channels of each linear.
        joins: Whether what they make is added to the residual stream.
        share: Share of the tokens that go through them: less than 1 for an expert.
        expert: Whether they are an expert's.
    """

    inputs: int
    outputs: tuple[int, ...]
    joins: bool = False
    share: float = 1.0
    expert: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """A decoder block.

    Attributes:
        groups: Its input groups in the order of computation; alike experts once, with their number.
        heads: Heads of its attention; 0 for a block without attention.
        head_size: Width of a head.
        reach: Tokens that a query sees at most; None if that has no limit.
    """

    groups: tuple[tuple[GroupShape, int], ...]
    heads: int = 0
    head_size: int = 0
    reach: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(count * group.weights for group, count in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: How many blocks there are of each shape.
        hidden: Width of the residual stream.
        vocabulary: Rows of the output head.
        tied: Whether the head is the token embedding.
    """

    blocks: Mapping[BlockShape, int]
    hidden: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, source: LanguageModel) -> ModelShape:
        """Look at a model's config and the headers of its files.

        Raises:
            CheckpointError: A tensor that the family should have is missing.
        """
        linears, head = model_linears(source)
        shapes = {linear.name: (linear.in_features, linear.out_features) for linear in linears}
        blocks: Counter[BlockShape] = Counter()
        for index, structure in enumerate(source.structure.structures):
            groups = _groups(f"{source.blocks}.{index}", structure, shapes, source.config)
            blocks[_block(groups, index, source.config)] += 1
        return cls(blocks=blocks, hidden=head.in_features, vocabulary=head.out_features, tied=source.tied_embeddings)

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return sum(self.blocks.values())

    @property
    def weights(self) -> int:
        """Number of weights in all blocks' linears."""
        return sum(count * block.weights for block, count in self.blocks.items())

    @property
    def all_weights(self) -> int:
        """Number of weights in them and in the head."""
        return self.weights + self.vocabulary * self.hidden


def _groups(
    block: str, structure: BlockStructure, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any]
) -> Counter[GroupShape]:
    experts = len({group.expert for group in structure.groups if group.expert is not None})
    chosen = next(
        (config[key] for key in _CHOSEN_KEYS if isinstance(config.get(key), int) and config[key] > 0), _CHOSEN
    )
    groups: Counter[GroupShape] = Counter()
    for group in structure.groups:
        of_group = [shapes[f"{block}.{name}"] for name in group.linears]
        expert = group.expert is not None
        shape = GroupShape(
            inputs=of_group[0][0],
            outputs=tuple(outputs for _, outputs in of_group),
            joins=group.joins_stream,
            share=min(1.0, chosen / experts) if expert else 1.0,
            expert=expert,
        )
        groups[shape] += 1
    return groups


def _block(groups: Counter[GroupShape], index: int, config: Mapping[str, Any]) -> BlockShape:
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    kind = kinds[index] if index < len(kinds) else _ATTENDING[0]
    heads = config.get("num_attention_heads")
    together = tuple(groups.items())
    known = "head_dim" in config or "hidden_size" in config
    if not isinstance(heads, int) or heads < 1 or not known or kind not in _ATTENDING:
        return BlockShape(groups=together)
    window = config.get("sliding_window") if kind == "sliding_attention" else None
    return BlockShape(groups=together, heads=heads, head_size=head_dim(config), reach=window)
