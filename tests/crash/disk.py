"""A disk that is watched at every operation: what a crash would leave of it, and what it does when it refuses.

All that is written goes through ``checkpoint.files.operations``, which changes files by calls of ``os`` alone. Here
another object stands in the place of that ``os``. A crash leaves the disk as it is at that moment, so one run, with a
picture of the disk before and half-way through each operation, stands for a crash at each.
"""

import errno
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bpwise
import pytest
from bpwise.checkpoint.files import operations

CHANGING = ("write", "fsync", "replace", "symlink", "utime", "unlink", "mkdir", "rmdir", "posix_fallocate")
"""Calls that count as operations; with ``open`` for writing."""

KINDS = ("killed", "torn", "entries lost", "zeroed", "cut off")
"""What is pictured at an operation. The last three are power cuts: directory entries that were not synchronised are
undone; or they are kept, and the content of files that were not is zeros, or ends where it last was.
"""

REFUSALS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT}

_PACKAGE = str(Path(bpwise.__file__).parent)

_DEAD = 1 << 22
"""No process has so high a number."""

_PARTIAL = re.compile(r"\.partial-[0-9]+-[0-9a-f]{8}")

Node = bytes | str | None
"""Content of a file, target of a link, or None for a directory."""

Tree = dict[str, Node]
"""By path, relative to the disk."""


@dataclass(frozen=True)
class Picture:
    """The disk as a crash at one operation leaves it.

    Attributes:
        point: Number of the operation.
        kind: One of ``KINDS``.
        tree: What is on the disk then.
        whole: Contents that files with a name of their own may have, by path: what stood under it, whole, before.
    """

    point: int
    kind: str
    tree: Tree

    def key(self) -> tuple[tuple[str, Node], ...]:
        """Equal where the next run finds the same: names of partial files are random, and their content is not read."""
        return tuple(sorted(((_PARTIAL.sub(".partial", path), self._told(path)) for path in self.tree), key=repr))

    def _told(self, path: str) -> Node:
        node = self.tree[path]
        unread = isinstance(node, bytes) and ".partial-" in path and not path.endswith("/.moving")
        return b"" if unread else node


