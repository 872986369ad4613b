"""Ggml's tensor types, and ggml's own kernels to encode and decode them.

The table of types is plain data and needs nothing. The kernels come from the shared library in the PyPI package
``libggml-python``, called through ctypes, which lets go of the GIL: a tensor's rows are independent of each other
(every row starts with a new block), so they are split over threads and the bytes do not depend on how. Source of
the numbers: ggml's ``ggml.h`` and ``ggml-common.h``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BpwiseError, ConfigError, FormatError, NumericalError, ShapeError

__all__ = ["TYPES", "Bytes", "GgmlType", "decode", "encode", "ggml_type", "kernels_available", "type_by_id"]

Bytes = npt.NDArray[np.uint8]
"""Encoded rows, shape (rows, row_bytes)."""

_CHUNKS_PER_THREAD = 4
"""More chunks than threads, because the search for scales takes longer on some rows than on others."""

_LARGEST_WEIGHT = 65504.0
"""The largest float16: blocks hold float16 scales."""

_LARGEST_PRODUCT = 1e14
"""Limit of weight times importance. ggml squares sums over 256 of them times codes up to 127 in float32, and ends
the process where that overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """How ggml stores the weights of a row.

    Attributes:
        name: ggml's name, in capitals but for the K, as llama-quantize prints it: ``Q4_K``.
        id: Number of the type in GGUF files.
        block_weights: Weights in a block; a row is a whole number of blocks.
        block_bytes: Bytes of a block, scales included.
        needs_importance: Whether ggml's encoder cannot work without importances.
    """

    name: str
    id: int
    block_weights: int
    block_bytes: int
    needs_importance: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_weights

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in blocks with scales, and not as floating-point numbers."""
        return self.block_weights > 1

    def fits(self, row_weights: int) -> bool:
        """Return whether a row of that many weights is a whole number of blocks."""
        return row_weights % self.block_weights == 0

    def row_bytes(self, row_weights: int) -> int:
        """Return the bytes of a row of that many weights.

        Raises:
            ShapeError: The row is not a whole number of blocks.
        """
        if not self.fits(row_weights):
            expected = (row_weights // self.block_weights * self.block_weights,)
            raise ShapeError(self.name, "a row, to be whole blocks,", got=(row_weights,), expected=expected)
        return row_weights // self.block_weights * self.block_bytes


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NEEDY = ("IQ2_XXS", "IQ2_XS", "IQ1_S")

TYPES: dict[str, GgmlType] = {
    name: GgmlType(name=name, id=number, block_weights=weights, block_bytes=size, needs_importance=name in _NEEDY)
    for name, number, weights, size in [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q8_0", 8, 32, 34),
        ("Q6_K", 14, 256, 210),
        ("Q5_1", 7, 32, 24),
        ("Q5_K", 13, 256, 176),
        ("Q5_0", 6, 32, 22),
        ("Q4_1", 3, 32, 20),
        ("Q4_K", 12, 256, 144),
        ("Q4_0", 2, 32, 18),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("MXFP4", 39, 32, 17),
        ("Q3_K", 11, 256, 110),
        ("IQ3_S", 21, 256, 110),
        ("IQ3_XXS", 18, 256, 98),
        ("Q2_K", 10, 256, 84),
        ("IQ2_S", 22, 256, 82),
        ("IQ2_XS", 17, 256, 74),
        ("IQ2_XXS", 16, 256, 66),
        ("TQ2_0", 35, 256, 66),
        ("IQ1_M", 29, 256, 56),
        ("TQ1_0", 34, 256, 54),
        ("IQ1_S", 19, 256, 50),
    ]
}
"""Every type that ``encode`` can make, by name, the largest first.

