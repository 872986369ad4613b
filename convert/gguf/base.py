"""The unquantized GGUF file that a run works from: converted once and kept in the work directory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ...checkpoint.files.digests import file_digests
from ...checkpoint.files.resume import ResumeStore, discard_artifacts
from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import BpwiseWarning, CheckpointError, FormatError
from ...quantize.options import GgufConfig
from .file.header import read_gguf_header
from .file.reader import GgufModel
from .llama_cpp.check import check_base
from .llama_cpp.converter import converter_digest, converter_files, make_base

__all__ = ["BASE", "base_identity", "base_path", "base_to_make", "converted", "discard_base", "prepare_base"]

BASE = "base"
"""Name of the stage in the work directory that holds the file."""

_FILE = "base.gguf"


def base_path(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None) -> Path:
    """Return where a run keeps the model as an unquantized GGUF file: as any artifact, never mixed with another run's.

    What an earlier run converted and cannot be read any more is let go.

    Args:
        checkpoint: The model.
        work: Work directory.
        llama_cpp: As in ``GgufConfig``.
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


def discard_base(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None) -> None:
    """Delete what ``base_path`` names; its arguments are the same."""
    discard_artifacts(work, BASE, base_identity(checkpoint, llama_cpp))


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


def prepare_base(checkpoint: Checkpoint, base: Path, config: GgufConfig) -> tuple[str, ...]:
    """Convert a model to the unquantized file that a run works from, unless it is there; return what was left out.

    Args:
        checkpoint: The model.
        base: The file, as ``base_path`` names it.
        config: Says where the converter is, and whether the file will have to be read.

    Raises:
        BpwiseError: As ``make_base`` and ``check_base``; or it holds a variant of the architecture that is not read.
    """
    left_out = converted(checkpoint, base, config.llama_cpp)
    if config.feedback or config.evaluate is not None:
        GgufModel.open(base)
    return left_out


def converted(checkpoint: Checkpoint, base: Path, llama_cpp: Path | None) -> tuple[str, ...]:
    """Convert a model to a file, unless it is there, and check the file; return what was left out.

    Args:
        checkpoint: The model.
        base: The file.
        llama_cpp: As in ``GgufConfig``.

    Raises:
        BpwiseError: As ``make_base`` and ``check_base``.
    """
    if not base.exists():
        make_base(checkpoint, base, llama_cpp=llama_cpp)
    return tuple(check_base(base, checkpoint))
