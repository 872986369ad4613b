"""Places that runs write to: looked at before the long work, and kept to one run while it lasts."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import BpwiseWarning, WorkDirectoryError
from . import operations
from .atomic import in_directory, try_file
from .disk_errors import explained, shown
from .partials import clear_partials

__all__ = [
    "WORK_SUFFIX",
    "check_file",
    "check_run",
    "companion",
    "locked",
    "named",
    "refuse_foreign",
    "refuse_inputs",
    "reserved",
    "try_directory",
    "work_beside",
]

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
"""What the system says at a lock on a file system that has none."""

WORK_SUFFIX = ".work"
"""End of the names of work directories, unless one is named."""


def named(path: Path) -> Path:
    """Return a path that ends in a name: ``.`` and ``..`` are followed, so that something can stand beside them.

    Raises:
        WorkDirectoryError: There is no current directory.
    """
    if path.name not in ("", ".."):
        return path
    with explained(path):
        return path.resolve()


def work_beside(output: Path) -> Path:
    """Return the usual work directory of a run, ``OUTPUT.work``.

    Args:
        output: The directory or file that the run makes.
    """
    output = named(output)
    return output.parent / f"{output.name}{WORK_SUFFIX}"


def companion(output: Path, name: str, *, whole_name: bool = False) -> Path:
    """Return where a file that belongs to a model stands: in its directory, or beside its file as ``STEM.name``.

    Args:
        output: The model's directory or file; one that does not exist is taken for a file.
        name: What the file is called in a directory.
        whole_name: Whether the file's suffix stays in the name, as in ``STEM.SUFFIX.name``.
    """
    if output.is_dir():
        return output / name
    return output.with_name(f"{output.name if whole_name else output.stem}.{name}")


def try_directory(path: Path) -> None:
    """Refuse a directory that files cannot be made in, before any long work; nothing is left there.

    Args:
        path: The directory; it need not exist.

    Raises:
        WorkDirectoryError: It is something else, the disk is full, or it cannot be written.
    """
    with explained(path):
        in_the_way = path.exists() and not path.is_dir()
    if in_the_way:
        raise WorkDirectoryError(f"{shown(path)}: in the way. Got a file. Expected a directory. Choose another path.")
    try_file(path / "try", name=path)


def refuse_foreign(
    path: Path, is_ours: Callable[[Path], bool], kind: str, *, advice: str = "replace it with --force"
) -> None:
    """Refuse to replace a file of another kind than the one that is made; an empty file is nobody's.

    Args:
        path: The file to be made, or replaced.
        is_ours: Tells whether a file is of the kind that is made.
        kind: That kind, with an article.
        advice: What else can be done than to choose another path.

    Raises:
        WorkDirectoryError: It would be lost.
    """
    with explained(path):
        occupied = path.is_file() and path.stat().st_size > 0
    if occupied and not is_ours(path):
        raise WorkDirectoryError(
            f"{shown(path)}: in the way. Got another file. Expected none or {kind} of bpwise. Choose another path, or "
            f"{advice}."
        )


def check_file(path: Path, is_ours: Callable[[Path], bool], kind: str, *, read: Path, force: bool) -> None:
    """Refuse a file that cannot be written, or that may not be replaced, before it is made.

    Args:
        path: The file to be made, or replaced.
        is_ours: As for ``refuse_foreign``.
        kind: As for ``refuse_foreign``.
        read: What it is made from.
        force: Whether a file of any other kind is replaced too.

    Raises:
        WorkDirectoryError: The file cannot be written, or holds something else.
    """
    refuse_inputs(path, files=(read,))
    if not force:
        refuse_foreign(path, is_ours, kind)
    try_file(path)


def refuse_inputs(output: Path, *, directories: Iterable[Path] = (), files: Iterable[Path | None] = ()) -> None:
    """Refuse an output that would change what it is made of.

    Args:
        output: File or directory to be made.
        directories: What is read as a whole: the output may not lie in them.
        files: Files that are read, or None.

    Raises:
        WorkDirectoryError: The output is one of them, or lies in one.
    """
    with explained(output):
        real = output.resolve()
        for directory in directories:
            whole = directory.resolve()
            if real == whole or whole in real.parents:
                raise WorkDirectoryError(
                    f"{shown(output)}: not a place to write to, it is in {shown(directory)}, which is read as one "
                    "model. Choose a path outside of it."
                )
        for file in files:
            if file is not None and file.resolve() == real:
                raise WorkDirectoryError(
                    f"{shown(output)}: is an input of this run. Expected another path. Choose one."
                )


def check_run(
    output: Path,
    work: Path,
    *,
    directories: Sequence[Path],
    files: Iterable[Path | None] = (),
    offload: Iterable[Path | None] = (),
) -> None:
    """Refuse places of a run that stand in each other's way, and directories for hidden states that cannot be written.

    Args:
        output: The directory or file that it makes.
        work: Its work directory.
        directories: What is read as a whole.
        files: Files that are read, or None.
        offload: Directories for hidden states, or None.

    Raises:
        WorkDirectoryError: One is in the way of another, or cannot be written.
    """
    states = [directory for directory in offload if directory is not None]
    others = [work, *states]
    for place in (output, *others):
        refuse_inputs(place, directories=directories, files=files)
    with explained(output):
        real = output.resolve()
        within = [place for place in others if real in (place.resolve(), *place.resolve().parents)]
    if within:
        raise WorkDirectoryError(
            f"{shown(within[0])}: in the way of the output {shown(output)}. Choose a directory outside of it."
        )
    for place in states:
        try_directory(place)


@contextmanager
def locked(file: Path, what: Path, advice: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock; the operating system lets go of it when the process ends, however it does.

    Where the file system has no locks, a warning says so and the body runs without.

    Args:
        file: The lock file. Missing directories are made for it, and go again if nothing is left in them.
        what: What is locked, to begin messages with.
        advice: What else can be done than to wait, to end them with.
        wait: Whether to wait as long as another process holds it.

    Raises:
        WorkDirectoryError: Another process holds it, or the place cannot be written.
    """
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        missing = [each for each in file.parents if not each.exists()]
        in_directory(file.parent, lambda: _acquire(lock, file.parent, what))
    except Timeout as error:
        raise WorkDirectoryError(
            f"{shown(what)}: in use by another bpwise run. Wait until it has ended, or {advice}."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkDirectoryError(
            f"{shown(what)}: cannot be locked. Got {reason}. Expected a writable directory on a file system with "
            f"locks. Correct its permissions, or {advice}."
        ) from error
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                operations.delete(file)
        finally:
            lock.release()
        for directory in missing:
            with suppress(OSError):
                operations.delete_directory(directory)


def _acquire(lock: FileLock, directory: Path, what: Path) -> None:
    if _has_locks(directory):
        lock.acquire()
    else:
        message = f"{shown(what)}: its file system has no locks. Start no second run that writes there."
        warnings.warn(message, BpwiseWarning, stacklevel=5)


def _has_locks(directory: Path) -> bool:
    # Asked here: newer versions of filelock make a mark in the place of a lock, which outlives a process that dies.
    try:
        import fcntl  # noqa: PLC0415 - not on Windows, whose file systems all have locks
    except ImportError:
        return True
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # it may be written and not read
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as cause:
        return cause.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return True


@contextmanager
def reserved(output: Path, beside: Iterable[str] = ()) -> Iterator[None]:
    """Keep an output to one run: its place is tried and locked, and cleared of what killed runs left half made.

    Args:
        output: The directory or file that the run makes.
        beside: Names of files that it makes beside it.

    Raises:
        WorkDirectoryError: Another run makes it, or it cannot be made there.
    """
    output = named(output)
    with explained(output):
        filled = output.is_dir()
        # A link to a directory is followed; that to a file is replaced by the file.
        real = output.resolve() if filled else output.parent.resolve() / output.name
    if filled:
        try_directory(real)
    else:
        try_file(real, name=output)
    for name in beside:
        try_file(real.with_name(name), name=output.with_name(name))
    with locked(real.with_name(f".{real.name}.lock"), output, "choose another output"):
        clear_partials(real.parent, {real.name, *beside})
        if filled:
            clear_partials(real)
        yield
