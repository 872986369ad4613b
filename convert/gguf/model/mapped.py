"""A GGUF file read beside its original: linears from the file, by the map of rows, all else from the original."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from ....checkpoint.source.checkpoint import TensorSource
from ....errors import BpwiseWarning, CheckpointError
from ...overlaid import Overlaid
from ..file.header import GgufHeader
from ..file.values import read_rows
from ..rows.rowmap import Part, RowMap
from ..rows.slices import joined_weight
from .mapping import guess_map, require_held
from .reader import GgufModel

__all__ = ["MappedGguf"]


class MappedGguf(Overlaid, GgufModel):
    """A file that is a model only beside its original. Norms, biases and what no map explains are the original's."""

    def __init__(self, header: GgufHeader, original: TensorSource, rows: Callable[[], RowMap] | None = None) -> None:
        """Hold both; nothing is looked for before it is needed.

        Args:
            header: What stands before the file's data.
            original: The model that it was made of.
            rows: Returns the map of a file that does not have one; None finds it by comparing rows.
        """
        GgufModel.__init__(self, header, None)
        Overlaid.__init__(self, original, {})
        self._given = rows

    @cached_property
    def rows(self) -> RowMap:
        """Where its matrices come from: as it says itself, as is known, or by comparing rows.

        Raises:
            FormatError: Its map is damaged.
            VerificationError: A linear of the original is not in it.
        """
        if self.own_map is not None:
            return self.own_map
        if self._given is not None:
            return self._given()
        rows = guess_map(self._source, self._header)
        require_held(rows, self._source, self._header, unquantized=False)
        return rows

    def overlaid_weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return what reads the weight of each linear that the file holds.

        Raises:
            CheckpointError: The file is not made of this original.
            FormatError: As ``rows``.
            VerificationError: As ``rows``.
        """
        linears = {linear for own in self.rows.tensors.values() for linear in own.linears}
        for linear in sorted(linears):
            self._require_linear(linear)
        tensors = self._header.tensors
        unread = [name for name in self.rows.unexplained if name in tensors and tensors[name].type.quantized]
        if unread:
            warnings.warn(
                f"{self.path}: {len(unread)} tensors are not looked at, the first {unread[0]}. Got none of the "
                "original's linears in them. What they stand for is taken from the original.",
                BpwiseWarning,
                stacklevel=2,
            )
        return {linear: partial(self._decoded, linear) for linear in sorted(linears)}

    def _require_linear(self, linear: str) -> None:
        name = f"{linear}.weight"
        shape = self._source.shape(name) if name in self._source.names else (0, 0)
        for part in self.rows.parts(linear):
            columns = self._header.tensors[part.tensor].shape[-1]
            if columns != shape[1] or part.outputs[-1] >= shape[0]:
                raise CheckpointError(
                    f"{self.path}: not made of {self._source.directory}. Got {part.outputs[-1] + 1} outputs of "
                    f"{columns} inputs for {linear}. Expected {shape[0]} of {shape[1]}. Name its own original."
                )

    def _decoded(self, linear: str) -> Tensor:
        # Its weight, shape (out, K), in the dtype of the file.
        parts, weight = self.rows.parts(linear), f"{linear}.weight"
        values = [self._read(part) for part in parts]
        return joined_weight(parts, values, self._source.shape(weight), partial(self._source.tensor, weight))

    def _read(self, part: Part) -> Tensor:
        # The rows of a part in the order of its outputs; of stacked experts only its own are read.
        first, last = int(part.rows.min()), int(part.rows.max()) + 1
        values = read_rows(self._header.tensors[part.tensor], first, last)
        return values[torch.from_numpy(part.rows - first)]
