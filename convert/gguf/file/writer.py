"""Writes a quantized GGUF file as llama-quantize does, tensor after tensor, and proves that it reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ....checkpoint.files.atomic import atomic_file
from ....checkpoint.files.operations import create, sync
from ....errors import ConfigError, FormatError, ShapeError, VerificationError
from ....progress import Progress, silent
from ...model import Verification
from ..ggml.kernels import Bytes
from ..ggml.types import GgmlType
from .describe import verification_of
from .digest import tensor_digest, with_digest
from .emit import Planned, entry, header_bytes, int32_entry, padding, uint16_entry
from .header import GgufHeader, read_gguf_header
from .metadata import DIGEST_KEY, RUN_KEY
from .roles import writing_order
from .split import SPLIT_KEYS, first_path, is_later_part, joined, parts_beside, read_model_header
from .tensor import TensorWriter

__all__ = ["planned_bytes", "planned_parts", "write_gguf"]

_QUANTIZATION_VERSION = 2
"""ggml's ``GGML_QNT_VERSION``."""

_ONE_FILE = 1 << 62
"""As a largest size: all in one file."""


def planned_bytes(
    header: GgufHeader, types: Mapping[str, GgmlType], *, file_type: int, metadata: Mapping[str, Any] | None = None
) -> int:
    """Return the exact size in bytes of the file that ``write_gguf`` would write.

    Args:
        header: The unquantized model.
        types: As for ``write_gguf``.
        file_type: As for ``write_gguf``.
        metadata: As for ``write_gguf``.

    Raises:
        ConfigError: A tensor is not in the model.
        ShapeError: A row is not a whole number of its type's blocks.
    """
    planned = _plan(header, types)
    start = len(header_bytes(_entries(header, file_type, metadata or {}), planned, header.alignment_bytes))
    sizes = [tensor.size_bytes for tensor in planned]
    return start + sum(size + padding(size, header.alignment_bytes) for size in sizes)


def write_gguf(
    base: Path,
    output: Path,
    types: Mapping[str, GgmlType],
    *,
    file_type: int,
    split_max_bytes: int = _ONE_FILE,
    encoded: Mapping[str, Callable[[], Iterator[Bytes]]] | None = None,
    distances: Mapping[str, float] | None = None,
    importance: Callable[[str], Tensor | None] | None = None,
    metadata: Mapping[str, Any] | None = None,
    run: str | None = None,
    threads: int = 1,
    progress: Progress = silent,
) -> Verification:
    """Quantize a GGUF file; ``output`` appears only once all of it has been read back and found right.

    With the types of a mixture and the same importances the file is byte for byte llama-quantize's own.

    Args:
        base: The unquantized model, in one file; its tensors are F32, F16 or BF16.
        output: File to make, which must not exist; of a model in parts, the first (``split.first_path``).
        types: By name of tensor, the type to store it in; what is missing stays as it is.
        file_type: Number for ``general.file_type``: that of a mixture.
        split_max_bytes: Most bytes of tensors in one file; a larger model is written in parts.
        encoded: By name of tensor, a function that yields its finished matrices, those of experts one after the other,
            each uint8, shape (rows, row_bytes); called once each. The other tensors are encoded here.
        distances: By name of such a tensor, ``||W_hat - W||^2`` as intended, where it was not rounded to stay
            near its weights. The others, and what is encoded here, must not be further from them than zeros are.
        importance: From the name of a tensor to the mean squares of its inputs, float32, shape (experts *
            row_weights,), or None where they are not known: ``ImportanceMatrix.mean_squares``.
        metadata: Further entries by key, added or replaced: bool, str, float, list of str, or unsigned int. Where
            ``DIGEST_KEY`` stands for ``DIGEST_ROOM``, the file gets a digest of itself.
        run: Of a model in parts, what those after the first say of their run; None for what ``metadata`` says. Parts of
            the same run that were left without the first are replaced.
        threads: Number of threads to encode with; the bytes do not depend on it.
        progress: Shows how far the writing is.

    Returns:
        What was read back.

    Raises:
        BpwiseError: ggml's library is not installed.
        ConfigError: A tensor is not in the model, or a type needs importances and there are none.
        FormatError: The base is damaged, or already quantized.
        NumericalError: Weights or importances are not finite, or out of a type's range.
        ShapeError: A row is not a whole number of blocks, or importances or finished bytes have a wrong shape.
        VerificationError: What is on the disk is not what was intended.
        WorkDirectoryError: ``output`` exists or cannot be written, or the disk is full.
    """
    header = read_model_header(Path(base))
    _check_base(header, types, encoded or {})
    parts = planned_parts(header, types, split_max_bytes)
    paths = [Path(output), *parts_beside(Path(output))]
    if len(paths) != len(parts):
        raise ConfigError(
            f"{output}: not the name of the first of {len(parts)} parts. Expected "
            f"{first_path(Path(output), len(parts)).name}. Rename it."
        )
    entries = _entries(header, file_type, metadata or {})
    run = (metadata or {}).get(RUN_KEY, run)
    files = _Files(header, encoded or {}, distances or {}, importance, threads, progress)
    headers: list[GgufHeader] = []
    with ExitStack() as stack:
        # The first part gets its name last: without it nothing loads the others.
        places = [stack.enter_context(atomic_file(path, new=not _is_left(path, run))) for path in paths]
        for number, (place, path, planned) in enumerate(zip(places, paths, parts, strict=True)):
            told = entries if len(parts) == 1 else _part_entries(entries, number, parts, run)
            start = header_bytes(told, planned, header.alignment_bytes)
            headers.append(files.write(place, path, start, planned))
    return verification_of(headers[0] if len(parts) == 1 else joined(headers), compared=True)


