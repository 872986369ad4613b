"""Models in several GGUF files: the parts of one, as llama.cpp's gguf-split names and writes them.

``NAME-00001-of-00003.gguf`` holds all metadata and the first tensors; the others hold tensors, and which part they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ....checkpoint.files.digests import file_digests
from ....errors import FormatError
from ....progress import Progress, silent
from .header import GgufHeader, GgufTensor, read_gguf_header

__all__ = [
    "SPLIT_KEYS",
    "first_path",
    "is_later_part",
    "joined",
    "model_digest",
    "part_path",
    "parts_beside",
    "parts_traced",
    "read_model_header",
    "whole_name",
]

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""Number of the part, from 0; number of parts; tensors in all of them."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def part_path(output: Path, number: int, count: int) -> Path:
    """Return the path of a part.

    Args:
        output: What a single file would be called.
        number: Of the part, from 1.
        count: Number of parts.
    """
    return output.with_name(f"{output.stem}-{number:05d}-of-{count:05d}.gguf")


def whole_name(stem: str) -> str:
    """Return a file's name without the number of a part, both without a suffix."""
    found = _PART.fullmatch(f"{stem}.gguf")
    return stem if found is None else found["stem"]


def first_path(output: Path, count: int) -> Path:
    """Return the path of the file that a model in so many files begins with."""
    return output if count == 1 else part_path(output, 1, count)


def is_later_part(path: Path) -> bool:
    """Return whether a name is that of a part that is not the first."""
    found = _PART.fullmatch(path.name)
    return found is not None and int(found["number"]) != 1


def parts_beside(path: Path) -> tuple[Path, ...]:
    """Return the other parts of a model by the name of its first, whether they are there or not; else nothing."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found["number"]) != 1:
        return ()
    single = path.with_name(f"{found['stem']}.gguf")
    return tuple(part_path(single, number, int(found["count"])) for number in range(2, int(found["count"]) + 1))


def parts_traced(output: Path) -> dict[Path, tuple[Path, ...]]:
    """Return the parts of a model in several files that its folder shows a trace of.

    A trace is the part itself, what a killed run left of it, or a file that belongs to it, such as its model card.

    Args:
        output: What a single file would be called.

    Returns:
        By the path of a model's first part, the parts with a trace, in their order.
    """
    name = re.compile(rf"\.?{re.escape(output.stem)}-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})\.")
    try:
        traces = [found for entry in output.parent.iterdir() if (found := name.match(entry.name))]
    except OSError:  # it is not there, or not to be read: nothing is known of it
        return {}
    parts: dict[Path, tuple[Path, ...]] = {}
    for count, number in sorted({(int(found["count"]), int(found["number"])) for found in traces}):
        first = part_path(output, 1, count)
        parts[first] = (*parts.get(first, ()), part_path(output, number, count))
    return parts


def read_model_header(path: Path) -> GgufHeader:
    """Read what stands before the data of a model in a GGUF file, or in several.

    Args:
        path: The file, or the first part.

    Returns:
        The file's header; of several, the first part's with the tensors of all and without the keys of the parts.

    Raises:
        FormatError: A file is damaged, it is not the first part, or a part is missing or another model's.
    """
    first = read_gguf_header(Path(path))
    number, count = _count(first, "split.no", 0), _count(first, "split.count", 1)
    if count <= 1:
        return first
    if number != 0:
        raise FormatError(
            f"{path}: part {number + 1} of {count} of a split model. Expected "
            f"the first, whose name ends in -00001-of-{count:05d}.gguf. Name that."
        )
    others = parts_beside(first.path)
    if len(others) != count - 1:
        raise FormatError(
            f"{path}: part 1 of {count} of a split model, by another name. Expected it to end in "
            f"-00001-of-{count:05d}.gguf. Rename all parts as they were."
        )
    missing = [each for each in others if not each.is_file()]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of {count} parts are missing, the first {missing[0].name}. Put all parts into one "
            "folder."
        )
    return joined([first, *(read_gguf_header(each) for each in others)])


def _count(header: GgufHeader, key: str, default: int = -1) -> int:
    # Metadata may hold anything under these keys.
    value = header.metadata.get(key, default)
    return value if type(value) is int else -1


def model_digest(header: GgufHeader, progress: Progress = silent) -> str:
    """Return the SHA-256 of a model's file, hexadecimal; of several, that of their digests.

    Raises:
        FormatError: A file cannot be read.
    """
    digests = file_digests([each.path for each in header.files], FormatError, progress)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def joined(parts: Sequence[GgufHeader]) -> GgufHeader:
    """Return the header of a model in several files; see ``read_model_header``.

    Args:
        parts: Headers of all of them, in their order.

    Raises:
        FormatError: A part is another model's.
    """
    first = parts[0]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        told = _count(part, "split.no"), _count(part, "split.count")
        if told != (number, len(parts)) or tensors.keys() & part.tensors.keys():
            raise FormatError(
                f"{part.path}: not part {number + 1} of {len(parts)} of {first.path.name}. Got the number {told[0]} "
                f"from 0 of {told[1]}, or tensors that are there already. Get all parts of one model."
            )
        tensors |= part.tensors
    expected = _count(first, "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise FormatError(
            f"{first.path}: the parts hold {len(tensors)} tensors. Expected {expected}. Get all parts of one model."
        )
    return replace(
        first,
        metadata={key: value for key, value in first.metadata.items() if key not in SPLIT_KEYS},
        entries={key: value for key, value in first.entries.items() if key not in SPLIT_KEYS},
        tensors=tensors,
        file_bytes=sum(part.file_bytes for part in parts),
        sha256=hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
        parts=tuple(parts),
    )
