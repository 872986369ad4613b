"""The tensors of a language model whose family is not listed, under the names of Transformers' model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from ...errors import CheckpointError
from ..model.structure import LinearPlace, ModelStructure
from ..trace.norms import weight_offset
from .listed import StoredRows
from .memory import ModelInMemory, StoredTensors

__all__ = ["DiscoveredTensors"]


class DiscoveredTensors:
    """Tensors by their names in Transformers' model, except that stacked experts are one linear each.

    Attributes:
        others: Tensors of the source that are not the language model's, under their names there.
        embedding: Full name of the module that holds the token embeddings.
        head: Full name of the output head.
        blocks: Full name of the list of decoder blocks.
        block_count: Their number.
    """

    def __init__(self, memory: ModelInMemory, base: StoredTensors) -> None:
        """Hold where to look.

        Args:
            memory: The model, and what its parameters are made of.
            base: Where stored tensors are read from.
        """
        self._memory, self._base = memory, base
        self.others = memory.others
        self.embedding, self.head = memory.embedding, memory.head
        self.blocks, self.block_count = memory.blocks, memory.block_count

    @property
    def structure(self) -> ModelStructure:
        """Its input groups, and where in Transformers' model their linears lie."""
        return self._memory.structure

    @cached_property
    def _places(self) -> dict[str, LinearPlace]:
        # Of weights that are not parameters as they are.
        found = {}
        for index, block in enumerate(self.structure.structures):
            prefix = f"{self.blocks}.{index}."
            for name, place in block.places.items():
                if place.turned or place.expert is not None or place.rows is not None:
                    found[f"{prefix}{name}.weight"] = replace(place, parameter=prefix + place.parameter)
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """Full names of the tensors."""
        return self._memory.names - {place.parameter for place in self._places.values()} | self._places.keys()

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that a tensor is taken from."""
        return self._memory.sources(self._place(name).parameter)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        return self._memory.linear_shape(self._place(name))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        return self._memory.linear(self._place(name), self._base)

    def norm_pairs(self, index: int) -> Iterator[tuple[str, float, tuple[StoredRows, ...]]]:
        """Yield the norms of a block whose output is read by stored matrices alone.

        Args:
            index: Which block.

        Yields:
            Full name of the norm, what is added to its stored weight when it runs, and the matrices.
        """
        for norm, places in self.structure.structures[index].norms.items():
            path = f"{self.blocks}.{index}."
            offset = weight_offset(self._memory.skeleton.get_submodule(path + norm))
            readers = [reader for place in places for reader in self._readers(path, place)]
            if offset is not None and None not in readers:
                yield path + norm, offset, tuple(reader for reader in readers if reader is not None)

    def stored_rows(self, name: str) -> StoredRows | None:
        """Return a stored tensor with the input channels of a tensor: what it is a part of, or one of its parts."""
        return next(self._readers("", self._place(name)), None)

    def _readers(self, path: str, place: LinearPlace) -> Iterator[StoredRows | None]:
        # The stored tensors that a parameter is: as it stands, or one of its experts or parts each.
        name = path + place.parameter
        stored = self.stored_name(name) if name in self._memory.names else None
        if stored is not None:
            yield StoredRows(stored, turned=place.turned)
            return
        sources = self._memory.sources(name) if name in self._memory.names else ()
        channels = self._memory.shape(name)[-1] if sources else 0
        if not sources or place.turned or any(self._base.shape(each)[1:] != (channels,) for each in sources):
            yield None
        yield from map(StoredRows, sources)

    def stored_name(self, parameter: str) -> str | None:
        """Return the stored tensor that a parameter is as it stands; None if there is none such."""
        return self._memory.stored_name(parameter)

    def wholes(self) -> dict[str, str]:
        """Return parameters by the names that Transformers loads them under."""
        return {self._memory.outer_name(name): name for name in self._memory.names}

    def parameter_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of what ``parameter`` returns; None if nothing is stored for it."""
        return self._memory.shape(name) if name in self._memory.names else None

    def parameter(self, name: str) -> Tensor:
        """Return a parameter or persistent buffer of Transformers' model as it is there."""
        return self._memory.parameter(name, self._base)

    def _place(self, name: str) -> LinearPlace:
        if name not in self.names:
            raise CheckpointError(
                f"{self._base.directory}: tensor {name!r} is missing. Got {len(self.names)} others of the language "
                "model. Get the missing files, or correct config.json."
            )
        return self._places.get(name, LinearPlace(name))
