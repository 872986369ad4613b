"""Names on the way into an EXL2 directory, as readers look for them, and back to those that Transformers loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....checkpoint.model.families import composite_of
from ....checkpoint.source.checkpoint import TensorSource
from ....checkpoint.source.language import LanguageModel, language_model
from ....checkpoint.source.views import SourceView
from .table import ReaderFamily, reader_composite, reader_family

__all__ = ["Exl2Names", "HfNames"]


class Exl2Names(SourceView):
    """A source under the names that EXL2 readers look for: prefix and other parts included."""

    def __init__(self, model: LanguageModel) -> None:
        """Map the names; reads no weights."""
        super().__init__(model.base)
        self._model, whole = model, model.base.config
        if composite_of(whole) is None:
            family = reader_family(whole)
            self.prefix, self._written_as = family.prefix, family.written_as
            self._others = {name: name for name in model.others}
        else:
            composite = reader_composite(whole)
            self.prefix, self._written_as = composite.prefix, None
            self._others = {composite.file_name(name): name for name in model.others}
        self._names = frozenset({self.prefix + name for name in model.names} | self._others.keys())

    @property
    def config(self) -> dict[str, Any]:
        """The whole model's config, its architecture as readers know it; not to be modified."""
        config = self.base.config
        return config if self._written_as is None else {**config, "architectures": [self._written_as]}

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        if name in self._others:
            return self.base.shape(self._others[name])
        return self._model.shape(name.removeprefix(self.prefix))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        if name in self._others:
            return self.base.tensor(self._others[name])
        return self._model.tensor(name.removeprefix(self.prefix))


class HfNames(SourceView):
    """A model in parts under the names that Transformers loads: fused where it fuses."""

    def __init__(self, base: TensorSource) -> None:
        """Map the names; reads no weights.

        Raises:
            UnsupportedModelError: The family is unknown.
        """
        super().__init__(base)
        model = language_model(base)
        # Of a model with other parts, Transformers takes the names as they are.
        self._read_as = reader_family(base.config) if composite_of(base.config) is None else ReaderFamily()
        stored = {name.removeprefix(self._read_as.prefix): name for name in base.names}
        self._parts: dict[str, tuple[str, ...]] = {name: (at,) for name, at in stored.items()}
        for fused, parts in model.family.fused.items():
            for name in stored:
                module, _, kind = name.rpartition(".")
                if not module.endswith(f".{parts[0]}"):
                    continue
                block = module.removesuffix(parts[0])
                for part in parts:
                    self._parts.pop(f"{block}{part}.{kind}", None)
                self._parts[f"{block}{fused}.{kind}"] = tuple(stored[f"{block}{part}.{kind}"] for part in parts)

    @property
    def config(self) -> dict[str, Any]:
        """That of what is viewed, its architecture as Transformers knows it; not to be modified."""
        written_as = self._read_as.written_as
        if written_as is None:
            return self.base.config
        return {**self.base.config, "architectures": [x for x in self._read_as.architectures if x != written_as]}

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors."""
        return frozenset(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        shapes = [self.base.shape(part) for part in self._parts[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in memory of its own."""
        parts = [self.base.tensor(part) for part in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
