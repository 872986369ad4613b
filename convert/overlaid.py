"""A quantized model read beside its original: linears from the one, all else from the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from ..checkpoint.source.checkpoint import TensorSource
from ..checkpoint.source.language import LanguageSource, WeightOverlay, language_model
from ..checkpoint.source.views import SourceView

__all__ = ["Overlaid"]


class Overlaid(LanguageSource):
    """The part of such a model that names, shapes and tensors come from; put before the class of the model."""

    def __init__(self, original: TensorSource, weights: Mapping[str, Callable[[], Tensor]]) -> None:
        """Hold both; nothing is read.

        Args:
            original: The model that it was made of.
            weights: What reads the weight of a linear, shape (out, K), by the linear's name in the original.
        """
        self._original = original
        self._source = language_model(original)
        self._weights = weights

    def overlaid_weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return what reads the weight of each linear, by its name."""
        return self._weights

    @cached_property
    def language(self) -> WeightOverlay:
        """The original with the quantized model's weights in its linears."""
        return WeightOverlay(self._original, self.overlaid_weights())

    @property
    def config(self) -> dict[str, Any]:
        """The original's config, of its language model alone; not to be modified."""
        return self._source.config

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors of the original's language model."""
        return self._source.names

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding, as in the original."""
        return self._source.tied_embeddings

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it."""
        return self._source.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: a linear's weight from the quantized model, all others from the original."""
        return self.language.tensor(name)

    def as_transformers(self) -> TensorSource:
        """Return the dense model with the names and the config that Transformers loads: the original's."""
        return _AsOriginal(self._original, self.language)


class _AsOriginal(SourceView):
    """An original with other weights, under the names that Transformers loads."""

    def __init__(self, original: TensorSource, language: WeightOverlay) -> None:
        super().__init__(original)
        self._language = language
        self._wholes = language.wholes()

    @property
    def names(self) -> frozenset[str]:
        return self._language.others | self._wholes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        own = self._wholes.get(name)
        return self.base.shape(name) if own is None else self._language.parameter_shape(own)

    def tensor(self, name: str) -> Tensor:
        own = self._wholes.get(name)
        return self.base.tensor(name) if own is None else self._language.parameter(own)
