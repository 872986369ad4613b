"""The unquantized GGUF file that a run works from: converted once and kept in the work directory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ...checkpoint.files.digests import file_digests
from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import BpwiseWarning, CheckpointError, FormatError
from .file.header import read_gguf_header
from .llama_cpp.check import check_base
from .llama_cpp.converter import converter_digest, converter_files, make_base

__all__ = ["BASE", "base_identity", "base_path", "base_to_make", "converted"]

BASE = "base"
"""Name of the step in the work directory that holds the file."""

_FILE = "base.gguf"


def base_path(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None) -> Path:
    """Return where a run keeps the model as an unquantized GGUF file: as any artifact, never mixed with another run's.

    What an earlier run converted and cannot be read any more is let go.

    Args:
        checkpoint: The model.
        work: Work directory.
        llama_cpp: As in ``GgufOptions``.
    """
    base = ResumeStore(work, BASE, base_identity(checkpoint, llama_cpp)).path / _FILE
    if base.exists():
        try:
            read_gguf_header(base)
        except FormatError as error:
            warnings.warn(f"{error} It is converted again now.", BpwiseWarning, stacklevel=2)
            base.unlink()
    return base


def base_to_make(work: Path) -> Path | None:
    """Return about where ``base_path`` will be, which has to read the model to know; None if a base is there."""
    return None if any(work.glob(f"{BASE}-*/{_FILE}")) else work / _FILE


def base_identity(checkpoint: Checkpoint, llama_cpp: Path | None) -> dict[str, Any]:
    """Return all that the file depends on, as ``ResumeStore`` takes it."""
    return {
        "model": checkpoint.fingerprint,
        "files": _carried(checkpoint),
        "converter": converter_digest(llama_cpp),
    }


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    # The vocabulary and the chat templates in a GGUF file are those of the files that the converter saw.
    names = converter_files(checkpoint.directory)
    digests = file_digests([checkpoint.file(name) for name in names], CheckpointError)
    return dict(zip(names, digests, strict=True))


def converted(checkpoint: Checkpoint, base: Path, llama_cpp: Path | None) -> tuple[str, ...]:
    """Convert a model to a file, unless it is there, and check the file; return what was left out.

    Args:
        checkpoint: The model.
        base: The file.
        llama_cpp: As in ``GgufOptions``.

    Raises:
        BpwiseError: As ``make_base`` and ``check_base``.
    """
    if not base.exists():
        make_base(checkpoint, base, llama_cpp=llama_cpp)
    return tuple(check_base(base, checkpoint))