def planned_parts(header: GgufHeader, types: Mapping[str, GgmlType], split_max_bytes: int) -> list[list[Planned]]:
    """Return the tensors of each file that ``write_gguf`` makes: as many as fit, in their order, as gguf-split has it.

    Args:
        header: The unquantized model.
        types: As for ``write_gguf``.
        split_max_bytes: As for ``write_gguf``.

    Raises:
        ConfigError: A tensor is not in the model.
        ShapeError: A row is not a whole number of its type's blocks.
    """
    parts: list[list[Planned]] = [[]]
    size = 0
    for tensor in _plan(header, types):
        own = tensor.size_bytes + padding(tensor.size_bytes, header.alignment_bytes)
        if parts[-1] and size + own > split_max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += own
    return parts


def _part_entries(
    entries: Mapping[str, bytes], number: int, parts: Sequence[Sequence[Planned]], run: str | None
) -> dict[str, bytes]:
    # All metadata is in the first part; the others say whose they are, and have a digest of their own.
    own = {} if run is None else {RUN_KEY: entry(run)}
    kept = entries if number == 0 else own | {key: entries[key] for key in (DIGEST_KEY,) if key in entries}
    counts = (uint16_entry(number), uint16_entry(len(parts)), int32_entry(sum(map(len, parts))))
    return {**kept, **dict(zip(SPLIT_KEYS, counts, strict=True))}


def _is_left(path: Path, run: str | None) -> bool:
    # A later part that a killed run of ours has left without the first.
    if not is_later_part(path) or not path.is_file() or run is None:
        return False
    return bool(read_gguf_header(path).metadata.get(RUN_KEY) == run)


class _Files:
    """Writes the files of one model."""

    def __init__(
        self,
        header: GgufHeader,
        encoded: Mapping[str, Callable[[], Iterator[Bytes]]],
        distances: Mapping[str, float],
        importance: Callable[[str], Tensor | None] | None,
        threads: int,
        progress: Progress,
    ) -> None:
        self._header = header
        self._encoded = encoded
        self._distances = distances
        self._importance = importance
        self._threads = threads
        self._progress = progress

    def write(self, place: Path, path: Path, start: bytes, planned: Sequence[Planned]) -> GgufHeader:
        """Write one file at a place and prove that it reads back; ``path`` is what it will be called."""
        header, written = self._header, dict[str, str]()
        with create(place) as target:
            target.write(start)
            for tensor in self._progress(planned, "writing"):
                stored = header.tensors[tensor.name]
                job = TensorWriter(stored, tensor, self._importance, self._distances.get(tensor.name), self._threads)
                with stored.path.open("rb") as source:
                    written[tensor.name] = job.write(job.slabs(source, self._encoded.get(tensor.name)), target)
                target.write(bytes(padding(tensor.size_bytes, header.alignment_bytes)))
            start = with_digest(start, written.values())
            target.seek(0)
            target.write(start)
        sync(place)
        return _verify(place, path, start, planned, written)


def _check_base(header: GgufHeader, types: Mapping[str, GgmlType], ready: Mapping[str, object]) -> None:
    for names, what in ((types.keys(), "a type"), (ready.keys(), "finished bytes")):
        unknown = names - header.tensors.keys()
        if unknown:
            raise ConfigError(
                f"{header.path}: no tensor {min(unknown)!r}. Got {what} for it. Use the names of the file."
            )
    for name, kind in types.items():
        stored = header.tensors[name].type
        if stored != kind and stored.name not in ("F32", "F16", "BF16"):
            raise FormatError(
                f"{header.path}: tensor {name!r} is already quantized. Got {stored.name}. Expected F32, F16 or BF16. "
                "Use the unquantized model."
            )


def _plan(header: GgufHeader, types: Mapping[str, GgmlType]) -> list[Planned]:
    planned = []
    for name in writing_order(header):
        tensor = header.tensors[name]
        kind = types.get(name, tensor.type)
        if not kind.fits(tensor.shape[-1]):
            expected = (tensor.shape[-1] // kind.block_weights * kind.block_weights,)
            raise ShapeError(name, f"a row, to be blocks of {kind.name},", got=tensor.shape[-1:], expected=expected)
        planned.append(Planned(name, kind, tensor.shape))
    return planned


def _entries(header: GgufHeader, file_type: int, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the base's entries, and ours after them: llama.cpp, too, moves to the end what it sets anew."""
    ours = {
        "general.quantization_version": entry(_QUANTIZATION_VERSION),
        "general.file_type": entry(file_type),
        **{key: entry(value) for key, value in metadata.items()},
    }
    gone = {*ours, *SPLIT_KEYS, DIGEST_KEY}  # a digest is of one file
    return {key: stored for key, stored in header.entries.items() if key not in gone} | ours


def _verify(
    path: Path, output: Path, start: bytes, planned: Sequence[Planned], written: Mapping[str, str]
) -> GgufHeader:
    """Read the file from the disk and compare it with what was intended."""
    with path.open("rb") as file:
        if file.read(len(start)) != start:
            raise VerificationError(f"{output}: the header reads back otherwise than it was written. Check the disk.")
    try:
        header = read_gguf_header(path)
    except FormatError as cause:
        raise VerificationError(f"{output}: cannot be read back. {cause}") from cause
    if list(header.tensors) != [tensor.name for tensor in planned]:
        raise VerificationError(f"{output}: the tensors read back are not those that were written. Check the disk.")
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            if tensor_digest(file, tensor) != written[tensor.name]:
                raise VerificationError(f"{output}: tensor {tensor.name!r} reads back otherwise. Check the disk.")
    return header
