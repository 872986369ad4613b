"""Importance matrices in llama.cpp's two formats: mean squares of the inputs of each linear, by tensor.

The newer format is a GGUF file with two tensors a linear, ``NAME.in_sum2`` (sums of squares) and ``NAME.counts``
(tokens summed over), one row an expert. The legacy one (``.dat``) is a list of names with mean squares times a number
of chunks. Sources: llama.cpp's ``tools/imatrix/imatrix.cpp`` and ``common/imatrix-loader.cpp``. Files come from
strangers: nothing that they say is believed before it is checked against their size.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ....checkpoint.files.atomic import atomic_file
from ....checkpoint.files.disk_errors import explained_reading
from ....checkpoint.files.operations import create
from ....errors import ConfigError, FormatError, ShapeError
from ....version import __version__
from ..file.emit import ALIGNMENT_BYTES, Planned, entry, header_bytes, padding
from ..file.header import GgufHeader, is_gguf, read_gguf_header
from ..file.metadata import VERSION_KEY
from ..ggml.types import TYPES

__all__ = [
    "ImportanceMatrix",
    "imatrix_metadata",
    "imatrix_notes",
    "is_own_imatrix",
    "read_imatrix",
    "require_fitting",
    "write_imatrix",
]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_TOKENS = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"

_MAX_NAME_BYTES = 1024
_NOTED_BYTES = 127
"""How much of a path llama-quantize notes in its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceMatrix:
    """Sums of squared inputs, as llama.cpp keeps them.

    Attributes:
        sums: By tensor name, sums over tokens of the squared inputs, float32, shape (experts, row_weights); one row
            for what is not split into experts. The legacy format does not tell experts apart: one long row.
        counts: By tensor name, number of tokens summed over, float32, shape (experts,); 0 for experts that saw none.
        datasets: Where the text came from.
        chunks: Number of chunks of text.
        chunk_tokens: Tokens in a chunk; 0 if unknown.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0

    @classmethod
    def from_means(
        cls,
        means: Mapping[str, Tensor],
        tokens: int | Mapping[str, Tensor],
        *,
        datasets: tuple[str, ...] = (),
        chunks: int = 0,
        chunk_tokens: int = 0,
    ) -> ImportanceMatrix:
        """Make a matrix of mean squares.

        Args:
            means: By tensor name, mean over tokens of the squared inputs, shape (row_weights,) or (experts,
                row_weights).
            tokens: Tokens averaged over: one number for all, or by tensor name, shape (experts,).
            datasets: Where the text came from.
            chunks: Number of chunks of text.
            chunk_tokens: Tokens in a chunk.

        Raises:
            ShapeError: Numbers of tokens are not one an expert.
        """
        sums, counts = {}, {}
        for name, mean in means.items():
            rows = mean.detach().cpu().float()
            rows = rows[None] if rows.ndim == 1 else rows
            count = torch.full((len(rows),), float(tokens)) if isinstance(tokens, int) else tokens[name].cpu().float()
            if count.shape != rows.shape[:1]:
                raise ShapeError(name, "numbers of tokens", got=tuple(count.shape), expected=(len(rows),))
            sums[name], counts[name] = rows * count[:, None], count
        return cls(sums=sums, counts=counts, datasets=datasets, chunks=chunks, chunk_tokens=chunk_tokens)

    def mean_squares(self, name: str) -> Tensor | None:
        """Return what ggml's encoder takes: mean squares, 1 for an expert that saw no token; None if not known.

        Args:
            name: A tensor's name, such as ``blk.0.attn_q.weight``.

        Returns:
            float32, shape (experts * row_weights,), computed as llama-quantize computes it.
        """
        if name not in self.sums:
            return None
        counts = self.counts[name][:, None]
        return torch.where(counts > 0, self.sums[name] / counts, torch.ones(())).reshape(-1)


def imatrix_metadata(matrix: ImportanceMatrix, file: str) -> dict[str, Any]:
    """Return the entries by which llama-quantize notes where importances came from.

    Of paths the last part alone: folders tell who made a file, and where.

    Args:
        matrix: The matrix.
        file: Its path, or what else to call it.
    """
    return imatrix_notes(file, matrix.datasets, entries=len(matrix.sums), chunks=matrix.chunks)


def imatrix_notes(file: str, datasets: Sequence[str], *, entries: int, chunks: int) -> dict[str, Any]:
    """Return the same of importances that are in no file: ``file`` says what to call them, 0 chunks are not known."""
    notes: dict[str, Any] = {"quantize.imatrix.file": _cut(_last_part(file))}
    if datasets:
        notes["quantize.imatrix.dataset"] = _cut(_last_part(datasets[0]))
    notes["quantize.imatrix.entries_count"] = entries
    if chunks > 0:
        notes["quantize.imatrix.chunks_count"] = chunks
    return notes


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises:
        FormatError: The file cannot be read, is damaged or crafted, or holds numbers that are no sums of squares.
    """
    path = Path(path)
    with explained_reading(path, FormatError):
        matrix = _read_gguf(path) if is_gguf(path) else _Legacy(path).matrix()
    for name in matrix.sums:
        for values in (matrix.sums[name], matrix.counts[name]):
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                raise _damaged(path, f"{name!r} holds numbers that are NaN, infinite or negative")
    return matrix


