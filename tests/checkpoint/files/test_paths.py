import errno
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from bpwise.checkpoint.files.paths import (
    check_file,
    check_run,
    companion,
    locked,
    named,
    refuse_foreign,
    refuse_inputs,
    reserved,
    try_directory,
    work_beside,
)
from bpwise.errors import BpwiseWarning, WorkDirectoryError
from filelock import FileLock


def listing(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def test_companions_stand_in_a_directory_or_beside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "m-4.5bpw.gguf"
    assert companion(tmp_path, "README.md") == tmp_path / "README.md"
    assert companion(file, "README.md") == tmp_path / "m-4.5bpw.README.md"
    assert companion(file, "README.md", whole_name=True) == tmp_path / "m-4.5bpw.gguf.README.md"


class TestNames:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [("out", "out.work"), ("a/out/", "a/out.work"), ("m.gguf", "m.gguf.work"), ("./out", "out.work")],
    )
    def test_work_directories_lie_beside_the_output(self, path: str, expected: str) -> None:
        assert work_beside(Path(path)) == Path(expected)

    def test_places_without_a_name_get_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "b")
        assert named(Path()) == tmp_path / "a" / "b"
        assert named(Path("..")) == tmp_path / "a"
        assert work_beside(Path()) == tmp_path / "a" / "b.work"
        assert work_beside(Path("../..")) == tmp_path.with_name(f"{tmp_path.name}.work")
        assert work_beside(Path("/")) == Path("/.work")

    def test_a_current_directory_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path / "a")
        (tmp_path / "a").rmdir()
        with pytest.raises(WorkDirectoryError, match="No such file or directory"):
            named(Path())
        monkeypatch.chdir(tmp_path)


