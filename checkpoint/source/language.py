"""The language model inside a checkpoint, its linears one tensor each.

Checkpoints differ in what they call things: models with vision put a prefix before the language model's names, some
families store several linears as one tensor. Everything that measures, rounds or evaluates sees them through
``LanguageModel``: every linear is a tensor of its own, of shape (out, in).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..loading.discovered import DiscoveredTensors
from ..loading.listed import ListedTensors, StoredRows
from ..loading.memory import assembled, model_in_memory
from ..model.config import decoder_config
from ..model.families import Composite, Family, composite_of, family_of, is_known, listed_family
from ..model.names import text_config
from ..model.positions import stated_rope
from ..model.structure import ModelStructure
from .checkpoint import Checkpoint, TensorInfo, TensorSource
from .views import SourceView

__all__ = ["LanguageModel", "LanguageSource", "StoredRows", "WeightOverlay", "language_config", "language_model"]


class LanguageModel(SourceView):
    """The language model of a source.

    Tensors of families that are listed have the names that checkpoints give them. Those of others have the names of
    Transformers' model, except that stacked experts are one linear each, as
    ``model.layers.0.mlp.experts.3.down_proj.weight``.

    Attributes:
        others: Tensors of the source that are not the language model's, under their names there.
        blocks: Full name of the list of decoder blocks; block i is ``{blocks}.{i}``.
        block_count: Number of decoder blocks.
        embedding_name: Full name of the module that holds the token embeddings.
        head_name: Full name of the output head.
    """

    def __init__(self, base: TensorSource) -> None:
        """Map the names; reads no weights.

        Raises:
            UnsupportedModelError: Transformers does not run it as a decoder.
            CheckpointError: The stored tensors are not those of the sizes in config.json.
        """
        super().__init__(base)
        self._config = language_config(base)
        self._listed = listed_family(self._config) if _is_listed(base.config, self._config) else None
        inside = composite_of(base.config) is not None
        self._tensors: ListedTensors | DiscoveredTensors
        if self._listed is not None:
            self._tensors = ListedTensors(self._listed, base, self._config, inside=inside)
        else:
            self._tensors = DiscoveredTensors(model_in_memory(base, self._config, inside=inside), base)
        self.others = self._tensors.others
        self.blocks, self.block_count = self._tensors.blocks, self._tensors.block_count
        self.embedding_name, self.head_name = self._tensors.embedding, self._tensors.head

    @property
    def config(self) -> dict[str, Any]:
        """The language model's own config; not to be modified."""
        return self._config

    @property
    def listed(self) -> Family | None:
        """How it is cut, of a family that is listed; None for others."""
        return self._listed

    @property
    def family(self) -> Family:
        """How it is cut, of a family that is listed.

        Raises:
            UnsupportedModelError: It is not.
        """
        return family_of(self._config) if self._listed is None else self._listed

    @property
    def structure(self) -> ModelStructure:
        """Its input groups, and where in Transformers' model their linears lie; found by a trace if it is not listed.

        Raises:
            UnsupportedModelError: The trace fails.
        """
        return self._tensors.structure

    @property
    def layer_embedding(self) -> str | None:
        """Full name of the module with the embeddings that every block has of its own; None for most models."""
        width = self._config.get("hidden_size_per_layer_input")
        found = (name for name in self.names if name.endswith("embed_tokens_per_layer.weight"))
        return next(found, "").removesuffix(".weight") or None if width else None

    @property
    def names(self) -> frozenset[str]:
        """Full names of the language model's tensors."""
        return self._tensors.names

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding."""
        return self._ties

    @cached_property
    def _ties(self) -> bool:
        if self._listed is not None or not isinstance(self.base, Checkpoint):
            return self.base.tied_embeddings
        # As Transformers: one that is stored and differs is a head of its own, whatever the config says.
        head, embedding = f"{self.head_name}.weight", f"{self.embedding_name}.weight"
        flag = bool(self._config["tie_word_embeddings"])
        stored = self._tensors.parameter_shape(head) is not None
        return flag and (not stored or torch.equal(self._tensors.parameter(head), self._tensors.parameter(embedding)))

    def wholes(self) -> dict[str, str]:
        """Return parameters of Transformers' model by the names that it loads them under, in place of what is stored.

        Of a listed family these are stored tensors; fused ones are left as they are stored. The head of a tied model is
        not among them.
        """
        return self._tensors.wholes()

    def stored_bytes(self, name: str) -> int:
        """Return the size of a tensor of a checkpoint, in bytes; of a part of what is stored, its share."""
        base: Any = self.base
        infos: list[TensorInfo] = [base.info(each) for each in self._tensors.sources(name)]
        elements = sum(math.prod(info.shape) for info in infos)
        return sum(info.size_bytes for info in infos) * math.prod(self.shape(name)) // max(elements, 1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        return self._tensors.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, on the CPU, in memory of its own."""
        return self._tensors.tensor(name)

    def stored_name(self, parameter: str) -> str | None:
        """Return the tensor of the source that a parameter of Transformers' model is as it stands.

        Args:
            parameter: Its name in the language model alone, or in the whole that it is a part of.

        Returns:
            None if there is no such tensor, or the parameter is made of several.
        """
        return self._tensors.stored_name(parameter)

    def stored_rows(self, name: str) -> StoredRows | None:
        """Return the stored tensor that a tensor is, or the rows of it that it is.

        Args:
            name: Its name in the language model; of a family that is not listed, a stored tensor with the same input
                channels is returned.

        Returns:
            None where it is made of several, or of a listed family a part of stacked experts.
        """
        return self._tensors.stored_rows(name)

    def norm_pairs(self, index: int) -> Iterator[tuple[str, float, tuple[StoredRows, ...]]]:
        """Yield the norms of a block of a family that is not listed; see ``DiscoveredTensors.norm_pairs``.

        Raises:
            UnsupportedModelError: The trace fails.
        """
        if isinstance(self._tensors, DiscoveredTensors):
            yield from self._tensors.norm_pairs(index)

    def has_parameter(self, name: str) -> bool:
        """Return whether something is stored for a parameter or persistent buffer of Transformers' model."""
        return self._tensors.parameter_shape(self._untied(name)) is not None

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of what ``parameter`` returns.

        Raises:
            CheckpointError: Nothing is stored for it.
        """
        shape = self._tensors.parameter_shape(self._untied(name))
        if shape is None:
            raise CheckpointError(
                f"{self.directory}: nothing is stored for {name}. Got {len(self.base.names)} tensors of other names. "
                "Get the missing files, or correct config.json."
            )
        return shape

    def parameter(self, name: str) -> Tensor:
        """Return a parameter or persistent buffer of Transformers' model as it is there: stacked, fused, turned.

        Args:
            name: Its full name in Transformers' model; of a listed family also that of a fused linear's part.

        Returns:
            The tensor in its stored dtype, on the CPU, in memory of its own; of a tied head, the token embeddings.

        Raises:
            CheckpointError: Nothing is stored for it.
        """
        self.parameter_shape(name)
        return self._tensors.parameter(self._untied(name))

    def _untied(self, name: str) -> str:
        tied = name == f"{self.head_name}.weight" and self.tied_embeddings
        return f"{self.embedding_name}.weight" if tied else name


class WeightOverlay(LanguageModel):
    """A language model seen with other weights in some of its linears; writes nothing to disk."""

    def __init__(self, base: TensorSource, weights: Mapping[str, Callable[[], Tensor]]) -> None:
        """Hold what to read.

        Args:
            base: Where all other tensors come from, as ``LanguageModel`` takes it.
            weights: For each replaced linear, by its name in the language model, a function that returns its weight,
                shape (out, in).

        Raises:
            UnsupportedModelError: Transformers does not run it as a decoder.
            CheckpointError: The stored tensors are not those of the sizes in config.json.
        """
        self._weights = {f"{name}.weight": read for name, read in weights.items()}
        super().__init__(base)

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint, marked."""
        return f"{super().fingerprint}, weights replaced"

    @property
    def layer_embedding(self) -> str | None:
        """Full name of the module with the embeddings that every block has of its own; None for most models."""
        width = self._config.get("hidden_size_per_layer_input")
        found = (name for name in self.names if name.endswith("embed_tokens_per_layer.weight"))
        return next(found, "").removesuffix(".weight") or None if width else None

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors, a head that a tied model has got of its own among them."""
        return super().names | self._weights.keys()

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding; a replaced one is not."""
        return super().tied_embeddings and f"{self.head_name}.weight" not in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions."""
        new_head = name == f"{self.head_name}.weight" and name not in super().names
        return super().shape(f"{self.embedding_name}.weight" if new_head else name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: one that is replaced wherever its function puts it, others on the CPU."""
        read = self._weights.get(name)
        return super().tensor(name) if read is None else read()

    def has_parameter(self, name: str) -> bool:
        """Return whether something is stored for a parameter of Transformers' model, or takes its place."""
        return name in self._weights or super().has_parameter(name)

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of what ``parameter`` returns."""
        new_head = name == f"{self.head_name}.weight" and name in self._weights
        return self.shape(name) if new_head else super().parameter_shape(name)

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of Transformers' model, with the other weights in their places."""
        linears = self.structure.linears_in(name)
        if name in self._weights and not (name in linears and linears[name].turned):
            return self.tensor(name)
        if linears.keys() & self._weights.keys():
            return assembled(linears, self.parameter_shape(name), self.tensor)
        return super().parameter(name)


