"""Unquantized GGUF files of a model: what runs work from, kept with the measurement; and what it sees images with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import private_directory, write_text
from ...checkpoint.files.digests import file_digests
from ...checkpoint.files.operations import delete
from ...checkpoint.files.paths import locked
from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.hub import directory_name
from ...errors import BpwiseWarning, CheckpointError, FormatError
from ...version import __version__
from .file.header import read_gguf_header
from .file.metadata import DIGEST_KEY, DIGEST_ROOM, RUN_KEY, VERSION_KEY
from .file.writer import write_gguf
from .llama_cpp.check import check_base
from .llama_cpp.converter import converter_digest, make_base, make_projector, projector_type
from .llama_cpp.staging import converter_files

__all__ = ["BASE", "base_identity", "base_path", "base_to_make", "converted", "projector_path", "write_projector"]

_log = logging.getLogger(__name__)

BASE = "base"
"""Name of the step in the work directory that holds the file; beside a measurement, end of the name."""

_FILE = "base.gguf"

_ROOM = 2
"""A file is kept beside a measurement where so many times its size are free: outputs want room, too."""


def base_path(checkpoint: Checkpoint, work: Path, llama_cpp: Path | None, measurement: Path | None = None) -> Path:
    """Return where a run keeps the model as an unquantized GGUF file: as any artifact, never mixed with another run's.

    What an earlier run converted and cannot be read any more is let go.

    Args:
        checkpoint: The model.
        work: Work directory.
        llama_cpp: As in ``GgufOptions``.
        measurement: The measurement that the run works from. The file lies beside it, for all further runs, where it
            lies already or its disk has room.
    """
    identity = base_identity(checkpoint, llama_cpp)
    place, step = work, BASE
    if measurement is not None:
        kept = ResumeStore.existing(measurement.parent, _beside(measurement), identity)
        if (kept is not None and (kept.path / _FILE).exists()) or _has_room(checkpoint, measurement):
            place, step = measurement.parent, _beside(measurement)
    base = ResumeStore(place, step, identity).path / _FILE
    if base.exists() and not _is_intact(base):
        warnings.warn(f"{base}: damaged. It is converted again now.", BpwiseWarning, stacklevel=2)
        delete(base)
    return base


def base_to_make(checkpoint: Checkpoint, work: Path, measurement: Path | None = None) -> Path | None:
    """Return about where ``base_path`` will be, which has to read the model to know; None if a base is there."""
    places = [(work, BASE)] + ([] if measurement is None else [(measurement.parent, _beside(measurement))])
    if any(any(place.glob(f"{escape(step)}-*/{_FILE}")) for place, step in places):
        return None
    return (work if measurement is None or not _has_room(checkpoint, measurement) else measurement.parent) / _FILE


def base_identity(checkpoint: Checkpoint, llama_cpp: Path | None) -> dict[str, Any]:
    """Return all that the file depends on, as ``ResumeStore`` takes it."""
    return {
        "model": checkpoint.fingerprint,
        "files": _carried(checkpoint),
        "converter": converter_digest(llama_cpp),
    }


def converted(
    checkpoint: Checkpoint, base: Path, llama_cpp: Path | None, check: Callable[[Path], object] | None = None
) -> tuple[str, ...]:
    """Convert a model to a file, unless it is there, and check the file; return what was left out.

    Args:
        checkpoint: The model.
        base: The file.
        llama_cpp: As in ``GgufOptions``.
        check: Looks at a file that was made now; it refuses one by a VerificationError.

    Raises:
        BpwiseError: As ``make_base`` and ``check_base``.
    """

    def look(made: Path) -> None:
        check_base(made, checkpoint, name=base)
        if check is not None:
            check(made)
        # Before the file gets its name: one without a digest is not taken.
        write_text(_digest_file(base), _digest(made))

    _log.debug("unquantized file: %s%s", base, "" if base.exists() else ", converted now")
    if not base.exists():
        make_base(checkpoint, base, llama_cpp=llama_cpp, check=look)
    return tuple(check_base(base, checkpoint))


def projector_path(checkpoint: Checkpoint, output: Path) -> Path | None:
    """Return where what a model sees images with goes, as llama.cpp looks for it; None if it sees none.

    All outputs in a folder share it.

    Args:
        checkpoint: The model.
        output: The quantized language model.
    """
    kind = projector_type(checkpoint)
    name = directory_name(checkpoint.directory).rpartition("/")[2]
    return None if kind is None else output.with_name(f"mmproj-{name}-{kind.upper()}.gguf")


def write_projector(checkpoint: Checkpoint, path: Path, llama_cpp: Path | None) -> str | None:
    """Make the file that ``projector_path`` names, unless it is there; return why there is none, as a sentence.

    Args:
        checkpoint: The model.
        path: The file; one of this model by another converter is replaced.
        llama_cpp: As in ``GgufOptions``.

    Raises:
        BpwiseError: The file cannot be written, or another is in the way.
    """
    identity = json.dumps(base_identity(checkpoint, llama_cpp), sort_keys=True)
    # As of an output: what is made of one model begins alike.
    run = checkpoint.fingerprint[:8] + hashlib.sha256(identity.encode()).hexdigest()[:24]
    advice = "choose an output in another folder"
    with locked(path.with_name(f".{path.name}.lock"), path, advice, wait=True), private_directory(path) as private:
        found = str(read_gguf_header(path).metadata.get(RUN_KEY)) if path.exists() else ""
        if found == run:
            return None
        made = private / path.name
        try:
            make_projector(checkpoint, made, llama_cpp=llama_cpp)
        except (CheckpointError, FormatError) as error:
            return f"There is no mmproj file, and the model sees no images: {error}"
        if found.startswith(run[:8]):
            delete(path)
        file_type = int(read_gguf_header(made).metadata["general.file_type"])
        metadata = {RUN_KEY: run, VERSION_KEY: __version__, DIGEST_KEY: DIGEST_ROOM}
        write_gguf(made, path, {}, file_type=file_type, metadata=metadata)
    return None


def _is_intact(base: Path) -> bool:
    try:
        if _digest_file(base).exists():
            return _digest_file(base).read_bytes() == _digest(base).encode()
        read_gguf_header(base)  # it was copied here alone, or made before there were digests
    except (FormatError, OSError):
        return False
    return True


def _digest(base: Path) -> str:
    return file_digests([base], FormatError)[0]


def _digest_file(base: Path) -> Path:
    return base.with_suffix(".sha256")


def _beside(measurement: Path) -> str:
    return f"{measurement.name}.{BASE}"


def _has_room(checkpoint: Checkpoint, measurement: Path) -> bool:
    folder = measurement.parent
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > _ROOM * checkpoint.total_bytes


def _carried(checkpoint: Checkpoint) -> dict[str, str]:
    # The vocabulary and the chat templates in a GGUF file are those of the files that the converter saw.
    names = converter_files(checkpoint.directory)
    digests = file_digests([checkpoint.file(name) for name in names], CheckpointError)
    return dict(zip(names, digests, strict=True))
