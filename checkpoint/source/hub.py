"""Where a model's files come from, the disk or the Hugging Face Hub, and which files belong to it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DiskFullError
from ..files.disk_errors import DISK_FULL
from ..files.schemas import is_lfs_pointer
from ..files.side_files import CONFIG_FILE, DOWNLOADED, NOT_DOWNLOADED, TEMPLATE_DIRECTORY, is_side_file
from ..model.hub_name import HubName

__all__ = [
    "confined_file",
    "directory_name",
    "list_directory",
    "require_own_files",
    "resolve_file",
    "resolve_model",
    "side_files",
    "snapshot_commit",
]

_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")

_UNANNOUNCED_BYTES = 1 << 26
"""How much more than the sizes that it announced a server may send: configs and tokenizers may come without one."""


def resolve_model(model: str, also: Sequence[str] = ()) -> Path:
    """Return the local directory of a model, downloading it from the Hugging Face Hub if need be.

    Args:
        model: An existing directory, or a Hub id such as ``org/name`` or ``org/name@revision``. A directory wins over a
            Hub id.
        also: Further files to download, as patterns of ``fnmatch``.

    Raises:
        CheckpointError: Neither a directory nor a Hub id; or the Hub has no such model, guards it, or is out
            of reach while the model is not in the local cache.
        DiskFullError: The disk of the Hub's cache is full.
    """
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's raises where there is no home
    if model and path.is_dir():
        return path
    name = HubName.parse(model)
    if (model and path.exists()) or name is None or name.tag is not None or name.file is not None:
        got = "a file" if model and path.exists() else "nothing there"
        raise CheckpointError(
            f"{model or '(empty)'}: no model. Got {got}. Expected a directory, or a Hugging Face Hub id "
            "such as org/name. Check the path."
        )
    return _download(name, also)


def resolve_file(name: HubName, suffixes: Sequence[str]) -> Path:
    """Return the local path of a model in one file on the Hub, downloading it if need be; of a split one its first.

    Args:
        name: The repository, and the file or its tag; neither where the repository has only one.
        suffixes: Endings of such files.

    Raises:
        CheckpointError: As ``resolve_model``; or no file is meant, or several are.
        DiskFullError: The disk of the Hub's cache is full.
    """
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415

    directory = _download(name)
    commit = directory.name
    try:
        listed = HfApi().model_info(name.repo, revision=name.revision).siblings or []
        names = [each.rfilename for each in listed]
    except Exception:  # without a network, as the Hub's client raises what it will: what the cache has
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*")]
    found = name.find(names, suffixes)
    download = partial(hf_hub_download, revision=commit, tqdm_class=_bounded_bar())
    first, *_ = [_asked(name, partial(download, name.repo, each)) for each in found]
    return first


def _download(name: HubName, also: Sequence[str] = ()) -> Path:
    # Imported here: a local model needs neither the import time nor the network stack.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    patterns = [*DOWNLOADED, *also]
    download = partial(snapshot_download, allow_patterns=patterns, ignore_patterns=list(NOT_DOWNLOADED))
    return _asked(name, partial(download, name.repo, revision=name.revision, tqdm_class=_bounded_bar()))


def _bounded_bar() -> Any:
    # The Hub's client checks sizes at the end alone, and would fill the disk with a body that has none. Its bars hear
    # of every piece before it is written.
    from huggingface_hub.utils.tqdm import tqdm  # noqa: PLC0415

    class Bounded(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, name=name, **kwargs)  # type: ignore[no-untyped-call]
            self.received = 0
            # What is transferred may be more than what is stored: another bar counts that.
            self.bounded = not (name or "").endswith(".transfer")

        def update(self, n: float | None = 1) -> Any:
            self.received += int(n or 0)
            announced = int(self.total or 0)
            if self.bounded and self.received > announced + _UNANNOUNCED_BYTES:
                raise ValueError(f"received {self.received} bytes, but only {announced} were announced")
            return super().update(n)

    return Bounded


def _asked(name: HubName, ask: Callable[[], str]) -> Path:
    # What the Hub's client downloads, and its many errors as sentences.
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = name.repo
    where = f"{model}: no such directory, and as a Hugging Face Hub id"
    try:
        return Path(ask())
    except RevisionNotFoundError as cause:
        raise CheckpointError(
            f"{where} it has no revision {name.revision!r}. Expected a branch, a tag or a commit. Check "
            f"https://huggingface.co/{model}/refs."
        ) from cause
    except GatedRepoError as cause:
        raise CheckpointError(
            f"{where} it is gated. Accept its terms at https://huggingface.co/{model}, then run `hf auth login`."
        ) from cause
    except (RepositoryNotFoundError, HFValidationError) as cause:
        raise CheckpointError(
            f"{where} it was not found. Check the spelling; for a private model run `hf auth login` first."
        ) from cause
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as cause:
        raise CheckpointError(
            f"{where} it is not in the local cache and the Hub cannot be reached. Check the network, unset "
            "HF_HUB_OFFLINE if it is set, or give a local directory."
        ) from cause
    except Exception as cause:  # an answer may be anything, and the Hub's client raises what it will of it
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise DiskFullError(
                f"{model}: not downloaded, the disk of the Hub's cache is full. Free some space, or set "
                "HF_HOME to a directory on another disk.",
                Path(HF_HUB_CACHE),
            ) from cause
        raise CheckpointError(
            f"{where} it could not be downloaded ({type(cause).__name__}: {cause}). Try again, or give a "
            "local directory."
        ) from cause


def directory_name(directory: Path) -> str:
    """Return the name of a model's directory, or its Hub id if it lies in the Hub's cache."""
    # A snapshot in the Hub's cache lies in models--OWNER--NAME/snapshots/REVISION.
    resolved = directory.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return resolved.name


def snapshot_commit(directory: Path) -> str | None:
    """Return the commit of a model that lies in the Hub's cache; None of another."""
    resolved = directory.resolve()
    return resolved.name if directory_name(resolved) != resolved.name else None


