"""All that is written goes through one module; other code does not change files by itself."""

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import bpwise
import pytest
from bpwise.checkpoint.files import operations

ROOT = Path(bpwise.__file__).parent
ROOMS = ("cli", "quantize", "eval", "convert", "measure", "linalg", "checkpoint")
OPERATIONS = ROOT / "checkpoint" / "files" / "operations.py"

ASKING = {
    "os": {"access", "cpu_count", "environ", "fdopen", "fsdecode", "fsencode", "fspath", "getpid", "kill", "lstat"}
    | {"name", "path", "scandir", "sched_getaffinity", "stat", "stat_result", "sysconf", "SEEK_END", "PathLike"}
    | {"O_RDONLY", "R_OK", "W_OK", "_exit", "close", "dup", "dup2", "read"}
    | {"write"},  # to nothing that is open for writing
    "shutil": {"disk_usage", "get_terminal_size", "which"},
}
"""What modules that can change files offer beside that. Everything else of them is refused."""

CHANGING = {"chmod", "hardlink_to", "mkdir", "rename", "rmdir", "save_file", "symlink_to", "tofile", "touch", "unlink"}
CHANGING |= {"write_bytes", "write_text", "savez", "savetxt", "make_archive", "extractall"}
"""Methods of paths, archives and tensors that do."""


def changes(code: str) -> Iterator[str]:
    """Places in a module's code that may change files by other means than the operations."""
    for node in ast.walk(ast.parse(code)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if "tempfile" in names or (isinstance(node, ast.ImportFrom) and node.module in ASKING):
                yield f"{where}: imports {', '.join(names)}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            own = node.value.id
            if own in ASKING and node.attr not in ASKING[own] | {"open"}:
                yield f"{where}: {own}.{node.attr}"
            if (own, node.attr) in {("torch", "save"), ("np", "save")}:
                yield f"{where}: {own}.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{where}: {found}" for found in called(node))


def called(node: ast.Call) -> Iterator[str]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    module = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
    if (module, name) == ("os", "open") and ast.unparse(node.args[1]) != "os.O_RDONLY":
        yield "os.open for writing"
    if module in {"operations", "os"}:
        return
    if isinstance(function, ast.Attribute) and name in CHANGING:
        yield name
    if isinstance(function, ast.Attribute) and name == "replace" and len(node.args) == 1 and not node.keywords:
        yield "replace with one argument, as of a path"  # that of a text takes two
    if name in ("open", "FileIO"):
        modes = [*node.args[:2], *(each.value for each in node.keywords if each.arg == "mode")]
        for mode in (each.value for each in modes if isinstance(each, ast.Constant)):
            if isinstance(mode, str) and len(mode) <= 3 and set(mode) & set("wax+"):
                yield f"open for {mode!r}"


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] in ROOMS]
MODULES += sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", [path for path in MODULES if path != OPERATIONS], ids=lambda path: path.stem)
def test_nothing_is_written_by_other_means(path: Path) -> None:
    assert list(changes(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "path.open('wb')",
        "path.open(mode='a')",
        "io.FileIO(path, 'wb')",
        "path.write_text('')",
        "path.replace(target)",
        "path.unlink(missing_ok=True)",
        "os.replace(a, b)",
        "os.open(path, os.O_WRONLY)",
        "shutil.rmtree(path)",
        "from shutil import copyfile",
        "import tempfile",
        "safetensors.torch.save_file(tensors, path)",
        "torch.save(tensors, path)",
    ],
)
def test_other_means_are_seen(code: str) -> None:
    assert list(changes(code))


@pytest.mark.parametrize(
    "code", ["open(path)", "path.open('rb')", "text.replace('a', 'b')", "replace(plan, bits=4)", "operations.touch(a)"]
)
def test_reading_is_allowed(code: str) -> None:
    assert list(changes(code)) == []


def test_the_operations_themselves_are_seen() -> None:
    assert len(MODULES) > 200
    assert len(list(changes(OPERATIONS.read_text(encoding="utf-8")))) > 10


class TestOperations:
    def test_written_files_have_the_rights_that_the_umask_leaves(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            operations.write(tmp_path / "x", b"data")
        finally:
            os.umask(before)
        assert (tmp_path / "x").read_bytes() == b"data"
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640

    def test_appends(self, tmp_path: Path) -> None:
        for part in (b"a" * 20_000, b"b"):
            with operations.append(tmp_path / "x") as file:
                file.write(part)
        assert (tmp_path / "x").read_bytes() == b"a" * 20_000 + b"b"

    def test_copies_what_a_link_leads_to(self, tmp_path: Path) -> None:
        content = os.urandom(3 << 20)
        (tmp_path / "x").write_bytes(content)
        operations.link(tmp_path / "link", tmp_path / "x")
        operations.copy(tmp_path / "link", tmp_path / "y")
        assert (tmp_path / "y").read_bytes() == content
        assert not (tmp_path / "y").is_symlink()

    def test_errors_name_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(OSError, match="No space") as full, operations.append(Path("/dev/full")) as file:
            file.write(b"x")
        assert full.value.filename == "/dev/full"

        def broken(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output") as lost:
            operations.sync(tmp_path)
        assert lost.value.filename == str(tmp_path)

    def test_directories_above_are_made_and_found_after_a_power_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed = []
        monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
        operations.make_directory(tmp_path / "a" / "b", parents=True)
        assert flushed == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]
        operations.make_directory(tmp_path / "a", exist_ok=True)
        with pytest.raises(FileExistsError):
            operations.make_directory(tmp_path / "a")
        with pytest.raises(FileNotFoundError):
            operations.make_directory(tmp_path / "c" / "d")
        (tmp_path / "x").write_text("")
        with pytest.raises(FileExistsError):
            operations.make_directory(tmp_path / "x", exist_ok=True)

    def test_a_tree_goes_and_what_its_links_lead_to_stays(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "x").write_text("theirs")
        (tmp_path / "tree" / "sub").mkdir(parents=True)
        (tmp_path / "tree" / "sub" / "x").write_text("")
        (tmp_path / "tree" / "link").symlink_to(tmp_path / "other")
        operations.delete_tree(tmp_path / "tree")
        operations.delete_tree(tmp_path / "tree")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]
        assert (tmp_path / "other" / "x").read_text() == "theirs"

    def test_files_without_a_name(self, tmp_path: Path) -> None:
        with operations.unnamed(tmp_path, size_bytes=10_000) as file:
            assert os.fstat(file.fileno()).st_size == 10_000
            assert os.fstat(file.fileno()).st_nlink == 0
            assert list(tmp_path.iterdir()) == []
