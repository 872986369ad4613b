"""The tensors of a language model whose family is listed, under the names that checkpoints give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ..model.families import EMBEDDING, HEAD, Family
from ..model.names import config_features
from ..model.structure import LinearPlace, ModelStructure
from .memory import ModelInMemory, StoredTensors, assembled, model_in_memory

__all__ = ["ListedTensors", "StoredRows", "plain_name"]

_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", f"{HEAD}."),
)
"""What the names of a language model inside of another begin with, and what that stands for: as the Hub's checkpoints
have it, as Transformers 5 has it in memory, and the head."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A stored tensor, or neighbouring rows of it.

    Attributes:
        name: Its name in the checkpoint.
        rows: Which rows; None for all.
        turned: Whether its input channels are the last dimension but one, and not the last.
    """

    name: str
    rows: slice | None = None
    turned: bool = False


class ListedTensors:
    """Tensors by the names of a listed family, every linear of its own.

    Attributes:
        others: Tensors of the source that are not the language model's, under their names there.
        embedding: Full name of the module that holds the token embeddings.
        head: Full name of the output head.
        blocks: Full name of the list of decoder blocks.
        block_count: Their number.
    """

    embedding = EMBEDDING.removesuffix(".weight")
    head = HEAD

    def __init__(self, family: Family, base: StoredTensors, alone: Mapping[str, Any], *, inside: bool) -> None:
        """Map the names; reads no weights.

        Args:
            family: How the model is cut.
            base: The stored tensors, of a whole model.
            alone: Config of the language model.
            inside: Whether the model has other parts.

        Raises:
            CheckpointError: The stored tensors are not those of the sizes in the config.
        """
        self._family, self._base, self._config, self._inside = family, base, alone, inside
        self.blocks = family.blocks
        self.block_count = int(alone["num_hidden_layers"])
        self._stored: dict[str, str] = {}
        self._rows: dict[str, slice] = {}
        self._stacked: dict[str, LinearPlace] = {}
        self._wholes: dict[str, str] = {}
        others = set()
        for name in base.names:
            plain = plain_name(name, composite=inside or family.wrapped)
            if plain is None:
                others.add(name)
            else:
                self._wholes[name] = plain
                self._map(plain, name)
        self.others = frozenset(others)
        self.names = frozenset(self._stored.keys() | self._stacked.keys())
        self._require_consistent()

    def _map(self, plain: str, stored: str) -> None:
        module, _, kind = plain.rpartition(".")
        experts = self._family.experts
        if experts is not None and kind in ("gate_up_proj", "down_proj") and module.endswith(f".{experts.path}"):
            self._map_experts(module.removesuffix(experts.path), kind, self._base.shape(stored)[0])
            return
        fused = next((key for key in self._family.fused if module.endswith(f".{key}")), None)
        if fused is None:
            self._stored[plain] = stored
            return
        block, first = module.removesuffix(fused), 0
        for part in self._family.fused[fused]:
            features = config_features(block + part, self._config)[1] or 0
            self._stored[f"{block}{part}.{kind}"] = stored
            self._rows[f"{block}{part}.{kind}"] = slice(first, first + features)
            first += features
        if self._base.shape(stored)[0] != first:
            raise CheckpointError(
                f"{self._base.directory}: {stored} has {self._base.shape(stored)[0]} rows. Expected {first} by "
                "config.json. The files do not belong together."
            )

    def _map_experts(self, block: str, parameter: str, count: int) -> None:
        # Stored as Transformers has them in memory, or turned.
        experts = self._family.experts
        assert experts is not None
        kinds = (experts.down,) if parameter == "down_proj" else (experts.gate, experts.up)
        for name in (f"{experts.path}.{number}.{kind}" for number in range(count) for kind in kinds):
            place = self._family.place(name, self._config)
            inside = replace(place, parameter=block + place.parameter)
            self._stacked[f"{self._family.file_name(block + name)}.weight"] = inside

    @cached_property
    def _memory(self) -> ModelInMemory:
        return model_in_memory(self._base, self._config, inside=self._inside)

    @cached_property
    def structure(self) -> ModelStructure:
        """Its input groups, and where in Transformers' model their linears lie."""
        blocks = (self._family.structure(index, self.names, self._config) for index in range(self.block_count))
        return ModelStructure(self.blocks, self.embedding, self.head, tuple(blocks))

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that a tensor is taken from."""
        place = self._stacked.get(name)
        return (self._stored.get(name, name),) if place is None else self._memory.sources(place.parameter)

    def stored_rows(self, name: str) -> StoredRows | None:
        """Return the stored tensor that a tensor is, or its rows there; None for a part of stacked experts."""
        return None if name in self._stacked else StoredRows(self._stored.get(name, name), self._rows.get(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        place = self._stacked.get(name)
        if place is not None:
            return self._memory.linear_shape(place)
        shape = self._base.shape(self._stored.get(name, name))
        rows = self._rows.get(name)
        return shape if rows is None else (rows.stop - rows.start, *shape[1:])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        place = self._stacked.get(name)
        if place is not None:
            return self._memory.linear(place, self._base)
        tensor = self._base.tensor(self._stored.get(name, name))
        rows = self._rows.get(name)
        return tensor if rows is None else tensor[rows].clone()

    def stored_name(self, parameter: str) -> str | None:
        """Return the stored tensor that a parameter is as it stands; None if there is none such."""
        plain = plain_name(parameter, composite=self._inside or self._family.wrapped) or parameter
        name = self._family.file_name(plain)
        return None if name in self._rows else self._stored.get(name)

    def wholes(self) -> dict[str, str]:
        """Return the names of parameters by those of the stored tensors that they are."""
        return self._wholes

    def parameter_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of what ``parameter`` returns; None if nothing is stored for it."""
        in_files = self._family.file_name(name)
        if in_files in self.names:
            return self.shape(in_files)
        linears = self.structure.linears_in(name)
        if not linears:
            return None
        shapes = [self.shape(linear) for linear in linears]
        experts = {place.expert for place in linears.values()}
        rows = sum(shape[0] for shape in shapes) // len(experts)
        return (rows, *shapes[0][1:]) if experts == {None} else (len(experts), rows, *shapes[0][1:])

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of Transformers' model, whose linears may have been taken apart, as it is there."""
        in_files = self._family.file_name(name)
        linears = {} if in_files in self.names else self.structure.linears_in(name)
        if not linears:
            return self.tensor(in_files)
        stored = {self._stored.get(linear) for linear in linears}
        if len(stored) == 1 and None not in stored:
            return self._base.tensor(stored.pop() or "")
        if self._stacked:
            return self._memory.parameter(name, self._base)
        shape = self.parameter_shape(name)
        assert shape is not None
        return assembled(linears, shape, self.tensor)

    def _require_consistent(self) -> None:
        # Before anything of the sizes in config.json is built.
        where, family = self._base.directory, self._family
        blocks = {name.split(".")[2] for name in self.names if name.startswith(f"{self.blocks}.")}
        missing = next((index for index in range(self.block_count) if str(index) not in blocks), None)
        if missing == 0:
            first = family.linear_names(0, family.groups[0])[0]
            self.shape(f"{first}.weight")  # says what is there instead
        if missing is not None:
            raise CheckpointError(
                f"{where}: the weights lack a block. Got no tensor of {self.blocks}.{missing}. Expected "
                f"num_hidden_layers {self.block_count} of config.json. Get the missing files, or correct config.json."
            )
        for block in range(self.block_count):
            groups = family.input_groups(block, self.names)
            if not groups:
                raise CheckpointError(
                    f"{where}: {self.blocks}.{block} has no linears. Got none. Expected those of a "
                    f"{self._config.get('model_type')} block. Get the model again."
                )
            for name in (name for group in groups for name in family.linear_names(block, group)):
                rows, columns = config_features(name, self._config)
                self._require_shape(f"{name}.weight", (columns, rows))

    def _require_shape(self, name: str, expected: tuple[Any, Any]) -> None:
        shape = self.shape(name)
        if len(shape) != 2 or any(want is not None and got != want for got, want in zip(shape, expected, strict=True)):
            raise CheckpointError(
                f"{self._base.directory}: config.json does not fit the weights. Got shape {shape} for {name}. Expected "
                f"{expected}. The files do not belong together: get the model again."
            )


def plain_name(name: str, *, composite: bool) -> str | None:
    """Return the name that a tensor has in a language model alone; None if it belongs to another part.

    Args:
        name: Its name in a checkpoint, an adapter, or in memory.
        composite: Whether the model has other parts beside the language model.
    """
    if composite:
        for prefix, stands_for in _PREFIXES:
            if name.startswith(prefix):
                return stands_for + name.removeprefix(prefix)
    parts = ("model.layers.", "model.embed_tokens.", "model.norm.", f"{HEAD}.")
    return name if not composite or name.startswith(parts) else None
