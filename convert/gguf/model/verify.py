"""Reads a GGUF file back from the disk, every tensor of it, and checks the format's rules."""

from __future__ import annotations

from pathlib import Path

from ....errors import FormatError, VerificationError
from ...model import Verification
from ..file.describe import verification_of
from ..file.digest import file_digest
from ..file.header import GgufHeader
from ..file.metadata import DIGEST_KEY
from ..file.values import read_values
from .reader import GgufModel

__all__ = ["verify_gguf"]


def verify_gguf(path: Path) -> Verification:
    """Decode every tensor of a GGUF file, by whatever program, and check that it is finite and by the rules.

    Args:
        path: The file; one that carries its digest, as bpwise's own, is compared with it.

    Raises:
        FormatError: A rule of the format is broken, a value is NaN or infinite, or a part is missing.
        VerificationError: The file is not what was written.
    """
    model = GgufModel.open(Path(path))
    header = model.header
    known = model.stands_alone or model.own_map is not None
    for part in header.files:
        _check_end(part)
    for tensor in header.tensors.values():
        if len(tensor.shape) == 1 and tensor.type.quantized:
            raise FormatError(
                f"{path}: {tensor.name!r} is a vector of type {tensor.type.name}. Expected F32: llama.cpp computes "
                "with such vectors directly. Quantize again."
            )
        read_values(tensor)
    digests = [file_digest(part) for part in header.files]
    for part, (stored, found) in ((part, each) for part, each in zip(header.files, digests, strict=True) if each):
        if stored == found:
            continue
        raise VerificationError(
            f"{part.path}: has changed since it was written. Got SHA-256 {found[:16]}. Expected {stored[:16]}. Get "
            f"or make the file again; if it was edited on purpose, delete {DIGEST_KEY} from its metadata."
        )
    architecture = header.metadata.get("general.architecture")
    unknown = f"architecture {architecture!r} is not known: names and shapes were not checked"
    return verification_of(header, compared=None not in digests, warnings=() if known else (unknown,))


def _check_end(header: GgufHeader) -> None:
    end = max((t.offset_bytes + t.size_bytes for t in header.tensors.values()), default=header.data_offset_bytes)
    if header.file_bytes - end >= header.alignment_bytes:
        raise FormatError(
            f"{header.path}: {header.file_bytes - end} bytes follow the last tensor. Expected less than the "
            f"{header.alignment_bytes} that padding may take. Something was appended: get or make the file again."
        )