def require_fitting(matrix: ImportanceMatrix, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an importance matrix of another model.

    Args:
        matrix: The matrix.
        shapes: By tensor name, as in GGUF files, the shape of every tensor of the model: (experts,) rows, row_weights.

    Raises:
        ConfigError: No name in the matrix is that of a tensor, or a tensor has another number of inputs.
    """
    known = sorted(matrix.sums.keys() & shapes.keys())
    if not known:
        raise ConfigError(
            f"importance matrix: none of its {len(matrix.sums)} tensors is in the model. Got for example "
            f"{min(matrix.sums)!r}. Use a matrix that was made with this model."
        )
    for name in known:
        *experts, _, row_weights = (1, *shapes[name]) if len(shapes[name]) == 1 else shapes[name]
        got, expected = matrix.sums[name].numel(), math.prod(experts) * row_weights
        # As in llama.cpp, a lookup has no inputs to speak of.
        if got != expected and name != "token_embd.weight":
            raise ConfigError(
                f"importance matrix: {name} has {got} inputs. Expected {expected} as in the model. Use a matrix that "
                "was made with this model."
            )


def is_own_imatrix(path: Path) -> bool:
    """Return whether a file is an importance matrix that ``write_imatrix`` made in the newer format.

    The older format does not say who made it.
    """
    try:
        return is_gguf(path) and {VERSION_KEY, _DATASETS} <= read_gguf_header(path).metadata.keys()
    except (OSError, FormatError):
        return False


def write_imatrix(path: Path, matrix: ImportanceMatrix, *, legacy: bool = False) -> None:
    """Write an importance matrix that llama-quantize reads.

    Args:
        path: The file to make or replace.
        matrix: The matrix, with at least one tensor.
        legacy: Whether to write the older format; it keeps no counts of tokens.

    Raises:
        WorkDirectoryError: The file cannot be written.
    """
    with atomic_file(path) as temporary, create(temporary) as file:
        if legacy:
            _write_legacy(file, matrix)
        else:
            _write_gguf(file, matrix)


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_gguf_header(path)
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    if not names:
        raise _damaged(path, f"no importance matrix. Expected tensors named like blk.0.attn_q.weight{_SUMS}")
    sums, counts = {}, {}
    for name in names:
        if name + _COUNTS not in header.tensors:
            raise _damaged(path, f"{name!r} has sums but no counts")
        count = _values(header, name + _COUNTS).reshape(-1)
        total = _values(header, name + _SUMS).reshape(-1)
        if total.numel() % count.numel():
            raise _damaged(path, f"{name!r} has {total.numel()} sums for {count.numel()} experts")
        sums[name], counts[name] = total.reshape(count.numel(), -1), count
    datasets = header.metadata.get(_DATASETS, [])
    chunks, chunk_tokens = header.metadata.get(_CHUNKS, 0), header.metadata.get(_CHUNK_TOKENS, 0)
    if not isinstance(datasets, list) or not isinstance(chunks, int) or not isinstance(chunk_tokens, int):
        raise _damaged(path, f"{_DATASETS}, {_CHUNKS} or {_CHUNK_TOKENS} is of a wrong type")
    return ImportanceMatrix(
        sums=sums, counts=counts, datasets=tuple(map(str, datasets)), chunks=chunks, chunk_tokens=chunk_tokens
    )


def _values(header: GgufHeader, name: str) -> Tensor:
    tensor = header.tensors[name]
    if tensor.type.name != "F32":
        raise _damaged(header.path, f"{name!r} is of type {tensor.type.name}. Expected F32")
    with header.path.open("rb") as file:
        file.seek(tensor.offset_bytes)
        data = bytearray(file.read(tensor.size_bytes))
    if len(data) != tensor.size_bytes:
        raise _damaged(header.path, "it has become shorter while it was read")
    return torch.frombuffer(data, dtype=torch.float32)


class _Legacy:
    """Goes once through a file of the legacy format."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A file is a few MB a billion weights; read whole, and every count is checked against what is left.
        self._data = path.read_bytes()
        self._position = 0

    def matrix(self) -> ImportanceMatrix:
        number = self._number("entries")
        if number < 1:
            raise _damaged(self._path, f"no importance matrix. Got {number} entries")
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for _ in range(number):
            name = self._text("a name")
            calls = self._number("calls")
            values = self._bytes(4 * self._size("values"), f"{name!r}")
            if name in sums or not values:
                raise _damaged(self._path, f"{name!r} is there twice, or is empty")
            sums[name] = torch.frombuffer(bytearray(values), dtype=torch.float32)[None]
            # Without a number of calls the values are the means.
            counts[name] = torch.tensor([float(max(1, calls))])
        chunks, datasets = 0, []
        if self._position < len(self._data):
            chunks = self._number("chunks")
            if self._position < len(self._data):
                datasets = [self._text("the name of the dataset")]
        return ImportanceMatrix(
            sums=sums, counts=counts, datasets=tuple(filter(None, datasets)), chunks=max(0, chunks), chunk_tokens=0
        )

    def _text(self, what: str) -> str:
        size = self._size(what)
        if size > _MAX_NAME_BYTES:
            raise _damaged(self._path, f"{what} takes {size} bytes")
        return self._bytes(size, what).decode("utf-8", "surrogateescape")

    def _size(self, what: str) -> int:
        size = self._number(what)
        if size < 0:
            raise _damaged(self._path, f"{size} {what}")
        return size

    def _number(self, what: str) -> int:
        value: int = struct.unpack("<i", self._bytes(4, what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        data = self._data[self._position : self._position + count]
        if len(data) < count:
            raise _damaged(self._path, f"it ends in the middle of {what}")
        self._position += count
        return data


def _write_gguf(file: BinaryIO, matrix: ImportanceMatrix) -> None:
    entries = {
        "general.type": entry("imatrix"),
        VERSION_KEY: entry(__version__),
        _DATASETS: entry(list(matrix.datasets)),
        _CHUNKS: entry(matrix.chunks),
        _CHUNK_TOKENS: entry(matrix.chunk_tokens),
    }
    kind = TYPES["F32"]
    planned, values = [], []
    for name in sorted(matrix.sums, key=str.encode):
        sums, counts = matrix.sums[name].cpu().float(), matrix.counts[name].cpu().float()
        planned += [Planned(name + _SUMS, kind, tuple(sums.shape)), Planned(name + _COUNTS, kind, (len(counts), 1))]
        values += [sums, counts]
    file.write(header_bytes(entries, planned, ALIGNMENT_BYTES))
    for tensor in values:
        data = tensor.contiguous().numpy().tobytes()
        file.write(data + bytes(padding(len(data), ALIGNMENT_BYTES)))


def _write_legacy(file: BinaryIO, matrix: ImportanceMatrix) -> None:
    file.write(struct.pack("<i", len(matrix.sums)))
    for name in sorted(matrix.sums, key=str.encode):
        counts = matrix.counts[name].cpu().float()
        # Where the length of a chunk is not known, a count of 1 keeps the means as they are.
        calls = -(-int(counts.max()) // matrix.chunk_tokens) if matrix.chunk_tokens else 1
        means = matrix.mean_squares(name)
        assert means is not None
        raw = name.encode("utf-8", "surrogateescape")
        file.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, means.numel()))
        file.write((means * float(calls)).numpy().tobytes())
    dataset = (matrix.datasets[-1] if matrix.datasets else "").encode("utf-8", "surrogateescape")
    file.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]  # of whatever system


def _cut(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:_NOTED_BYTES].decode("utf-8", "surrogateescape")


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: {what}. The file is damaged or no importance matrix: get or make it again.")
