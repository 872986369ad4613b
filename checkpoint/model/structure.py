"""The structure of a model as measuring and rounding need it: linears, what they read, and where their outputs go.

A block is worked through in input groups. The linears of one read a common input and share its Hessian, and none
of them depends on the others. Input groups come in the order in which the block computes them, those of experts last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BlockStructure", "InputGroup", "LinearPlace", "ModelStructure"]


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears of a block that read the same input and share its statistics.

    Queries, keys and values are groups of their own: their gradients lie on different tokens, so that one Hessian
    for all three would take queries for several times less than they matter.

    Attributes:
        linears: Names inside the block, for example ``self_attn.q_proj``.
        adds: Module whose output is added to the residual stream once the group is done; None for a group whose output
            stays inside the block, or joins the stream in another way than by a scale and one norm.
        normed: Whether that module is a norm, which the input group's one linear feeds.
        expert: Number of the expert that the linears belong to; None outside of experts.
        reads_stream: Whether the linears read what a norm makes of the residual stream, and not values or neurons.
        scale: What the output is multiplied by before it is added to the stream.
    """

    linears: tuple[str, ...]
    adds: str | None = None
    normed: bool = False
    expert: int | None = None
    reads_stream: bool = False
    scale: float = 1.0

    @property
    def first(self) -> str:
        """The first of the linears: its input is that of all."""
        return self.linears[0]

    @property
    def joins_stream(self) -> bool:
        """Whether the output is added to the residual stream."""
        return self.adds is not None


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """Where the weight of a linear lies in Transformers' model.

    Attributes:
        parameter: Name of the parameter inside the block, for example ``mlp.experts.gate_up_proj``.
        expert: Index into its first dimension; None where the parameter is one matrix.
        rows: First output and the one after the last, where the linear is a part of the parameter's outputs only.
        turned: Whether it is stored as (in, out), as GPT-2's and the experts of gpt-oss are.
    """

    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """The linears of one block.

    Attributes:
        groups: Its input groups.
        places: Where the weight of each linear lies, by its name inside the block.
        routers: Linears inside the block whose outputs choose experts; they are not quantized and in no group.
        experts: Modules inside the block that hold the experts' matrices.
        norms: By the path of a norm the matrices that read its output, routers and stacks of experts among them, where
            nothing else does; only of blocks that were traced. Blocks are compared without them.
    """

    groups: tuple[InputGroup, ...]
    places: Mapping[str, LinearPlace] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    norms: Mapping[str, tuple[LinearPlace, ...]] = field(default_factory=dict, compare=False)

    @property
    def plain_groups(self) -> tuple[InputGroup, ...]:
        """The input groups outside of experts."""
        return tuple(group for group in self.groups if group.expert is None)


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The linears of a whole model.

    Attributes:
        blocks: Name of the list of decoder blocks; block i is ``{blocks}.{i}``.
        embedding: Name of the module that holds the token embeddings.
        head: Name of the module that is the output head.
        structures: One a block.
    """

    blocks: str
    embedding: str
    head: str
    structures: tuple[BlockStructure, ...]

    def linears_in(self, parameter: str) -> dict[str, LinearPlace]:
        """Return the weights of linears that lie in a parameter of a block, and where in it.

        Args:
            parameter: Its full name in Transformers' model.

        Returns:
            Places by the full names of weights, as ``model.layers.0.mlp.experts.3.down_proj.weight``.
        """
        index, _, inner = parameter.removeprefix(f"{self.blocks}.").partition(".")
        if not parameter.startswith(f"{self.blocks}.") or not index.isdecimal():
            return {}
        places = self.structures[int(index)].places.items()
        return {f"{self.blocks}.{index}.{name}.weight": place for name, place in places if place.parameter == inner}
