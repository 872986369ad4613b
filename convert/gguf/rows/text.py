"""A row map as text, for the metadata of files and the header of measurements. Needs no torch.

Blocks have few orders of rows, and most tensors have the same as those of the block before, so orders are numbered and
kept as differences, which compress to almost nothing. Texts come from strangers: what is in one is checked before use.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ....checkpoint.files.schemas import Count, check_schema
from ....errors import FormatError
from .rowmap import RowMap, TensorRows

__all__ = ["map_from_text", "map_to_text"]

_VERSION = 2

_MOST_BYTES = 1 << 30
"""Of the text once it is unpacked: a model of 60 blocks with 256 experts each takes 3 MB."""

_MOST_ROWS = 1 << 24
"""Of a tensor; vocabularies have at most a quarter million, and all experts of a block together three million."""

_REMEDY = "The map is damaged: make the file again."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor; its orders are numbers of ``_Map.orders``, None where rows or columns are in place.

    ``scaled`` is one of numbers of ``factors``, None for the first; no factors where rows are not multiplied.
    """

    linears: tuple[str, ...]
    rows: Annotated[int, msgspec.Meta(ge=1, le=_MOST_ROWS)]
    source: Count | None
    output: Count | None
    columns: Count | None
    factors: tuple[float, ...]
    scaled: Count | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Map:
    """The whole text; ``orders`` are differences of neighbours, each beginning with its first number."""

    version: int
    orders: tuple[tuple[Annotated[int, msgspec.Meta(ge=-_MOST_ROWS, le=_MOST_ROWS)], ...], ...]
    tensors: dict[str, _Tensor]
    unexplained: dict[str, str]


def map_to_text(rows: RowMap) -> str:
    """Return a map as text: letters, digits and ``+/=``."""
    orders: dict[bytes, int] = {}
    listed: list[list[int]] = []

    def number(order: NDArray[np.int64] | None, plain: NDArray[np.int64]) -> int | None:
        if order is None or np.array_equal(order, plain):
            return None
        found = orders.setdefault(order.tobytes(), len(orders))
        if found == len(listed):
            listed.append(np.diff(order, prepend=0).tolist())
        return found

    tensors = {}
    for name, own in rows.tensors.items():
        zeros = np.zeros(len(own.source), dtype=np.int64)
        factors, scaled = (None, None) if own.factors is None else np.unique(own.factors, return_inverse=True)
        tensors[name] = {
            "linears": own.linears,
            "rows": len(own.source),
            "source": number(own.source, zeros),
            "output": number(own.output, np.arange(len(own.output))),
            "columns": number(own.columns, zeros[:0]),
            "factors": [] if factors is None else factors.tolist(),
            "scaled": number(scaled, zeros),
        }
    content = {"version": _VERSION, "orders": listed, "tensors": tensors, "unexplained": dict(rows.unexplained)}
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    return base64.b64encode(packed).decode("ascii")


def map_from_text(text: Any, where: str) -> RowMap:
    """Return the map that ``map_to_text`` made a text of.

    Args:
        text: The text, as it was found.
        where: Where that was, to begin messages with.

    Raises:
        FormatError: It is damaged, or of another version.
    """
    known = check_schema(_unpacked(text, where), _Map, FormatError, where=where, remedy=_REMEDY)
    if known.version != _VERSION:
        raise FormatError(f"{where}: map of another version. Got {known.version}. Expected {_VERSION}. Update bpwise.")
    orders = [np.cumsum(np.array(each, dtype=np.int64)) for each in known.orders]
    most = max((own.rows for own in known.tensors.values()), default=0)
    rising, zeros = np.arange(most), np.zeros(most, dtype=np.int64)

    def order(name: str, number: int, count: int | None = None, below: int = _MOST_ROWS) -> NDArray[np.int64]:
        found = orders[number] if number < len(orders) else zeros[:0]
        if not found.size or found.min() < 0 or found.max() >= below or count not in (None, len(found)):
            raise FormatError(f"{where}: {name} has an order that cannot be. Got number {number}. {_REMEDY}")
        return found

    def factors(name: str, own: _Tensor) -> NDArray[np.float32] | None:
        if not own.factors:
            return None
        with np.errstate(over="ignore"):
            values = np.array(own.factors, dtype=np.float32)
        if not (np.isfinite(values) & (values != 0)).all():
            raise FormatError(f"{where}: {name} has a factor that is zero or infinite. Got {own.factors}. {_REMEDY}")
        return values[zeros[: own.rows] if own.scaled is None else order(name, own.scaled, own.rows, len(values))]

    def rows(name: str, own: _Tensor) -> TensorRows:
        columns = None if own.columns is None else order(name, own.columns)
        if not own.linears or (columns is not None and not np.array_equal(np.sort(columns), np.arange(len(columns)))):
            raise FormatError(f"{where}: {name} has no linears, or columns that are not each there once. {_REMEDY}")
        return TensorRows(
            own.linears,
            zeros[: own.rows] if own.source is None else order(name, own.source, own.rows, len(own.linears)),
            rising[: own.rows] if own.output is None else order(name, own.output, own.rows),
            columns,
            factors(name, own),
        )

    return RowMap({name: rows(name, own) for name, own in known.tensors.items()}, known.unexplained)


def _unpacked(text: Any, where: str) -> Mapping[str, Any]:
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(str(text).encode(), validate=True), _MOST_BYTES)
        if not unpacking.eof:
            raise FormatError(f"{where}: incomplete, or larger than any map. {_REMEDY}")
        found: Mapping[str, Any] = json.loads(content)
    except (binascii.Error, zlib.error, ValueError, RecursionError) as cause:
        raise FormatError(f"{where}: cannot be unpacked ({cause}). {_REMEDY}") from cause
    return found