class LanguageSource(ABC):
    """A source that is made of a language model, and not the other way round."""

    @property
    @abstractmethod
    def language(self) -> LanguageModel:
        """The language model."""


def language_model(source: TensorSource) -> LanguageModel:
    """Return the view of a source as a language model; a view is returned as it is.

    Raises:
        UnsupportedModelError: Transformers does not run it as a decoder.
    """
    if isinstance(source, LanguageSource):
        return source.language
    return source if isinstance(source, LanguageModel) else LanguageModel(source)


def language_config(source: TensorSource) -> dict[str, Any]:
    """Return the config of the language model in a source, as if it stood alone.

    Raises:
        UnsupportedModelError: Transformers does not know the model type.
        CheckpointError: Transformers does not accept the config.
    """
    whole = source.config
    composite = composite_of(whole)
    config = whole if composite is None else _alone(whole, composite)
    if "model_type" not in config:
        return config  # what a file of another program tells, which is no model of Transformers
    return config if _is_listed(whole, config) else decoder_config(config, whole, source.directory / "config.json")


def _is_listed(whole: Mapping[str, Any], alone: Mapping[str, Any]) -> bool:
    # A config that was opened is complete then. Of a listed family inside of an unknown whole, names are unknown.
    return is_known(whole) and listed_family(alone) is not None


def _alone(whole: Mapping[str, Any], composite: Composite) -> dict[str, Any]:
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