class TestReserved:
    @pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
    @pytest.mark.parametrize("linked", [False, True], ids=["direct", "through-a-link"])
    def test_keeps_others_away(self, tmp_path: Path, exists: bool, linked: bool) -> None:
        output = tmp_path / "disk" / "out"
        if exists:
            output.mkdir(parents=True)
        else:
            output.parent.mkdir()
        (tmp_path / "link").symlink_to("disk")
        other = tmp_path / "link" / "out" if linked else output
        busy = pytest.raises(WorkDirectoryError, match="out: in use by another bpwise run")
        with reserved(output), busy, reserved(other):
            pytest.fail("both make it")
        with reserved(other):
            pass
        assert listing(tmp_path / "disk") == ({"out"} if exists else set())

    def test_the_lock_is_one_that_others_see(self, tmp_path: Path) -> None:
        busy = pytest.raises(WorkDirectoryError, match="in use")
        with FileLock(tmp_path / ".m.gguf.lock"), busy, reserved(tmp_path / "m.gguf"):
            pytest.fail("both make it")

    @pytest.mark.parametrize("place", ["file/x.lock", "n" * 260], ids=["file", "long"])
    def test_a_place_without_locks(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("")
        what = pytest.raises(
            WorkDirectoryError, match=r"out: cannot be locked\. Got .*\. Expected a writable directory"
        )
        with what, locked(tmp_path / place, tmp_path / "out", "choose another output"):
            pytest.fail("it is not locked")
        assert listing(tmp_path) == {"file"}

    @pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP], ids=["missing", "unsupported"])
    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
        def no_locks(_file: int, _how: int) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr("fcntl.flock", no_locks)
        with pytest.warns(BpwiseWarning, match="out: its file system has no locks"), reserved(tmp_path / "out"):
            (tmp_path / "out").mkdir()
        assert listing(tmp_path) == {"out"}

    def test_a_dead_process_leaves_no_lock(self, tmp_path: Path) -> None:
        lock = tmp_path / ".out.lock"
        child = os.fork()
        if child == 0:
            with locked(lock, tmp_path / "out", "choose another output"):
                os._exit(0)  # nothing lets go of it
        os.waitpid(child, 0)
        assert lock.exists()
        with reserved(tmp_path / "out"):
            pass
        assert listing(tmp_path) == set()

    def test_takes_away_what_the_dead_left(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        dead = f"partial-{ended.pid}-00ff00ff"
        names = [
            f".m.gguf.{dead}",
            f".m.report.md.{dead}",
            f".other.gguf.{dead}",
            f".m.gguf.partial-{os.getppid()}-00ff00ff",
        ]
        for name in names:
            (tmp_path / name).write_text("half")
        with reserved(tmp_path / "m.gguf", ["m.report.md"]):
            left = listing(tmp_path) - {".m.gguf.lock"}
        assert left == set(names[2:])

    def test_a_directory_is_cleared_too(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / f".report.md.partial-{ended.pid}-00ff00ff").write_text("half")
        (tmp_path / f".out.partial-{ended.pid}-00ff00ff").mkdir()
        with reserved(tmp_path / "out"):
            assert listing(tmp_path) == {"out", ".out.lock"}

    @pytest.mark.parametrize(
        "place", ["/proc/out", "/sys/out", "file/out", "n" * 250], ids=["proc", "sys", "file", "long"]
    )
    def test_places_that_cannot_be(self, tmp_path: Path, place: str) -> None:
        # Root may write almost anywhere, but not there.
        (tmp_path / "file").write_text("")
        with pytest.raises(WorkDirectoryError, match=r"cannot be written|not written"), reserved(tmp_path / place):
            pytest.fail("it cannot be made")
        assert listing(tmp_path) == {"file"}

    def test_names_beside_it_are_tried_too(self, tmp_path: Path) -> None:
        with pytest.raises(WorkDirectoryError, match="File name too long"), reserved(tmp_path / "x", ["n" * 250]):
            pytest.fail("the report cannot be made")


class TestInputs:
    @pytest.mark.parametrize("output", ["model", "model/out", "model/a/b", "link", "link/out"])
    def test_a_model_is_not_written_into(self, tmp_path: Path, output: str) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "link").symlink_to("model")
        with pytest.raises(WorkDirectoryError, match="read as one model"):
            refuse_inputs(tmp_path / output, directories=[tmp_path / "model"])

    def test_what_is_read_is_not_written(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("")
        (tmp_path / "link").symlink_to("m")
        for output in ("m", "link"):
            with pytest.raises(WorkDirectoryError, match="is an input of this run"):
                refuse_inputs(tmp_path / output, files=[None, tmp_path / "m"])
        refuse_inputs(tmp_path / "model-2", directories=[tmp_path / "model"], files=[tmp_path / "m"])

    @pytest.mark.parametrize(
        ("work", "offload", "fine"),
        [
            ("out.work", "out.work/states", True),
            ("w", None, True),
            (".", None, True),  # what is made may lie in the work directory
            ("out", None, False),
            ("out/work", None, False),
            ("w", "out/states", False),
            ("model", None, False),
            ("model/work", None, False),
            ("w", "model", False),
            ("w", "file/states", False),
        ],
    )
    def test_places_of_a_run(self, tmp_path: Path, work: str, offload: str | None, fine: bool) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "file").write_text("")
        with ExitStack() as stack:
            if not fine:
                stack.enter_context(pytest.raises(WorkDirectoryError))
            check_run(
                tmp_path / "out",
                tmp_path / work,
                directories=[tmp_path / "model"],
                offload=[None if offload is None else tmp_path / offload],
            )
        assert listing(tmp_path) == {"model", "file"}


class TestFiles:
    @pytest.mark.parametrize("content", ["theirs", "ours", ""], ids=["theirs", "ours", "empty"])
    def test_only_our_own_are_replaced(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "x"
        path.write_text(content)
        with ExitStack() as stack:
            if content == "theirs":
                stack.enter_context(pytest.raises(WorkDirectoryError, match="Expected none or a plan of bpwise"))
            refuse_foreign(path, lambda file: file.read_text() == "ours", "a plan")
        assert path.read_text() == content

    def test_force_replaces_any_but_what_is_read(self, tmp_path: Path) -> None:
        for name in ("x", "y"):
            (tmp_path / name).write_text("theirs")
        with pytest.raises(WorkDirectoryError, match="in the way"):
            check_file(tmp_path / "x", lambda _: False, "a plan", read=tmp_path / "y", force=False)
        check_file(tmp_path / "x", lambda _: False, "a plan", read=tmp_path / "y", force=True)
        with pytest.raises(WorkDirectoryError, match="is an input of this run"):
            check_file(tmp_path / "y", lambda _: False, "a plan", read=tmp_path / "y", force=True)

    def test_directories(self, tmp_path: Path) -> None:
        try_directory(tmp_path)
        try_directory(tmp_path / "a" / "b")
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "a", Path("/proc/a")):
            with pytest.raises(WorkDirectoryError, match=f"{path}: (in the way|cannot be written|not written)"):
                try_directory(path)
        assert listing(tmp_path) == {"file"}
