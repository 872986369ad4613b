"""Ggml's own kernels, which encode and decode the rows of a tensor.

They are in the shared library in the PyPI package
``libggml-python``, called through ctypes, which lets go of the GIL: a tensor's rows are independent of each other
(every row starts with a new block), so they are split over threads and the bytes do not depend on how.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ....errors import BpwiseError, ConfigError, FormatError, NumericalError, ShapeError, install_command
from .types import TYPES, GgmlType, ggml_type

__all__ = [
    "TYPES",
    "Bytes",
    "GgmlType",
    "build_tables",
    "decode",
    "encode",
    "ggml_type",
    "kernels_available",
    "require_kernels",
]

Bytes = npt.NDArray[np.uint8]
"""Encoded rows, shape (rows, row_bytes)."""

_CHUNKS_PER_THREAD = 4
"""More chunks than threads, because the search for scales takes longer on some rows than on others."""

_LARGEST_WEIGHT = 65504.0
"""The largest float16: blocks hold float16 scales."""

_LARGEST_EXPONENT = 127
"""Of the powers of two in float32."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def kernels_available() -> bool:
    """Return whether ggml's library is installed; nothing is loaded."""
    return importlib.util.find_spec("libggml") is not None


def require_kernels() -> None:
    """Refuse to go on where ggml's library is not installed; nothing is loaded.

    Raises:
        BpwiseError: It is not.
    """
    _library_file()


def build_tables(kinds: Sequence[GgmlType]) -> None:
    """Build, in a thread, the tables that ggml searches for the codes of some types; else the first encoding does.

    They take fifteen to twenty seconds of one core for all types, once a process. Encoding waits for them.

    Args:
        kinds: The types.

    Raises:
        BpwiseError: ggml's library is not installed.
    """
    library = _library()

    def build() -> None:
        for kind in kinds:
            library.ggml_quantize_init(kind.id)

    threading.Thread(target=build, name="ggml tables", daemon=True).start()


def encode(weights: Tensor, kind: GgmlType, importance: Tensor | None = None, *, threads: int = 1) -> Bytes:
    """Quantize rows with ggml's own encoder, bit for bit as llama.cpp does.

    Args:
        weights: Shape (rows, row_weights), float32, on the CPU.
        kind: The type to make.
        importance: Weight of each column's squared error, in any unit, float32, not negative: shape (row_weights,),
            or (rows, row_weights) for others in every row. llama.cpp takes the mean square of the column's inputs.
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
            f"{where}: not usable. Got a {weights.dtype} tensor of {weights.ndim} dimensions."
            " Expected a CPU float32 matrix."
            " The file is damaged: make it again."
        )
    rows, row_weights = weights.shape
    row_bytes = kind.row_bytes(row_weights)
    _check_weights(where, weights, kind)
    if kind.name in _FLOATS:
        stored = weights.to(_FLOATS[kind.name]).contiguous()
        return stored.view(torch.uint8).numpy().reshape(rows, row_bytes).copy()
    if importance is not None:
        _check_importance(where, importance, rows, row_weights)
        importance = _of_order_one(importance).contiguous()
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
    by_row = importance is not None and importance.ndim == 2
    stride = row_weights * weights.element_size()

    def work(first: int, last: int) -> None:
        target = result.ctypes.data + first * row_bytes
        size = 0
        step = 1 if by_row else last - first
        for row in range(first, last, step):
            own = important + row * stride if by_row and important else important
            place = result.ctypes.data + row * row_bytes
            source = weights.data_ptr() + row * stride
            size += library.ggml_quantize_chunk(kind.id, source, place, 0, step, row_weights, own)
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
            f"decode from {kind.name}: not usable. Got {data.dtype} of shape {data.shape}."
            " Expected uint8 rows of whole "
            f"{kind.block_bytes}-byte blocks."
            " The file is damaged: make it again."
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


def _check_weights(where: str, weights: Tensor, kind: GgmlType) -> None:
    """Make sure that the type can hold the weights."""
    if not weights.numel():
        return
    low, high = (float(edge) for edge in weights.aminmax())
    largest = max(-low, high)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise NumericalError(
            f"{where}: weights hold NaN or infinite values. Expected finite ones. Look at what made them."
        )
    if largest > _LARGEST_WEIGHT and kind.name not in ("F32", "BF16"):
        raise NumericalError(
            f"{where}: a weight is {largest:g}. Expected at most {_LARGEST_WEIGHT:g}, float16's largest. "
            "Store this tensor as BF16."
        )


def _check_importance(where: str, importance: Tensor, rows: int, row_weights: int) -> None:
    expected = (row_weights,) if importance.ndim < 2 else (rows, row_weights)
    if tuple(importance.shape) != expected:
        raise ShapeError(where, "importances", got=tuple(importance.shape), expected=expected)
    if importance.dtype != torch.float32 or importance.device.type != "cpu":
        raise FormatError(
            f"{where}: importances are {importance.dtype} on {importance.device}. Expected CPU float32."
            " The file is damaged: make it again."
        )
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise NumericalError(
            f"{where}: importances are NaN, infinite or negative. Expected mean squares. Measure again."
        )


def _of_order_one(importance: Tensor) -> Tensor:
    # ggml squares sums of weight times importance in float32, and ends the process where that overflows. What it makes
    # depends on ratios alone, so a power of two, which changes no digit of them, changes no bit of it.
    _, exponent = math.frexp(float(importance.max()) if importance.numel() else 0.0)
    return importance * 2.0 ** -max(exponent, -_LARGEST_EXPONENT)


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
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
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
                f"ggml's library: {kind.name} has blocks of {got[0]} weights in {got[1]} bytes. Expected "
                f"{kind.block_weights} in {kind.block_bytes}. Install the version that bpwise names: "
                f"{install_command('gguf')}."
            )
    return library


def _library_file() -> Path:
    # find_spec and not import: nothing of the package but this one file is wanted.
    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        raise BpwiseError(f"GGUF output needs ggml's library, which is not installed. Run: {install_command('gguf')}.")
    root = Path(next(iter(found.submodule_search_locations)))
    for folder in ("lib64", "lib", "bin"):
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll"):
            if (root / folder / name).is_file():
                return root / folder / name
    raise BpwiseError(
        f"{root}: no ggml-base library in it. Run: pip uninstall libggml-python, then {install_command('gguf')}."
    )


@cache
def _decoder(kind: GgmlType) -> Callable[[int, int, int], None]:
    # The kernels are named after the type, all small but for the K of the k-quants.
    name = kind.name.lower()
    function = getattr(_library(), f"dequantize_row_{name[:-1] + 'K' if name.endswith('_k') else name}")
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function  # type: ignore[no-any-return]  # ctypes makes it out of thin air
