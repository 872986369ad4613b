"""The language model of a checkpoint as Transformers has it in memory, and what each of its parameters is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ..model.config import parse_config
from ..model.structure import LinearPlace, ModelStructure
from ..trace.model import discover, list_of_blocks
from .empty import empty_decoder, empty_whole, module_name
from .plan import LoadPlan

__all__ = ["ModelInMemory", "StoredTensors", "assembled", "model_in_memory"]

_SHOWN = 3


class StoredTensors(Protocol):
    """What tensors are read from."""

    @property
    def directory(self) -> Path:
        """Where ``config.json`` is."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json``."""

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""

    def entry(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first dimension, reading no other where that can be."""


class ModelInMemory:
    """Names, shapes and origins of the parameters and persistent buffers of a language model; holds no weights.

    Attributes:
        skeleton: Transformers' causal language model on the meta device.
        blocks: Full name of the list of its decoder blocks.
        embedding: Full name of the module with the token embeddings.
        head: Full name of the output head.
        names: Parameters and persistent buffers that are stored, under their names in ``skeleton``.
        others: Stored tensors that are not the language model's.
    """

    def __init__(
        self,
        alone: Mapping[str, Any],
        whole: Mapping[str, Any] | None,
        stored: Mapping[str, tuple[int, ...]],
        path: Path,
    ) -> None:
        """Match stored tensors with parameters; reads no weights.

        Args:
            alone: Config of the language model as if it stood alone.
            whole: Parsed config.json of the model of several parts that it is one of; None if there are no others.
            stored: Shape of every stored tensor, by its name.
            path: config.json, for messages.

        Raises:
            UnsupportedModelError: Transformers has no causal language model for this config.
            CheckpointError: Transformers does not accept the config, a parameter is stored nowhere, or in a size that
                does not fit.
        """
        self.skeleton: Any = empty_decoder(parse_config(alone, path), path)
        self.blocks, _ = list_of_blocks(self.skeleton)
        self.embedding = module_name(self.skeleton, self.skeleton.get_input_embeddings())
        self.head = self._head_of(self.skeleton, path)
        self._shapes = {name: tuple(each.shape) for name, each in self.skeleton.state_dict().items()}
        self._aliases: Mapping[str, str] = {}
        self._of = {name: name for name in self._shapes}  # names in the skeleton -> names in the plan
        model = None if whole is None else empty_whole(parse_config(whole, path), path)
        if model is None:
            self._plan = LoadPlan(self.skeleton, stored, path.parent)
        else:
            self._of = self._names_inside(model, path)
            self._plan = LoadPlan(model, stored, path.parent)
        missing = self._missing()
        if missing:
            self._take_prefixed(stored, path.parent)
        if missing and self._missing():
            raise CheckpointError(_explained(missing, self, path.parent, len(stored)))
        self.names = frozenset(name for name, inside in self._of.items() if inside in self._plan.names)
        used = {source for name in self.names for source in self.sources(name)}
        self.others = frozenset(stored.keys() - used)

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return len(self.skeleton.get_submodule(self.blocks))

    @cached_property
    def structure(self) -> ModelStructure:
        """Its input groups, and where its linears lie, as a trace finds them.

        Raises:
            UnsupportedModelError: The trace fails.
        """
        return discover(self.skeleton)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter or persistent buffer."""
        return self._shapes[name]

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a parameter is made of."""
        return tuple(self._aliases.get(source, source) for source in self._plan.sources(self._of[name]))

    def outer_name(self, name: str) -> str:
        """Return what a parameter is called in the whole model that the language model is a part of."""
        outer: str = self._of[name]
        return outer

    def stored_name(self, name: str) -> str | None:
        """Return the stored tensor that a parameter is as it stands; None if it is made of several, or changed."""
        inside = self._of.get(name, name)
        if inside not in self._plan.names or not self._plan.stored_as_is(inside):
            return None
        (source,) = self._plan.sources(inside)
        return self._aliases.get(source, source)

    def parameter(self, name: str, base: StoredTensors) -> Tensor:
        """Return a parameter or persistent buffer as it is in memory, in the dtype that it is stored in.

        Args:
            name: Its name in ``skeleton``.
            base: Where stored tensors are read from.
        """
        return self._plan.make(self._of[name], lambda source: base.tensor(self._aliases.get(source, source)))

    def linear(self, place: LinearPlace, base: StoredTensors) -> Tensor:
        """Return the weight of a linear, shape (out, in).

        Args:
            place: Where it lies, under a full name.
            base: Where stored tensors are read from.
        """
        if place.expert is None:
            weight = self.parameter(place.parameter, base)
        else:
            name = self._of[place.parameter]
            alone = None if place.turned else self._plan.stored_rows(name, place.expert, place.rows)
            if alone is not None:
                return base.tensor(self._aliases.get(alone, alone))
            weight = self._plan.make_expert(
                name,
                place.expert,
                lambda source: base.tensor(self._aliases.get(source, source)),
                lambda source, index: base.entry(self._aliases.get(source, source), index),
            )
        if place.turned:
            weight = weight.T
        if place.rows is not None:
            weight = weight[slice(*place.rows)]
        return weight.clone() if place.turned or place.rows is not None else weight

    def linear_shape(self, place: LinearPlace) -> tuple[int, ...]:
        """Return the shape of a linear's weight, (out, in), as ``linear`` does."""
        shape = self.shape(place.parameter)
        if place.expert is not None:
            shape = shape[1:]
        if place.turned:
            shape = shape[::-1]
        return shape if place.rows is None else (place.rows[1] - place.rows[0], *shape[1:])

    @staticmethod
    def _head_of(model: Any, path: Path) -> str:
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedModelError(
                f"{path}: {type(model).__name__} of Transformers has no output head. Expected one that makes logits. "
                "Choose another model."
            )
        return module_name(model, head)

    def _names_inside(self, model: Any, path: Path) -> dict[str, str]:
        # What the parameters are called in the whole: from the token embeddings' module outwards, paths are the same
        # up to where the language model begins.
        own = self.embedding.split(".")
        there = module_name(model, model.get_input_embeddings()).split(".")
        while own and there and own[-1] == there[-1]:
            own.pop()
            there.pop()
        head, start = self._head_of(model, path), "".join(f"{each}." for each in own)
        names = {}
        shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        for name, shape in self._shapes.items():
            inside = ".".join((*there, name.removeprefix(start)))
            names[name] = head + name.removeprefix(self.head) if name.startswith(f"{self.head}.") else inside
            if shapes.get(names[name]) != shape:
                raise UnsupportedModelError(
                    f"{path}: {type(model).__name__} of Transformers does not hold a {type(self.skeleton).__name__}. "
                    f"Got {shapes.get(names[name])} as the shape of {names[name]}. Expected {shape}. Choose another "
                    "model."
                )
        return names

    def _missing(self) -> list[str]:
        # A head may be the embedding, which config.json says where this looks for names alone.
        tensors = self.skeleton.state_dict(keep_vars=True)
        made = {id(tensors[name]) for name, inside in self._of.items() if inside in self._plan.names}
        spared = [re.compile(each) for each in self.skeleton._keys_to_ignore_on_load_missing or ()]
        return [
            name
            for name, tensor in tensors.items()
            if id(tensor) not in made
            and not name.startswith(f"{self.head}.")
            and not any(pattern.search(name) for pattern in spared)
        ]

    def _take_prefixed(self, stored: Mapping[str, tuple[int, ...]], where: Path) -> None:
        """Look for the language model alone behind a prefix, as models saved inside of others have it."""
        own, _, leaf = f"{self.embedding}.weight".partition(".")
        tables = [name for name in stored if name.endswith(f".{leaf}")]
        if len(tables) != 1:
            return
        prefix, head = tables[0].removesuffix(leaf), f"{self.head}.weight"
        renamed = {
            f"{own}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: name for name in sorted(stored)
        }
        heads = [name for name in stored if name.endswith(f".{head}")]
        if len(heads) == 1:
            renamed[head] = renamed.pop(heads[0], heads[0])
        self._aliases = renamed
        self._of = {name: name for name in self._shapes}
        self._plan = LoadPlan(self.skeleton, {alias: stored[name] for alias, name in renamed.items()}, where)


_KNOWN: WeakKeyDictionary[StoredTensors, ModelInMemory] = WeakKeyDictionary()
"""Models of sources that are in use: building a large one takes seconds, and views of a source come and go."""


def model_in_memory(base: StoredTensors, alone: Mapping[str, Any], *, inside: bool) -> ModelInMemory:
    """Return the language model of a source as Transformers has it in memory; built once.

    Args:
        base: The source.
        alone: Config of the language model as if it stood alone.
        inside: Whether the source is a model of several parts.

    Raises:
        UnsupportedModelError: Transformers has no causal language model for this config.
        CheckpointError: Config and stored tensors do not fit together.
    """
    found = _KNOWN.get(base)
    if found is None:
        stored = {name: base.shape(name) for name in base.names}
        found = ModelInMemory(alone, base.config if inside else None, stored, base.directory / "config.json")
        _KNOWN[base] = found
    return found


def assembled(linears: Mapping[str, LinearPlace], shape: tuple[int, ...], tensor: Callable[[str], Tensor]) -> Tensor:
    """Return a parameter of Transformers' model, put together from the linears that lie in it.

    Args:
        linears: Where in it their weights lie, by full names; nothing else lies there.
        shape: The parameter's shape.
        tensor: Returns a weight, shape (out, in).
    """
    whole: Tensor | None = None
    for name, place in linears.items():
        weight = tensor(name)
        if whole is None:
            whole = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        part = whole if place.expert is None else whole[place.expert]
        part = part.T if place.turned else part
        part[slice(None) if place.rows is None else slice(*place.rows)] = weight
    assert whole is not None
    return whole


def _explained(missing: list[str], model: ModelInMemory, where: Path, count: int) -> str:
    blocks = [f"{model.blocks}.{index}." for index in range(model.block_count)]
    there = {name for name in model.skeleton.state_dict() if name not in missing}
    lost = next((block for block in blocks if not any(name.startswith(block) for name in there)), None)
    if lost is not None:
        return (
            f"{where}: the weights lack a block. Got no tensor of {lost.removesuffix('.')}. Expected "
            f"{model.block_count} blocks by config.json. Get the missing files, or correct config.json."
        )
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"{where}: weights are missing. Got {count} tensors, none of them for {', '.join(missing[:_SHOWN])}{more}. "
        f"Expected all parameters of {type(model.skeleton).__name__}. Get the missing files, or correct config.json."
    )
