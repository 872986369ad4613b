"""The structure of a model as JSON: each kind of block once, and of its experts one for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ...errors import BpwiseError
from ..files.schemas import Count, Number, check_schema
from .structure import BlockStructure, InputGroup, LinearPlace, ModelStructure

__all__ = ["structure_from_json", "structure_to_json"]

_MOST_LINEARS = 1 << 20
"""Linears of all kinds of block together that are read: ten times what the largest models have."""


class _Linear(msgspec.Struct, frozen=True, omit_defaults=True):
    """A linear and where it lies; of an expert's, names are what follows its number, or the experts' module."""

    name: str
    parameter: str
    rows: tuple[Count, Count] | None = None
    turned: bool = False


class _Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input group, as ``InputGroup``."""

    linears: Annotated[tuple[_Linear, ...], msgspec.Meta(min_length=1)]
    adds: str | None = None
    normed: bool = False
    reads_stream: bool = False
    scale: Number = 1.0


class _Experts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The experts that one module holds, all alike: their number, and the input groups of each.

    Names of linears begin with the module's, or with ``prefix`` where a table gives them others.
    """

    module: str
    count: Count
    groups: tuple[_Group, ...]
    prefix: str | None = None


class _Block(msgspec.Struct, frozen=True, omit_defaults=True):
    """A kind of block, as ``BlockStructure``."""

    groups: tuple[_Group, ...] = ()
    experts: tuple[_Experts, ...] = ()
    routers: tuple[str, ...] = ()


class _Model(msgspec.Struct, frozen=True):
    """A model, as ``ModelStructure``: the kind of each block, as an index into ``kinds``."""

    blocks: str
    embedding: str
    head: str
    kinds: tuple[_Block, ...]
    kind_of_block: tuple[Count, ...]

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            ValueError: A kind is missing, or there are more linears than in any model.
        """
        if not all(kind < len(self.kinds) for kind in self.kind_of_block):
            raise ValueError("kind_of_block must hold indices into kinds")
        stacks = [stack for kind in self.kinds for stack in kind.experts]
        if sum(stack.count * len(group.linears) for stack in stacks for group in stack.groups) > _MOST_LINEARS:
            raise ValueError(f"all experts together must have at most {_MOST_LINEARS} linears")


def structure_to_json(structure: ModelStructure) -> dict[str, Any]:
    """Return a structure as what JSON can hold; the experts of a module must be alike but for their number."""
    kinds: list[BlockStructure] = []
    for block in structure.structures:
        if block not in kinds:
            kinds.append(block)
    model = _Model(
        blocks=structure.blocks,
        embedding=structure.embedding,
        head=structure.head,
        kinds=tuple(_packed_block(kind) for kind in kinds),
        kind_of_block=tuple(kinds.index(block) for block in structure.structures),
    )
    built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(model))
    return built


def structure_from_json(value: Any, error: type[BpwiseError], *, where: str) -> ModelStructure:
    """Return the structure that ``structure_to_json`` has made JSON of; blocks of one kind share one object.

    Args:
        value: Parsed JSON.
        error: What to raise.
        where: The file, and the place in it.

    Raises:
        BpwiseError: As the type given by ``error``: something is missing, of another type or out of range.
    """
    model = check_schema(value, _Model, error, where=where)
    kinds = [_unpacked_block(kind) for kind in model.kinds]
    structures = tuple(kinds[kind] for kind in model.kind_of_block)
    return ModelStructure(model.blocks, model.embedding, model.head, structures)


def _packed_block(block: BlockStructure) -> _Block:
    packed = _Block(
        groups=tuple(_packed_group(group, block.places) for group in block.groups if group.expert is None),
        experts=tuple(_packed_experts(module, block) for module in block.experts),
        routers=block.routers,
    )
    assert _unpacked_block(packed) == block, "experts differ"
    return packed


def _packed_experts(module: str, block: BlockStructure) -> _Experts:
    experts = (group for group in block.groups if group.expert is not None)
    own = [group for group in experts if block.places[group.first].parameter.startswith(f"{module}.")]
    prefix, _, _ = own[0].first.rpartition(f".{own[0].expert}.")
    return _Experts(
        module=module,
        count=len({group.expert for group in own}),
        groups=tuple(_packed_group(group, block.places, f"{prefix}.0.") for group in own if group.expert == 0),
        prefix=None if prefix == module else prefix,
    )


def _packed_group(group: InputGroup, places: Mapping[str, LinearPlace], prefix: str = "") -> _Group:
    linears = tuple(
        _Linear(name.removeprefix(prefix), place.parameter, place.rows, place.turned)
        for name, place in ((name, places[name]) for name in group.linears)
    )
    return _Group(linears, group.adds, group.normed, group.reads_stream, group.scale)


def _unpacked_block(block: _Block) -> BlockStructure:
    groups: list[InputGroup] = []
    places: dict[str, LinearPlace] = {}
    numbers: list[tuple[tuple[_Group, ...], int | None, str]] = [(block.groups, None, "")]
    for stack in block.experts:
        prefix = stack.prefix or stack.module
        numbers += [(stack.groups, expert, f"{prefix}.{expert}.") for expert in range(stack.count)]
    for packed, expert, prefix in numbers:
        for group in packed:
            names = tuple(f"{prefix}{linear.name}" for linear in group.linears)
            groups.append(InputGroup(names, group.adds, group.normed, expert, group.reads_stream, group.scale))
            for name, linear in zip(names, group.linears, strict=True):
                places[name] = LinearPlace(linear.parameter, expert, linear.rows, linear.turned)
    return BlockStructure(tuple(groups), places, block.routers, tuple(stack.module for stack in block.experts))
