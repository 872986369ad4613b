"""Parameters of Transformers' models, each made from the tensors that a checkpoint stores for it.

Transformers' own conversion mapping says what a stored tensor is called in memory, and which are stacked, joined, split
or turned on the way. Its API is private: all that is used of it is in this module, and tests compare the result with
``from_pretrained``, bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BpwiseError, CheckpointError, UnsupportedModelError, reason

__all__ = ["LoadPlan", "Read", "ReadEntry"]

Read = Callable[[str], Tensor]
"""Returns a stored tensor by its name."""

ReadEntry = Callable[[str, int], Tensor]
"""Returns one entry of a stored tensor's first dimension."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a few parameters, mostly one, come from stored tensors.

    Attributes:
        name: The parameter after which Transformers calls it.
        parts: Pattern of the conversion and name, of every stored tensor, in the order of experts and layers.
        converter: Transformers' conversion; None if the parameter is the one stored tensor as it is.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    converter: Any = None


class LoadPlan:
    """Says which stored tensors each parameter and persistent buffer of a model is made of, and makes it.

    Attributes:
        missing: Parameters that the checkpoint has nothing for, sorted; of tied ones none if one of them is stored.
        unused: Stored tensors that the model has no place for, sorted.
    """

    def __init__(self, model: Any, stored: Mapping[str, tuple[int, ...]], where: Path) -> None:
        """Match names and shapes; reads no weights.

        Args:
            model: A model of Transformers, as on the meta device; it stays as it is.
            stored: Shape of every stored tensor, by its name.
            where: The checkpoint, for messages.

        Raises:
            CheckpointError: A stored tensor does not fit its parameter.
            UnsupportedModelError: This version of Transformers has another conversion mapping than is known here.
        """
        self._model = model
        self._where = where
        self._stored = stored
        self._shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
        with self._explained("read the names"):
            recipes, unused = _recipes(model, stored)
        self._of: dict[str, _Recipe] = {}
        for recipe in recipes:
            self._require_fit(recipe, stored)
        self.unused = tuple(sorted(unused))
        self.missing = tuple(sorted(self._missing()))

    @property
    def names(self) -> frozenset[str]:
        """Parameters and persistent buffers that can be made."""
        return frozenset(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, made or not."""
        return self._shapes[name]

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a parameter is made of."""
        return tuple(stored for _, stored in self._of[name].parts)

    def stored_as_is(self, name: str) -> bool:
        """Return whether a parameter is a stored tensor without any conversion."""
        return self._of[name].converter is None

    def make(self, name: str, read: Read) -> Tensor:
        """Return a parameter as the model has it in memory, in the dtype of its stored tensors.

        Args:
            name: The parameter's name in the model.
            read: Returns a stored tensor.

        Raises:
            UnsupportedModelError: Transformers cannot convert it.
        """
        return self._convert(self._of[name], read)[name]

    def make_expert(self, name: str, expert: int, read: Read, read_entry: ReadEntry) -> Tensor:
        """Return one expert's part of a parameter that stacks experts, reading no other expert where that can be.

        Args:
            name: The parameter's name in the model.
            expert: Index into its first dimension.
            read: Returns a stored tensor.
            read_entry: Returns an entry of a stored tensor that stacks experts, too.

        Raises:
            UnsupportedModelError: Transformers cannot convert it.
        """
        recipe = self._of[name]
        if recipe.converter is None:
            return read_entry(recipe.parts[0][1], expert)
        if _only_turns(recipe.converter):
            return self._turned(recipe, name, lambda stored: read_entry(stored, expert))
        parts = self._parts_of_expert(recipe, expert)
        if parts is None:
            return self.make(name, read)[expert].clone()
        return self._convert(_Recipe(recipe.name, parts, recipe.converter), read)[name][0]

    def stored_rows(self, name: str, expert: int, rows: tuple[int, int] | None) -> str | None:
        """Return the stored tensor that is a part of one expert's matrix; None if no single one is.

        Args:
            name: The name in the model of a parameter that stacks experts.
            expert: Index into its first dimension.
            rows: First row of the part and the one after the last; None for the whole matrix.
        """
        recipe = self._of[name]
        parts = None if recipe.converter is None else self._parts_of_expert(recipe, expert)
        first = 0
        for _, stored in parts or ():
            size = self._stored[stored][0]
            if (first, first + size) == (rows or (0, self._shapes[name][1])):
                return stored
            first += size
        return None

    def _turned(self, recipe: _Recipe, name: str, read_expert: Read) -> Tensor:
        stored = recipe.parts[0][1]
        one = read_expert(stored)
        for turn in recipe.converter.operations:
            if not (turn.check_dims and self._stored[stored] == self._shapes[name]):
                one = one.transpose(turn.dim0 - 1, turn.dim1 - 1)
        return one.contiguous()

    def _parts_of_expert(self, recipe: _Recipe, expert: int) -> tuple[tuple[str, str], ...] | None:
        # None if the conversion mixes experts, or may.
        from transformers.core_model_loading import Concatenate, MergeModulelist  # noqa: PLC0415 - seconds to import

        first, *others = recipe.converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        if not stacks or not all(isinstance(other, Concatenate) and other.dim == 1 for other in others):
            return None
        by_pattern = defaultdict(list)
        for pattern, stored in recipe.parts:
            by_pattern[pattern].append(stored)
        experts = self._shapes[recipe.name][0]
        if any(len(each) != experts for each in by_pattern.values()):
            return None
        return tuple((pattern, each[expert]) for pattern, each in by_pattern.items())

    def _require_fit(self, recipe: _Recipe, stored: Mapping[str, tuple[int, ...]]) -> None:
        # Converted on the meta device: that costs nothing, and tells what a conversion makes and in which shapes.
        sources = [f"{name} {stored[name]}" for _, name in recipe.parts]
        shown = ", ".join(sources[:2]) + (f" and {len(sources) - 2} more" if len(sources) > 2 else "")
        try:
            made = self._convert(recipe, lambda name: torch.empty(stored[name], device="meta"))
        except UnsupportedModelError as cause:
            raise CheckpointError(
                f"{self._where}: parts of {recipe.name} do not fit together ({reason(cause.__cause__ or cause)}). "
                f"Got {shown}. Expected what makes {self._shapes[recipe.name]}. Get the model again."
            ) from cause
        for name, tensor in made.items():
            expected = self._shapes.get(name)
            if expected is not None and tuple(tensor.shape) != expected:
                raise CheckpointError(
                    f"{self._where}: config.json does not fit the weights. Got shape {tuple(tensor.shape)} for {name}, "
                    f"from {shown}. Expected {expected}. The files do not belong together: get the model again."
                )
            if expected is not None:
                self._of[name] = recipe

    def _convert(self, recipe: _Recipe, read: Read) -> dict[str, Tensor]:
        if recipe.converter is None:
            return {recipe.name: read(recipe.parts[0][1])}
        with self._explained(f"make {recipe.name}"):
            converter = deepcopy(recipe.converter)
            for pattern, stored in recipe.parts:
                converter.add_tensor(recipe.name, stored, pattern, lambda stored=stored: read(stored))
            made = converter.convert(recipe.name, model=self._model, config=self._model.config)
            return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def _missing(self) -> Iterator[str]:
        tensors = self._model.state_dict(keep_vars=True)
        made = {id(tensors[name]) for name in self._of}
        return (name for name, tensor in tensors.items() if id(tensor) not in made)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (BpwiseError, MemoryError):
            raise
        except Exception as cause:  # whatever another version does instead
            from transformers import __version__  # noqa: PLC0415 - seconds to import

            raise UnsupportedModelError(
                f"{self._where}: Transformers {__version__} cannot {what} by its conversion mapping "
                f"({type(cause).__name__}: {reason(cause)}). Install a version that bpwise names in its requirements."
            ) from cause


def _only_turns(converter: Any) -> bool:
    from transformers.core_model_loading import Transpose  # noqa: PLC0415 - seconds to import

    return all(isinstance(each, Transpose) and 0 not in (each.dim0, each.dim1) for each in converter.operations)


def _recipes(model: Any, stored: Mapping[str, tuple[int, ...]]) -> tuple[list[_Recipe], list[str]]:
    """Return the recipes for a model's parameters, and the stored tensors that none of them takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - seconds to import
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    there = model.state_dict()
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    converted: dict[str, Any] = {}
    unused = []
    # The order of names is that of experts in a stack.
    for name in sorted(stored, key=dot_natural_key):
        rename = (renamings, converters, model.base_model_prefix, there)
        target, pattern = rename_source_key(name, *rename)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], *rename[2:])
        if target not in there:
            unused.append(name)
            continue
        if target not in parts:
            converted[target] = by_pattern.get(pattern)
        parts[target].append((pattern or name, name))
    return [_Recipe(name, tuple(each), converted[name]) for name, each in parts.items()], unused
