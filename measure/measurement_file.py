"""A measurement's file, read with every entry and every tensor checked against what the others say. Needs no torch.

Measurements are passed on from hand to hand: whatever one says is checked here, once, so that planning and rounding
can index with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import safe_open

from ..checkpoint.files.schemas import Count, Positive, check_schema, parse_schema
from ..errors import FormatError

__all__ = [
    "CURVES",
    "HEADER_KEY",
    "REMEDY",
    "CurvesHeader",
    "EmbeddingHeader",
    "MeasuredTensors",
    "MeasurementHeader",
    "read_measurement",
]

HEADER_KEY = "bpwise_measurement"
"""Metadata entry that tells measurements from other safetensors files."""

CURVES = "curves/"
"""What the names of curves begin with; ``FORMAT/LINEAR.NAME`` follows."""

REMEDY = "The measurement is damaged: measure the model again."
"""What to do about a measurement that cannot be read."""

_Name = Annotated[str, msgspec.Meta(min_length=1)]
_Damping = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingHeader:
    """What the header says of the token embeddings; see ``MeasuredTable``."""

    name: _Name
    tokens: Positive
    tied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvesHeader:
    """What the header says of a format's curves; see ``FormatCurves``."""

    version: Positive
    header: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementHeader:
    """The entry of the file's metadata; see ``Measurement``.

    Attributes:
        linears: Names of the decoder's linears, in model order.
        head: Name of the output head.
        embedding: The token embeddings.
        layer_embedding: Those that blocks have of their own; None for most models.
        other_weights: Number of all other weights.
        token_weights: By linear, the one that its token weights are stored under.
        curves: By format, what its curves depend on.
        damping: By linear; None where feedback was given up: JSON knows no infinity.
        chosen_tokens: By linear of an expert, the number of tokens that chose it.
        provenance: Where the measurement came from.
        config: The language model's config.json; empty in files of older versions.
        sha256: Fingerprint of the measurement, 32 hexadecimal digits; None in files of older versions.
    """

    linears: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1)]
    head: _Name
    embedding: EmbeddingHeader
    layer_embedding: EmbeddingHeader | None
    other_weights: Count
    token_weights: dict[str, str]
    curves: dict[str, CurvesHeader]
    damping: dict[str, _Damping | None]
    chosen_tokens: dict[str, Count]
    provenance: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Check what the entries say of each other.

        Raises:
            ValueError: They contradict each other, or name what there is not.
        """
        names = [*self.linears, self.head]
        if len({*names, self.embedding.name}) <= len(names):
            raise ValueError("linears, head and embedding must have different names")
        for what, known in (("token_weights", self.token_weights), ("damping", self.damping)):
            if known.keys() != set(names):
                raise ValueError(f"{what} must name the linears and the head, each of them once")
        if not self.chosen_tokens.keys() <= set(self.linears):
            raise ValueError("chosen_tokens must name linears")
        if any("/" in name for name in self.curves):
            raise ValueError("curves must name formats")


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredTensors:
    """The tensors of a file, or a format's curves, each checked when it is taken.

    Attributes:
        where: What messages begin with.
        tensors: By name.
    """

    where: str
    tensors: Mapping[str, NDArray[Any]]

    def take(
        self,
        name: str,
        dtype: DTypeLike,
        shape: tuple[int | None, ...],
        *,
        least: float | None = 0,
        infinite: bool = False,
        empty: bool = False,
    ) -> NDArray[Any]:
        """Return a tensor.

        Args:
            name: Its name.
            dtype: What it is stored as.
            shape: Its dimensions; None for a size that others follow from.
            least: No value is smaller; None for any.
            infinite: Whether values may be infinite.
            empty: Whether a size that is None may be 0.

        Raises:
            FormatError: It is missing, or something else.
        """
        if name not in self.tensors:
            raise self.error(name, "is missing", f"{len(self.tensors)} other tensors", "all that the header names")
        values = self.tensors[name]
        fits = values.ndim == len(shape) and all(
            size == expected if expected is not None else size > 0 or empty
            for size, expected in zip(values.shape, shape, strict=True)
        )
        if values.dtype != dtype or not fits:
            sizes = " x ".join("any" if size is None else str(size) for size in shape)
            raise self.error(
                name,
                "has a wrong dtype or shape",
                f"{values.dtype} of {' x '.join(map(str, values.shape))}",
                f"{np.dtype(dtype)} of {sizes}",
            )
        if values.dtype.kind == "f" and not (np.isfinite(values) if not infinite else ~np.isnan(values)).all():
            raise self.error(name, "holds NaN or infinite values", "some", "none")
        if least is not None and values.size and values.min() < least:
            raise self.error(name, "holds values out of range", f"{values.min()}", f"at least {least:g}")
        return values

    def curves(self, format_: str, owners: Collection[str]) -> dict[str, dict[str, NDArray[Any]]]:
        """Return the curves of a format by owner and name; what they hold its reader checks, but for NaN.

        Args:
            format_: Name of the format.
            owners: Names of the linears and of the embeddings.

        Raises:
            FormatError: One belongs to nothing, or holds NaN.
        """
        curves: dict[str, dict[str, NDArray[Any]]] = {owner: {} for owner in owners}
        start = f"{CURVES}{format_}/"
        for name, values in self.tensors.items():
            if not name.startswith(start):
                continue
            owner, _, field = name.removeprefix(start).rpartition(".")
            if owner not in curves:
                raise self.error(name, "belongs to nothing", repr(owner), "a linear or the embeddings")
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise self.error(name, "holds NaN", "some", "none")
            curves[owner][field] = values
        return curves

    def error(self, name: str, problem: str, got: str, expected: str) -> FormatError:
        """Return what to raise of a tensor."""
        return FormatError(f"{self.where}: tensor {name!r} {problem}. Got {got}. Expected {expected}. {REMEDY}")


def read_measurement(path: Path, version: int) -> tuple[MeasurementHeader, MeasuredTensors]:
    """Read a measurement's file.

    Args:
        path: The file.
        version: The only version that is taken.

    Raises:
        FormatError: It is not a measurement, is damaged, or has another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as cause:  # the library raises what it likes, for dtypes that NumPy lacks an AttributeError
        raise FormatError(f"{path}: cannot be read as a measurement ({cause!r}). {REMEDY}") from cause
    if text is None:
        raise FormatError(
            f"{path}: not a measurement. Got a safetensors file without the entry {HEADER_KEY}. Expected what "
            "`bpwise measure` writes. Check the path."
        )
    where = f"{path}: {HEADER_KEY}"
    raw = parse_schema(text, dict[str, Any], FormatError, where=where, remedy=REMEDY)
    if raw.get("version") != version:
        raise FormatError(
            f"{path}: measurement of another version. Got {str(raw.get('version'))[:20]}. Expected {version}. Measure "
            "the model again with `bpwise measure`."
        )
    header = check_schema(raw, MeasurementHeader, FormatError, where=where, remedy=REMEDY)
    return header, MeasuredTensors(str(path), tensors)