Q1_0, Q2_0 and NVFP4 are left out: they are young, made for models trained on them, and few released readers know them.
"""


def ggml_type(name: str) -> GgmlType:
    """Return the type of that name; upper and lower case are the same.

    Raises:
        ConfigError: There is no such type.
    """
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise ConfigError(f"ggml type: unknown name, got {name!r}, expected one of {', '.join(TYPES)}.") from None


def type_by_id(number: int) -> GgmlType | None:
    """Return the type with that number in GGUF files, or None if it is not in ``TYPES``."""
    return next((kind for kind in TYPES.values() if kind.id == number), None)


def kernels_available() -> bool:
    """Return whether ggml's library is installed; nothing is loaded."""
    return importlib.util.find_spec("libggml") is not None


def encode(weights: Tensor, kind: GgmlType, importance: Tensor | None = None, *, threads: int = 1) -> Bytes:
    """Quantize rows with ggml's own encoder, bit for bit as llama.cpp does.

    Args:
        weights: Shape (rows, row_weights), float32, on the CPU.
        kind: The type to make.
        importance: Weight of each column's squared error, dimensionless: shape (row_weights,), float32, not
            negative. llama.cpp takes the mean square of the column's inputs.
        threads: Number of threads to split the rows over; the result does not depend on it.

    Returns:
        The encoded rows, uint8, shape (rows, ``kind.row_bytes(row_weights)``).

    Raises:
        BpwiseError: ggml's library is not installed.
        ConfigError: The type needs importances and there are none.
        NumericalError: Weights or importances are not finite, or too large for the type's float16 scales.
        ShapeError: A row is not a whole number of blocks, or the importances are not one a column.
    """
    where = f"encode to {kind.name}"
    if weights.ndim != 2 or weights.dtype != torch.float32 or weights.device.type != "cpu":
        raise FormatError(
            f"{where}: got a {weights.dtype} tensor of {weights.ndim} dimensions, expected a CPU float32 matrix."
        )
    rows, row_weights = weights.shape
    row_bytes = kind.row_bytes(row_weights)
    largest = _largest_weight(where, weights, kind)
    if kind.name in _FLOATS:
        stored = weights.to(_FLOATS[kind.name]).contiguous()
        return stored.view(torch.uint8).numpy().reshape(rows, row_bytes).copy()
    if importance is not None:
        _check_importance(where, importance, row_weights, largest)
        importance = importance.contiguous()
    elif kind.needs_importance:
        raise ConfigError(
            f"{where}: no importances, which this type cannot do without. Measure the model, or give an imatrix file."
        )
    result = np.empty((rows, row_bytes), dtype=np.uint8)
    if not result.size:
        return result
    library = _library()
    weights = weights.contiguous()
    important = None if importance is None else importance.data_ptr()

    def work(first: int, last: int) -> None:
        source = weights.data_ptr() + first * row_weights * weights.element_size()
        target = result.ctypes.data + first * row_bytes
        size = library.ggml_quantize_chunk(kind.id, source, target, 0, last - first, row_weights, important)
        assert size == (last - first) * row_bytes, f"{where}: ggml wrote {size} bytes"
        if not library.ggml_validate_row_data(kind.id, target, size):
            raise NumericalError(
                f"{where}: ggml made scales that are not finite. The weights are out of this type's range."
            )

    _over_rows(rows, threads, work)
    return result