class _Calls:
    """Stands for ``os``: hands every call on, and has those that change something counted."""

    def __init__(self, around: Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]) -> None:
        self._around = around
        self._turn = threading.RLock()  # linears are rounded, and kept, in threads

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name == "open":
            return self._open
        if name in CHANGING:
            return lambda *given, **more: self._in_turn(name, lambda: call(*given, **more), given)
        return call

    def _open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return os.open(path, flags, mode)
        opened: int = self._in_turn("open", lambda: os.open(path, flags, mode), (path, flags))
        return opened

    def _in_turn(self, name: str, call: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        with self._turn:
            return self._around(name, call, given)


@contextmanager
def _calls(around: Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "os", _Calls(around))
        yield


@contextmanager
def unsynchronised() -> Iterator[None]:
    """Leave out what makes writing slow: no power is cut."""
    with _calls(lambda name, call, _: None if name == "fsync" else call()):
        yield


Site = tuple[str, ...]
"""Where an operation is asked for: the innermost lines of the package that lead to it."""

_SITE_LINES = 6


class Refusing:
    """A disk that refuses the first operation at one place; one that has become read-only all that follow, too.

    Attributes:
        refused: How many operations it has refused.
    """

    def __init__(self, site: Site, error: str) -> None:
        self.refused = 0
        self._site = site
        self._error = error

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _calls(self._around):
            yield

    def _around(self, name: str, call: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        again = self._error == "EROFS" and name != "fsync"
        if again if self.refused else _site() == self._site:
            self.refused += 1
            number = REFUSALS[self._error]
            paths = [str(each) for each in given[:1] if isinstance(each, str | Path)]
            raise OSError(number, os.strerror(number), *paths)
        return None if name == "fsync" else call()


def _site() -> Site:
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < _SITE_LINES:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and "/tests/" not in file:
            lines.append(f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(lines)


class Recorder:
    """Takes the pictures of one run.

    Attributes:
        pictures: Those that differ from all before them, in their order.
        tried: How many were taken of each kind.
        count: Operations so far.
        odd: Files that stood under a name of their own without being whole, as sentences.
        sites: Where operations were asked for, each place once, and which was the first there.
    """

    def __init__(self, root: Path) -> None:
        self.pictures: list[Picture] = []
        self.tried: Counter[str] = Counter()
        self.count = 0
        self.odd: list[str] = []
        self.sites: dict[Site, str] = {}
        self._root = root
        self._seen: set[int] = set()
        self._pins: list[int] = []
        self._known: dict[int, bytes] = {}
        self._content: dict[int, Node] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._whole: dict[str, set[Node]] = {}
        self._began = self._tree()
        for path, node in self._began.items():
            self._whole.setdefault(path, set()).add(node)
        self._settle_all()

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            with _calls(self._around):
                yield
            self._take_all()
        finally:
            for pin in self._pins:
                os.close(pin)

    def _around(self, name: str, call: Callable[[], Any], given: tuple[Any, ...]) -> Any:
        self.sites.setdefault(_site(), name)
        target = os.fstat(given[0]).st_ino if name in ("write", "fsync", "posix_fallocate") else None
        if target is not None and target not in self._content and name == "posix_fallocate":
            self.count += 1
            return call()  # of a file without a name
        self._take_all()
        self.count += 1
        if name == "write":
            return self._write(given[0], bytes(given[1]), int(target or 0))
        if name == "fsync":
            return self._settle(given[0])
        done = call()
        if name == "open":
            self._known.pop(os.fstat(done).st_ino, None)
            self._pin(Path(given[0]))
        elif name == "mkdir":
            self._pin(Path(given[0]))
        elif name == "replace":
            self._renamed(Path(given[1]))
        return done

    def _write(self, descriptor: int, data: bytes, target: int) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            done = 0
            while done < len(part):
                done += os.write(descriptor, part[done:])
            self._known.pop(target, None)
            if half and len(data) - half:
                self._take("torn", self._tree())
                half = 0
        return len(data)

    def _renamed(self, target: Path) -> None:
        tree = self._tree()
        name = str(target.relative_to(self._root)) if target.is_relative_to(self._root) else ""
        for path, node in tree.items():
            if path == name or path.startswith(f"{name}/"):
                self._whole.setdefault(path, set()).add(node)

    def _take_all(self) -> None:
        now = self._tree()
        self._take("killed", now)
        self._take("entries lost", self._settled())
        self._take("zeroed", self._with(now, lambda node, _: bytes(len(node))))
        self._take("cut off", self._with(now, lambda node, before: node[: len(before)]))

    def _take(self, kind: str, tree: Tree) -> None:
        self.tried[kind] += 1
        picture = Picture(self.count, kind, tree)
        key = hash(picture.key())
        if key in self._seen:
            return
        self._seen.add(key)
        self.pictures.append(picture)
        for path, node in tree.items():
            if isinstance(node, bytes) and not _unfinished(path) and node not in self._whole.get(path, ()):
                self.odd.append(f"{path} at operation {self.count}, {kind}: {len(node)} bytes that were not whole")

    def _with(self, tree: Tree, damaged: Callable[[bytes, bytes], bytes]) -> Tree:
        # Content that was not synchronised is lost, names are not.
        made = dict(tree)
        for path, node in tree.items():
            if isinstance(node, bytes):
                before = self._content.get((self._root / path).stat().st_ino, b"")
                if before != node:
                    made[path] = damaged(node, before if isinstance(before, bytes) else b"")
        return made

    def _tree(self) -> Tree:
        tree: Tree = {}
        pending = [self._root]
        while pending:
            for entry in os.scandir(pending.pop()):
                path = os.path.relpath(entry.path, self._root)
                if entry.is_symlink():
                    tree[path] = str(Path(entry.path).readlink())
                elif entry.is_dir():
                    tree[path] = None
                    pending.append(Path(entry.path))
                else:
                    tree[path] = self._read(Path(entry.path), entry.inode())
        return tree

    def _read(self, path: Path, inode: int) -> bytes:
        # Files change by writes that are seen here alone, but for those of other programs.
        content = self._known.get(inode)
        if content is None or len(content) != path.stat().st_size:
            content = self._known[inode] = path.read_bytes()
        return content

    def _pin(self, path: Path) -> None:
        # Numbers of files that are gone are not used again while they are held.
        self._pins.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        if path.is_dir():
            self._entries.setdefault(path.stat().st_ino, {})
        else:
            self._content.setdefault(path.stat().st_ino, b"")

    def _settle(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self._root):
            return
        inode = path.stat().st_ino
        if not path.is_dir():
            self._content[inode] = self._read(path, inode)
            return
        entries = {entry.name: entry.inode() for entry in os.scandir(path)}
        for others in self._entries.values():  # a file that was moved is where it was moved to
            for name in [name for name, each in others.items() if each in entries.values()]:
                del others[name]
        self._entries[inode] = entries
        for name in entries:
            child = path / name
            if child.is_symlink():
                self._content[child.lstat().st_ino] = str(child.readlink())
            elif child.stat().st_ino not in self._content and child.stat().st_ino not in self._entries:
                self._pin(child)

    def _settle_all(self) -> None:
        for path in (self._root, *self._root.rglob("*")):
            self._pin(path)
            if path.is_file():
                self._content[path.stat().st_ino] = path.read_bytes()
        for path in (self._root, *self._root.rglob("*")):
            if path.is_dir():
                self._entries[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}

    def _settled(self) -> Tree:
        tree: Tree = {}
        pending = [("", self._root.stat().st_ino)]
        while pending:
            folder, inode = pending.pop()
            for name, child in self._entries.get(inode, {}).items():
                path = f"{folder}{name}"
                if child in self._entries:
                    tree[path] = None
                    pending.append((f"{path}/", child))
                else:
                    tree[path] = self._content.get(child, b"")
        return tree


def _unfinished(path: str) -> bool:
    return ".partial-" in path or path.endswith(".lock")


def tree_of(root: Path) -> Tree:
    """What is on a disk."""
    tree: Tree = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        tree[name] = str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return tree


def restore(root: Path, tree: Tree) -> None:
    """Make a disk what a picture shows; partial files are those of a process that has ended."""
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for name, node in sorted(tree.items()):
        path = root / _PARTIAL.sub(lambda found: found[0].replace(str(os.getpid()), str(_DEAD), 1), name)
        if node is None:
            path.mkdir(parents=True, exist_ok=True)
        elif isinstance(node, str):
            path.symlink_to(node)
        else:
            path.write_bytes(node)
