"""The language model inside a checkpoint, its linears one tensor each.

Checkpoints differ in what they call things: models with vision put a prefix before the language model's names, some
families store several linears as one tensor. Everything that measures, rounds or evaluates sees them through
``LanguageModel``: names begin with ``model.`` or are ``lm_head.weight``, and every linear is a tensor of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ..model.families import EMBEDDING, HEAD, Family, composite_of, family_of
from ..model.names import config_features, text_config
from ..model.positions import stated_rope
from .checkpoint import TensorInfo, TensorSource
from .views import SourceView

__all__ = [
    "LanguageModel",
    "LanguageSource",
    "WeightOverlay",
    "language_config",
    "language_model",
    "plain_name",
]

_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", f"{HEAD}."),
)
"""What the names of a language model inside of another begin with, and what that stands for: as the Hub's checkpoints
have it, as Transformers 5 has it in memory, and the head."""


class LanguageModel(SourceView):
    """The language model of a source.

    Attributes:
        others: Tensors of the source that are not the language model's, under their names there.
        family: How it is cut.
    """

    def __init__(self, base: TensorSource) -> None:
        """Map the names; reads no weights.

        Raises:
            UnsupportedModelError: The family is unknown.
            CheckpointError: The stored tensors are not those of the sizes in config.json.
        """
        super().__init__(base)
        self._config = language_config(base)
        self.family: Family = family_of(self._config)
        composite = composite_of(base.config) is not None or self.family.wrapped
        self._stored: dict[str, str] = {}
        self._rows: dict[str, slice] = {}
        others = set()
        for name in base.names:
            plain = plain_name(name, composite=composite)
            if plain is None:
                others.add(name)
            else:
                self._map(plain, name)
        self.others = frozenset(others)
        self._names = frozenset(self._stored)
        _require_consistent(self)

    def _map(self, plain: str, stored: str) -> None:
        module, _, kind = plain.rpartition(".")
        fused = next((key for key in self.family.fused if module.endswith(f".{key}")), None)
        if fused is None:
            self._stored[plain] = stored
            return
        block, first = module.removesuffix(fused), 0
        for part in self.family.fused[fused]:
            features = config_features(block + part, self._config)[1] or 0
            self._stored[f"{block}{part}.{kind}"] = stored
            self._rows[f"{block}{part}.{kind}"] = slice(first, first + features)
            first += features
        if self.base.shape(stored)[0] != first:
            raise CheckpointError(
                f"{self.directory}: {stored} has {self.base.shape(stored)[0]} rows. Expected {first} by config.json. "
                "The files do not belong together."
            )

    @property
    def config(self) -> dict[str, Any]:
        """The language model's own config; not to be modified."""
        return self._config

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return int(self._config["num_hidden_layers"])

    @property
    def names(self) -> frozenset[str]:
        """Full names of the language model's tensors."""
        return self._names

    def stored_as(self, name: str) -> tuple[str, slice | None]:
        """Return the name of the source's tensor that holds a tensor, and its rows there; None for all of them."""
        return self._stored.get(name, name), self._rows.get(name)

    def stored_bytes(self, name: str) -> int:
        """Return the size of a tensor of a checkpoint, in bytes."""
        base: Any = self.base
        info: TensorInfo = base.info(self._stored.get(name, name))
        return info.size_bytes * math.prod(self.shape(name)) // max(math.prod(info.shape), 1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        shape = self.base.shape(self._stored.get(name, name))
        rows = self._rows.get(name)
        return shape if rows is None else (rows.stop - rows.start, *shape[1:])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        tensor = self.base.tensor(self._stored.get(name, name))
        rows = self._rows.get(name)
        return tensor if rows is None else tensor[rows].clone()


class WeightOverlay(LanguageModel):
    """A language model seen with other weights in some of its linears; writes nothing to disk."""

    def __init__(self, base: TensorSource, weights: Mapping[str, Callable[[], Tensor]]) -> None:
        """Hold what to read.

        Args:
            base: Where all other tensors come from, as ``LanguageModel`` takes it.
            weights: For each replaced linear, by its name in the language model, a function that returns its weight,
                shape (out, in).

        Raises:
            UnsupportedModelError: The family is unknown.
            CheckpointError: The stored tensors are not those of the sizes in config.json.
        """
        self._weights = {f"{name}.weight": read for name, read in weights.items()}
        super().__init__(base)

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint, marked."""
        return f"{super().fingerprint}, weights replaced"

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors, a head that a tied model has got of its own among them."""
        return super().names | self._weights.keys()

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding; a replaced one is not."""
        return super().tied_embeddings and f"{HEAD}.weight" not in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions."""
        return super().shape(EMBEDDING if name == f"{HEAD}.weight" and name not in super().names else name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: one that is replaced wherever its function puts it, others on the CPU."""
        read = self._weights.get(name)
        return super().tensor(name) if read is None else read()


class LanguageSource(ABC):
    """A source that is made of a language model, and not the other way round."""

    @property
    @abstractmethod
    def language(self) -> LanguageModel:
        """The language model."""


def language_model(source: TensorSource) -> LanguageModel:
    """Return the view of a source as a language model; a view is returned as it is.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    if isinstance(source, LanguageSource):
        return source.language
    return source if isinstance(source, LanguageModel) else LanguageModel(source)


def _require_consistent(model: LanguageModel) -> None:
    # Before anything of the sizes in config.json is built.
    where, config = model.directory, model.config
    blocks = {name.split(".")[2] for name in model.names if name.startswith(f"{model.family.blocks}.")}
    missing = next((index for index in range(model.block_count) if str(index) not in blocks), None)
    if missing == 0:
        first = model.family.linear_names(0, model.family.groups[0])[0]
        model.shape(f"{first}.weight")  # says what is there instead
    if missing is not None:
        raise CheckpointError(
            f"{where}: the weights lack a block. Got no tensor of {model.family.blocks}.{missing}. Expected "
            f"num_hidden_layers {model.block_count} of config.json. Get the missing files, or correct config.json."
        )
    for block in range(model.block_count):
        groups = model.family.input_groups(block, model.names)
        if not groups:
            raise CheckpointError(
                f"{where}: {model.family.blocks}.{block} has no linears. Got none. Expected those of a "
                f"{config.get('model_type')} block. Get the model again."
            )
        for group in groups:
            for name in model.family.linear_names(block, group):
                rows, columns = config_features(name, config)
                _require_shape(model, f"{name}.weight", (columns, rows))


def _require_shape(model: LanguageModel, name: str, expected: tuple[Any, Any]) -> None:
    shape = model.shape(name)
    if len(shape) != 2 or any(want is not None and got != want for got, want in zip(shape, expected, strict=True)):
        raise CheckpointError(
            f"{model.directory}: config.json does not fit the weights. Got shape {shape} for {name}. Expected "
            f"{expected}. The files do not belong together: get the model again."
        )


def language_config(source: TensorSource) -> dict[str, Any]:
    """Return the config of the language model in a source, as if it stood alone."""
    whole = source.config
    composite = composite_of(whole)
    if composite is None:
        return whole
    config = {**text_config(whole)}
    config.pop("vision_config", None)
    if composite.text is not None:
        config["model_type"] = composite.text
        for key in ("rope_scaling", "rope_parameters"):
            if "mrope_section" in (config.get(key) or {}):
                config[key] = {"rope_type": "default", "rope_theta": stated_rope(config)["rope_theta"]}
    for key in ("tie_word_embeddings", "vocab_size"):
        if key in whole:
            config.setdefault(key, whole[key])
    return config


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