def decode(data: Bytes, kind: GgmlType, *, threads: int = 1) -> Tensor:
    """Undo ``encode``, with ggml's own decoder.

    Args:
        data: Encoded rows, uint8, shape (rows, row_bytes).
        kind: Their type.
        threads: Number of threads to split the rows over; the result does not depend on it.

    Returns:
        The weights that a reader sees, float32, shape (rows, row_weights), on the CPU.

    Raises:
        BpwiseError: ggml's library is not installed.
        FormatError: A row is not a whole number of blocks.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % kind.block_bytes:
        raise FormatError(
            f"decode from {kind.name}: got {data.dtype} of shape {data.shape}, expected uint8 rows of whole "
            f"{kind.block_bytes}-byte blocks."
        )
    data = np.ascontiguousarray(data)
    rows, row_weights = data.shape[0], data.shape[1] // kind.block_bytes * kind.block_weights
    if kind.name in _FLOATS:
        return torch.from_numpy(data.copy()).view(_FLOATS[kind.name]).float().reshape(rows, row_weights)
    result = torch.empty((rows, row_weights), dtype=torch.float32)
    if not result.numel():
        return result
    kernel = _decoder(kind)

    def work(first: int, last: int) -> None:
        source = data.ctypes.data + first * data.shape[1]
        kernel(source, result.data_ptr() + first * row_weights * 4, (last - first) * row_weights)

    _over_rows(rows, threads, work)
    return result


def _largest_weight(where: str, weights: Tensor, kind: GgmlType) -> float:
    """Return the largest absolute weight, having made sure that the type can hold it."""
    if not weights.numel():
        return 0.0
    low, high = (float(edge) for edge in weights.aminmax())
    largest = max(-low, high)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NumericalError(
            f"{where}: weights hold NaN or infinite values, expected finite ones. Look at what made them."
        )
    if largest > _LARGEST_WEIGHT and kind.name not in ("F32", "BF16"):
        raise NumericalError(
            f"{where}: a weight is {largest:g}, expected at most {_LARGEST_WEIGHT:g}, float16's largest. "
            "Store this tensor as BF16."
        )
    return largest


def _check_importance(where: str, importance: Tensor, row_weights: int, largest_weight: float) -> None:
    if tuple(importance.shape) != (row_weights,):
        raise ShapeError(where, "importances", got=tuple(importance.shape), expected=(row_weights,))
    if importance.dtype != torch.float32 or importance.device.type != "cpu":
        raise FormatError(f"{where}: importances are {importance.dtype} on {importance.device}, expected CPU float32.")
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise NumericalError(
            f"{where}: importances are NaN, infinite or negative, expected mean squares. Measure again."
        )
    if importance.numel() and float(importance.max()) * largest_weight > _LARGEST_PRODUCT:
        raise NumericalError(
            f"{where}: importance {float(importance.max()):g} at weights up to {largest_weight:g} overflows ggml, "
            f"expected a product of at most {_LARGEST_PRODUCT:g}. Divide the importances by their mean."
        )


def _over_rows(rows: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(first, last)`` for consecutive ranges that cover all rows."""
    if threads < 2 or rows < 2:
        work(0, rows)
        return
    step = max(1, rows // (threads * _CHUNKS_PER_THREAD))
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(work, first, min(rows, first + step)) for first in range(0, rows, step)]:
            job.result()


@cache
def _library() -> ctypes.CDLL:
    """Load ggml's library once and check that its types are ours."""
    library = ctypes.CDLL(str(_library_file()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    for kind in TYPES.values():
        got = library.ggml_blck_size(kind.id), library.ggml_type_size(kind.id)
        if got != (kind.block_weights, kind.block_bytes):
            raise BpwiseError(
                f"ggml's library: {kind.name} has blocks of {got[0]} weights in {got[1]} bytes, expected "
                f"{kind.block_weights} in {kind.block_bytes}. Install the version that bpwise names: "
                "pip install 'bpwise[gguf]'"
            )
    return library


def _library_file() -> Path:
    # find_spec and not import: nothing of the package but this one file is wanted.
    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        raise BpwiseError("GGUF output needs ggml's library, which is not installed. Run: pip install 'bpwise[gguf]'")
    root = Path(next(iter(found.submodule_search_locations)))
    for folder in ("lib64", "lib", "bin"):
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll"):
            if (root / folder / name).is_file():
                return root / folder / name
    raise BpwiseError(
        f"{root}: no ggml-base library in it. Install it again: pip install --force-reinstall 'bpwise[gguf]'"
    )


@cache
def _decoder(kind: GgmlType) -> Callable[[int, int, int], None]:
    # The kernels are named after the type, all small but for the K of the k-quants.
    name = kind.name.lower()
    function = getattr(_library(), f"dequantize_row_{name[:-1] + 'K' if name.endswith('_k') else name}")
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function  # type: ignore[no-any-return]  # ctypes makes it out of thin air
