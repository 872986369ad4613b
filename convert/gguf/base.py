"""Unquantized GGUF files of a model: what runs work from, kept with the measurement; and what it sees images with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from ...checkpoint.carry.staging import staged_files
from ...checkpoint.files.atomic import private_directory, write_text
from ...checkpoint.files.digests import file_digests
from ...checkpoint.files.operations import delete
from ...checkpoint.files.paths import locked
from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.hub import directory_name
from ...errors import BpwiseWarning, CheckpointError, FormatError
from ...version import __version__
from ..opening import locate_model
from .file.header import read_gguf_header
from .file.metadata import DIGEST_KEY, DIGEST_ROOM, RUN_KEY, VERSION_KEY
from .file.writer import write_gguf
from .llama_cpp.check import check_base
from .llama_cpp.converter import converter_digest, find_converter, make_base, make_projector, projector_type
from .llama_cpp.fetch import fetched_converter
from .sizes import LabelledConversion

__all__ = [
    "BASE",
    "BasedConversion",
    "base_identity",
    "base_path",
    "base_to_make",
    "converted",
    "projector_path",
    "write_projector",
]

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


class BasedConversion(LabelledConversion):
    """An original on its way to GGUF files, as far as what it is converted with, or instead of that, goes."""

    @cached_property
    def given_base(self) -> Path | None:
        """The unquantized file that was given, downloaded from the Hub if need be; None converts the original.

        Raises:
            CheckpointError: It is not there.
        """
        return None if self.options.base is None else locate_model(self.options.base)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See ``Conversion``."""
        return () if self.given_base is None else (self.given_base,)

    @property
    def tool(self) -> str:
        """The converter's sources, if it converts; nothing before one was fetched, as nothing was made with it then."""
        own = self.options.llama_cpp
        known = self.options.base is None and (own is not None or fetched_converter() is not None)
        return converter_digest(own) if known else ""

    def require_converter(self) -> None:
        """Refuse a base or a converter that is not there; where neither is named, the converter is fetched when needed.

        Raises:
            BpwiseError: It is not there.
        """
        if self.given_base is None and self.options.llama_cpp is not None:
            find_converter(self.options.llama_cpp)

    def beside(self, output: Path) -> tuple[Path, ...]:
        """Return the file with what the model sees images with, if it does. See ``Conversion``."""
        path = None if self.options.base is not None else projector_path(self.checkpoint, output)
        return () if path is None else (path,)

    def write_beside(self, output: Path) -> None:
        """Write the files of ``beside``; a note says so where the converter makes none."""
        for path in self.beside(output):
            missing = write_projector(self.checkpoint, path, self.options.llama_cpp)
            if missing is not None and missing not in self.notes:
                self.notes = (*self.notes, missing)

    def scratch(self, work: Path, measurement: Path | None = None) -> Mapping[Path, int]:
        """See ``Conversion``."""
        base = base_to_make(self.checkpoint, work, measurement)
        return {} if base is None or self.options.base is not None else {base: self.checkpoint.total_bytes}


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
    names = staged_files(checkpoint.directory)
    digests = file_digests([checkpoint.file(name) for name in names], CheckpointError)
    return dict(zip(names, digests, strict=True))