def list_directory(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted by name.

    Raises:
        CheckpointError: It cannot be listed, or nothing in it may be looked at.
    """
    try:
        found = sorted(directory.iterdir())
        if found:
            found[0].lstat()
        return found
    except OSError as cause:
        raise CheckpointError(f"{directory}: cannot be listed ({cause.strerror}). Check its permissions.") from cause


def side_files(directory: Path) -> list[str]:
    """Return the names of a model's side files, relative to its directory, each checked as in ``confined_file``.

    Args:
        directory: The model directory.

    Raises:
        CheckpointError: A file of such a name leads outside, is no regular file, or stands for one that is not there;
            or the directory cannot be listed.
    """
    found = []
    for path in list_directory(directory):
        if path.name == TEMPLATE_DIRECTORY and path.is_dir():
            found += [f"{path.name}/{template.name}" for template in list_directory(path)]
        elif not path.is_dir():
            found.append(path.name)
    names = [name for name in found if is_side_file(name)]
    for name in names:
        confined_file(directory, name)
    return names


def require_own_files(directory: Path) -> None:
    """Check every file that a library may read when it is handed a model directory, as in ``confined_file``.

    Beside side files these are vocabularies of any name that ends in ``.model``, and what tokenizer_config.json lists
    as ``fast_tokenizer_files``: Transformers' tokenizers look for both.

    Args:
        directory: The model directory.

    Raises:
        CheckpointError: As ``side_files``.
    """
    lists_tokenizers = "tokenizer_config.json" in side_files(directory)
    names: set[str] = set()
    for path in list_directory(directory):
        if path.name in (CONFIG_FILE, "README.md") or path.suffix == ".model":
            names |= set() if path.is_dir() else {path.name}
    if lists_tokenizers:
        names |= _named_tokenizers(directory / "tokenizer_config.json")
    for name in names:
        confined_file(directory, name)


def _named_tokenizers(path: Path) -> set[str]:
    # What is wrong with the file itself is for its reader to say.
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    names = settings.get("fast_tokenizer_files") if isinstance(settings, dict) else None
    listed = names if isinstance(names, list) else []
    return {name for name in listed if isinstance(name, str) and _reaches(path.parent, name)}


def _reaches(directory: Path, name: str) -> bool:
    # Lists name files for other versions of Transformers too, which need not be there.
    return Path(name).name != name or os.path.lexists(directory / name)


def confined_file(directory: Path, name: str) -> Path:
    """Return ``directory / name`` after checking that it is a regular file that belongs to the directory.

    A symbolic link must end inside the directory or, in the layout of the Hub's cache
    (``models--*/snapshots/REVISION``), inside the ``blobs`` folder of the same ``models--*`` directory or
    be an entry of the cache's shared ``blobs``.
    Use it for every file whose name or content came from the model, above all before copying one.

    Args:
        directory: The model directory.
        name: Relative name with forward slashes.

    Raises:
        CheckpointError: The file is missing, no regular file, a pointer of Git LFS, or lies outside.
    """
    relative = Path(name)
    unsafe = relative.is_absolute() or ".." in relative.parts or relative.drive or "\\" in name or "\0" in name
    if unsafe or not _encodable(name):
        raise CheckpointError(
            f"{directory}: unsafe file name. Got {name!r:.200}. Expected one inside the directory. "
            "Do not use this model unless you trust its source."
        )
    path = directory / relative
    try:
        root, target = directory.resolve(), path.resolve()
        regular = target.is_file()
        readable = os.access(target, os.R_OK)
        pointer = regular and readable and is_lfs_pointer(target)
    except PermissionError as cause:
        raise CheckpointError(f"{path}: cannot be read ({cause.strerror}). Check its permissions.") from cause
    except (OSError, RuntimeError) as cause:  # RuntimeError: a loop of links, before Python 3.13.
        raise CheckpointError(f"{path}: cannot be followed ({cause}). Get the model again.") from cause
    if not target.is_relative_to(root) and not _in_hub_store(root, target):
        raise CheckpointError(
            f"{path}: leads outside the model directory. Got {target}. Expected a file in {root}. "
            "Replace the link by the file itself if you trust it."
        )
    if not regular:
        raise CheckpointError(f"{path}: missing, or not a regular file. The checkpoint is incomplete: get it again.")
    if not readable:
        raise CheckpointError(f"{path}: cannot be read (Permission denied). Check its permissions.")
    if pointer:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in {directory}.")
    return path


def _encodable(name: str) -> bool:
    # JSON can hold half of a surrogate pair, which no file's name can.
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _in_hub_store(root: Path, target: Path) -> bool:
    # A cache holds models--*/snapshots/REVISION/NAME -> models--*/blobs/HASH, which may in turn be a link
    # into a store that all models share: blobs/HA/HASH, next to the models--* directories.
    for parent in root.parents:
        if parent.name.startswith("models--") and root.is_relative_to(parent / "snapshots"):
            if target.is_relative_to(parent / "blobs"):
                return True
            shared = parent.parent / "blobs"
            return target.is_relative_to(shared) and bool(_SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()))
    return False
