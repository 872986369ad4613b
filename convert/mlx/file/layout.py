"""What an MLX model holds before it is quantized: mlx-lm's tensors, and which of the original's linears are in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import msgspec

from ....checkpoint.files.schemas import Positive, check_schema
from ....errors import FormatError

__all__ = ["Layout", "StoredTensor", "layout_from_json"]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of mlx-lm's model.

    Attributes:
        shape: Sizes of its dimensions, outermost first.
        dtype: As torch calls it: ``bfloat16``.
        linears: Full names of the linears, in Transformers, whose outputs are its rows, one after another, of all
            experts; empty where they are not known.
        outputs: Number of rows of each of them.
        source: The original's tensor that it equals; None if it is made of linears, or equals none.
    """

    shape: tuple[_Size, ...]
    dtype: str
    linears: tuple[str, ...] = ()
    outputs: tuple[Positive, ...] = ()
    source: str | None = None

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of a weight that is not quantized, and of a scale."""
        return _ITEM_BYTES.get(self.dtype, 4)

    @property
    def rows(self) -> int:
        """Number of outputs, of all experts together."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All tensors of a model, by name, in the order of the file.

    Attributes:
        tensors: The tensors.
        modules: Names of those that mlx-lm can quantize, without ``.weight``.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    @cached_property
    def quantizable(self) -> tuple[str, ...]:
        """Names of the tensors that can be quantized, and are made of linears that are known."""
        names = (f"{module}.weight" for module in self.modules)
        return tuple(name for name in names if name in self.tensors and self.tensors[name].linears)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        tensors: dict[str, Any] = msgspec.to_builtins(self.tensors)
        return {"tensors": tensors, "modules": list(self.modules)}


def layout_from_json(raw: Any, *, where: str, remedy: str) -> Layout:
    """Return what ``Layout.to_json`` returned.

    Args:
        raw: Parsed JSON.
        where: Where it was, to begin messages with.
        remedy: What to do if it is damaged, as a sentence.

    Raises:
        FormatError: It is damaged.
    """
    found = check_schema(raw, Layout, FormatError, where=where, remedy=remedy)
    for name, tensor in found.tensors.items():
        held = len(tensor.outputs) == len(tensor.linears)
        if not tensor.shape or not held or (tensor.linears and sum(tensor.outputs) != tensor.rows):
            raise FormatError(f"{where}: {name} cannot be stored as it says. Got shape {tensor.shape}. {remedy}")
    return found
