import errno
import io
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
import torch
from bpwise.checkpoint.files.atomic import (
    atomic_directory,
    atomic_file,
    private_directory,
    try_file,
    write_json,
)
from bpwise.checkpoint.files.partials import clear_partials
from bpwise.checkpoint.files.safetensors_file import load_metadata, load_tensors, save_tensors
from bpwise.checkpoint.files.schemas import Count, Number, Positive, check_schema, parse_schema, read_json, read_schema
from bpwise.errors import ConfigError, FormatError, NumericalError, WorkDirectoryError
from safetensors.torch import load_file, save_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refuse_writing(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Have the system refuse to open any file for writing."""
    opened, opened_by_number = io.open, os.open

    def refuse(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(error, os.strerror(error), str(file))
        return opened(file, mode, *rest, **options)

    def refuse_flags(file: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(error, os.strerror(error), str(file))
        return opened_by_number(file, flags, *rest, **options)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(os, "open", refuse_flags)


def half_of(directory: Path) -> Path:
    """What a killed run left in a directory that it was about to fill."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    half = directory / f".{directory.name}.partial-{ended.pid}-00ff00ff"
    half.mkdir()
    return half


class TestAtomicFile:
    def test_replaces_the_old_content_only_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "plan.json"
        path.parent.mkdir()
        path.write_text("old")
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            assert temporary.parent == path.parent
            assert temporary.name.startswith(f".plan.json.partial-{os.getpid()}")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert names(path.parent) == ["plan.json"]

    def test_takes_away_what_killed_runs_left_of_it(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        left = [f".{name}.partial-{ended.pid}-00ff00ff" for name in ("x", "y")]
        new = f".x.partial-{ended.pid}-11ff11ff"  # of a machine, perhaps, whose processes have other numbers
        for name in (*left, new):
            (tmp_path / name).write_text("half")
        for name in left:
            os.utime(tmp_path / name, (0, 0))
        with private_directory(tmp_path / "x") as mine:  # lives
            write_json(tmp_path / "x", {})
            assert names(tmp_path) == sorted([mine.name, left[1], new, "x"])

    def test_makes_missing_parents(self, tmp_path: Path) -> None:
        with atomic_file(tmp_path / "a" / "b" / "c") as temporary:
            temporary.write_text("x")
        assert (tmp_path / "a" / "b" / "c").read_text() == "x"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["bug", "ctrl-c"])
    def test_keeps_the_old_file_if_the_body_raises(self, tmp_path: Path, error: type[BaseException]) -> None:
        path = tmp_path / "x"
        path.write_text("old")
        with pytest.raises(error), atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old"
        assert names(tmp_path) == ["x"]

    def test_refuses_a_directory_in_the_way(self, tmp_path: Path) -> None:
        with pytest.raises(WorkDirectoryError, match="in the way"), atomic_file(tmp_path):
            pytest.fail("the body must not run")

    def test_refuses_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(WorkDirectoryError, match="cannot be written"),
            atomic_file(tmp_path / "file" / "x"),
        ):
            pytest.fail("the body must not run")

    @pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
    def test_names_the_target_when_the_disk_is_full(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        with pytest.raises(WorkDirectoryError) as caught, atomic_file(path) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("data")
        assert str(caught.value).startswith(f"{path}: not written, the disk is full")
        assert "Free some space" in str(caught.value)
        assert names(tmp_path) == []

    def test_a_disk_that_fills_up_during_the_flush_is_no_success(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WorkDirectoryError, match="disk is full"):
            write_json(tmp_path / "x", {})
        assert names(tmp_path) == []

    @pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO])
    def test_a_place_that_refuses_shows_before_the_body(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
    ) -> None:
        # Tests may run as root, for whom few places are read-only: the system's answer is given for it.
        refuse_writing(monkeypatch, error)
        with pytest.raises(WorkDirectoryError) as caught, atomic_file(tmp_path / "x"):
            pytest.fail("the body must not run")
        assert str(caught.value).startswith(f"{tmp_path / 'x'}: cannot be written ({os.strerror(error)}). Choose")

    def test_a_disk_that_becomes_read_only_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(temporary: Path) -> None:
            with temporary.open("wb"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        with pytest.raises(WorkDirectoryError, match="x: cannot be written"), atomic_file(tmp_path / "x") as temporary:
            write(temporary)
        with pytest.raises(WorkDirectoryError, match="y: cannot be written"), atomic_file(tmp_path / "y") as temporary:
            refuse_writing(monkeypatch, errno.EACCES)
            temporary.write_text("x")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("n" * 240, "File name too long"),
            ("a\0b", r"a\\x00b: not a valid path"),
            ("a\ud800", r"a\\ud800: not a valid path"),
            ("a\udcff", r"a\\udcff: not a valid path"),
        ],
        ids=["long", "nul", "surrogate", "latin-1"],
    )
    def test_names_that_cannot_be(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(WorkDirectoryError, match=message) as caught, atomic_file(tmp_path / name):
            pytest.fail("the body must not run")
        str(caught.value).encode()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("kind", ["device", "pipe"])
    def test_devices_and_pipes_are_not_replaced(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "x"
        if kind == "device":
            path.symlink_to("/dev/null")
        else:
            os.mkfifo(path)
        with pytest.raises(WorkDirectoryError, match="Got a device or a pipe"), atomic_file(path):
            pytest.fail("the body must not run")
        assert not path.is_file()

    @pytest.mark.parametrize("late", [False, True], ids=["before", "during"])
    def test_a_new_file_replaces_nothing(self, tmp_path: Path, late: bool) -> None:
        path = tmp_path / "x"
        if not late:
            path.write_text("theirs")
        with pytest.raises(WorkDirectoryError, match="in the way"), atomic_file(path, new=True) as temporary:
            assert late, "the body must not run"
            temporary.write_text("ours")
            path.write_text("theirs")
        assert path.read_text() == "theirs"
        assert names(tmp_path) == ["x"]

    def test_other_errors_of_the_body_stay_what_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x"):
            (tmp_path / "missing").read_text()

    def test_flushes_file_and_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kinds = []
        monkeypatch.setattr(os, "fsync", lambda fd: kinds.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
        write_json(tmp_path / "x", {})
        assert kinds == [False, True]


class TestAtomicDirectory:
    @pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
    def test_appears_complete(self, tmp_path: Path, existing: bool) -> None:
        path = tmp_path / "out"
        if existing:
            path.mkdir()
        with atomic_directory(path) as temporary:
            assert temporary.name.startswith(f".out.partial-{os.getpid()}")
            (temporary / "sub").mkdir()
            (temporary / "sub" / "x").write_text("1")
            assert not (path / "sub").exists()
        assert (path / "sub" / "x").read_text() == "1"
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["bug", "ctrl-c"])
    def test_leaves_nothing_if_the_body_raises(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error), atomic_directory(tmp_path / "out") as temporary:
            (temporary / "x").write_text("half")
            raise error
        assert names(tmp_path) == []

    @pytest.mark.parametrize("kind", ["file", "directory"])
    @pytest.mark.parametrize("late", [False, True], ids=["before", "during"])
    def test_refuses_what_is_in_the_way(self, tmp_path: Path, kind: str, late: bool) -> None:
        path = tmp_path / "out"

        def occupy() -> None:
            if kind == "file":
                path.write_text("theirs")
            else:
                path.mkdir()
                (path / "theirs").write_text("theirs")

        if not late:
            occupy()
        with pytest.raises(WorkDirectoryError, match="in the way"), atomic_directory(path) as temporary:
            assert late, "the body must not run"
            (temporary / "x").write_text("ours")
            occupy()
        assert (path if kind == "file" else path / "theirs").read_text() == "theirs"
        assert names(tmp_path) == ["out"]

    def test_follows_a_link_to_an_empty_directory(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to("disk")
        with atomic_directory(tmp_path / "out") as temporary:
            (temporary / "x").write_text("1")
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "x").read_text() == "1"

    def test_an_existing_directory_stays_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # It may be where a disk is mounted, or where a shell stands.
        path = tmp_path / "out"
        path.mkdir()
        inode = path.stat().st_ino
        monkeypatch.chdir(path)
        with atomic_directory(Path()) as temporary:
            for name in ("config.json", "weights"):
                (temporary / name).write_text("1")
            assert not Path("weights").exists()
        assert names(path) == names(Path()) == ["config.json", "weights"]
        assert path.stat().st_ino == inode
        assert names(tmp_path) == ["out"]

    def test_an_existing_directory_is_emptied_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "out"
        path.mkdir()
        replace = os.replace

        def fail_at_config(source: Path, target: Path) -> None:
            if source.name == "config.json":
                raise OSError(errno.EIO, "broken")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail_at_config)
        with pytest.raises(WorkDirectoryError, match="broken"), atomic_directory(path) as temporary:
            for name in ("config.json", "weights"):
                (temporary / name).write_text("1")
        assert names(path) == []

    @pytest.mark.parametrize("moved", [1, 2], ids=["half", "all"])
    def test_what_a_killed_run_had_moved_is_taken_back(self, tmp_path: Path, moved: int) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "theirs").write_text("theirs")
        half = half_of(out)
        entries = ["weights", "config.json"]
        (half / ".moving").write_text(json.dumps(entries))
        for name in entries[:moved]:
            (out / name).write_text("1")
        for name in entries[moved:]:
            (half / name).write_text("1")
        clear_partials(out)
        assert names(out) == (["theirs"] if moved < len(entries) else ["config.json", "theirs", "weights"])

    @pytest.mark.parametrize(
        "listed", [["../victim", "x"], ["/", "x"], ["..", "x"], [["victim"], "x"], [], 5, {"x": 1}, "x", None]
    )
    def test_a_list_by_somebody_else_takes_nothing_away(self, tmp_path: Path, listed: Any) -> None:
        out = tmp_path / "out"
        for directory in (out, tmp_path / "victim"):
            directory.mkdir()
            (directory / "theirs").write_text("theirs")
        half = half_of(out)
        (half / "x").write_text("1")
        (half / ".moving").write_text(json.dumps(listed))
        clear_partials(out)
        assert names(out) == names(tmp_path / "victim") == ["theirs"]

    def test_writing_a_file_takes_nothing_back(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "weights").write_text("theirs")
        half = half_of(out)
        (half / "x").write_text("1")
        (half / ".moving").write_text(json.dumps(["weights", "x"]))
        os.utime(half / "x", (0, 0))
        os.utime(half / ".moving", (0, 0))
        os.utime(half, (0, 0))
        write_json(out / "out", {})
        assert names(out) == ["out", "weights"]

    def test_flushes_every_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flushed = set()
        monkeypatch.setattr(os, "fsync", lambda fd: flushed.add(os.fstat(fd).st_ino))
        with atomic_directory(tmp_path / "out") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "x").write_text("1")
            (temporary / "y").write_text("2")
        paths = [tmp_path, *(tmp_path).rglob("*")]
        assert flushed == {path.stat().st_ino for path in paths}


class TestTrying:
    def test_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_text("old")
        for path in (tmp_path / "new", tmp_path / "old", tmp_path / "a" / "b" / "c"):
            try_file(path)
        assert names(tmp_path) == ["old"]
        assert (tmp_path / "old").read_text() == "old"

    def test_a_full_disk_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse_writing(monkeypatch, errno.ENOSPC)
        with pytest.raises(WorkDirectoryError, match="x: not written, the disk is full"):
            try_file(tmp_path / "a" / "x")
        assert names(tmp_path) == []


def test_a_private_directory_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), private_directory(tmp_path / "x") as directory:
        (directory / "big").write_text("big")
        assert re.fullmatch(rf"\.x\.partial-{os.getpid()}-[0-9a-f]{{8}}", directory.name)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_partials_of_the_dead_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    dead = f"partial-{ended.pid}-00ff00ff"
    (tmp_path / f".x.{dead}").mkdir()
    (tmp_path / f".x.{dead}" / "big").write_text("")
    for name in (f".y.{dead}", f".x.partial-{os.getppid()}-00ff00ff", f".x.{dead}.txt", "x", f"x.{dead}"):
        (tmp_path / name).write_text("")
    clear_partials(tmp_path, {"x"})
    kept = {f".y.{dead}", f".x.partial-{os.getppid()}-00ff00ff", f".x.{dead}.txt", "x", f"x.{dead}"}
    assert set(names(tmp_path)) == kept
    clear_partials(tmp_path)
    assert set(names(tmp_path)) == kept - {f".y.{dead}"}
    clear_partials(tmp_path / "none")


class TestJson:
    def test_round_trip_and_layout(self, tmp_path: Path) -> None:
        value = {"b": [1.5, None], "a": "é \ud800"}
        write_json(tmp_path / "x.json", value)
        text = (tmp_path / "x.json").read_text()
        assert text == '{\n "b": [\n  1.5,\n  null\n ],\n "a": "\\u00e9 \\ud800"\n}\n'
        assert read_json(tmp_path / "x.json", FormatError) == value

    @pytest.mark.parametrize("number", [float("nan"), float("-inf")], ids=["nan", "-inf"])
    def test_refuses_what_is_not_finite(self, tmp_path: Path, number: float) -> None:
        with pytest.raises(NumericalError, match="finite"):
            write_json(tmp_path / "x.json", {"a": [number]})
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read"),
            (b"{", "not valid JSON"),
            (b"\xff\xfe", "not valid JSON"),
            (b"[" * 200_000, "not valid JSON"),
            (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
            (b"[1]", "Got list"),
        ],
        ids=["missing", "cut", "not-utf8", "too-deep", "huge-number", "no-object"],
    )
    def test_says_what_is_wrong_with_a_file(self, tmp_path: Path, content: bytes | None, message: str) -> None:
        path = tmp_path / "x.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            read_json(path, ConfigError)
        assert str(caught.value).startswith(f"{path}: ")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.uint8]


class TestTensors:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
    @pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7)], ids=str)
    def test_agrees_with_the_reference_library(
        self, tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        tensors = {"x": (torch.randn(shape) * 3).to(dtype), "odd": torch.tensor([1, 2, 3], dtype=torch.int8)}
        save_tensors(tmp_path / "ours", tensors, {"k": "v"})
        save_file(tensors, tmp_path / "theirs", metadata={"k": "v"})
        for loaded in (
            load_file(tmp_path / "ours"),
            load_tensors(tmp_path / "ours"),
            load_tensors(tmp_path / "theirs"),
        ):
            assert loaded.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert loaded[name].dtype == tensor.dtype
                assert loaded[name].shape == tensor.shape
                assert torch.equal(loaded[name], tensor)
        assert load_metadata(tmp_path / "ours") == load_metadata(tmp_path / "theirs") == {"k": "v"}

    def test_views_and_shared_memory_are_written_out(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        save_tensors(tmp_path / "x", {"t": base.T, "row": base[1], "same": base, "every-other": base[:, ::2]})
        loaded = load_tensors(tmp_path / "x")
        assert torch.equal(loaded["t"], base.T)
        assert torch.equal(loaded["row"], base[1])
        assert torch.equal(loaded["same"], base)
        assert torch.equal(loaded["every-other"], base[:, ::2])
        assert load_metadata(tmp_path / "x") == {}

    def test_order_of_the_mapping_does_not_matter(self, tmp_path: Path) -> None:
        a, b = torch.ones(3), torch.zeros(2, dtype=torch.int8)
        save_tensors(tmp_path / "1", {"a": a, "b": b})
        save_tensors(tmp_path / "2", {"b": b, "a": a})
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("")
        save_tensors(tmp_path / "x", {"a": torch.ones(1)})
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_loaded_tensors_outlive_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        save_tensors(path, {"a": torch.ones(1000)})
        loaded = load_tensors(path)["a"]
        path.write_bytes(b"")
        assert loaded.sum() == 1000

    def test_a_full_disk_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(file: Any, *_: object) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("bpwise.checkpoint.files.safetensors_file.write_tensors", full)
        with pytest.raises(WorkDirectoryError, match="disk is full"):
            save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
        assert names(tmp_path) == []

    def test_damage_is_a_format_error(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        save_tensors(path, {"a": torch.ones(100)})
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match="truncated"):
            load_tensors(path)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_metadata(tmp_path / "missing", ConfigError)

    def test_known_bytes(self, tmp_path: Path) -> None:
        save_tensors(tmp_path / "x", {"a": torch.tensor([1, 258], dtype=torch.int16)})
        header = json.dumps({"a": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}}, separators=(",", ":"))
        padded = header.encode().ljust(56)
        assert (tmp_path / "x").read_bytes() == b"\x38" + bytes(7) + padded + b"\x01\x00\x02\x01"


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    size: Positive
    widths: tuple[Annotated[int, msgspec.Meta(ge=2, le=8)], ...] = ()

    def __post_init__(self) -> None:
        if len(self.widths) > self.size:
            raise ValueError("more widths than the part is large")


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: list[Part]
    damage: Number
    rest: Count = 0
    head: int | Literal["auto"] = 6
    free: dict[str, dict[str, int]] | None = None


class TestSchema:
    GOOD: ClassVar[dict[str, Any]] = {"parts": [{"name": "a", "size": 2, "widths": [8, 2]}], "damage": 1, "more": None}

    def test_reads_what_it_says(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text(json.dumps(self.GOOD))
        expected = Whole(parts=[Part(name="a", size=2, widths=(8, 2))], damage=1.0)
        assert read_schema(tmp_path / "x.json", Whole, FormatError) == expected
        assert parse_schema(json.dumps(self.GOOD), Whole, FormatError, where="x") == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"damage": "1"}, r"x\.json: damage: not a valid value\. Got '1'\. Expected float\. Do it again\."),
            ({"damage": float("nan")}, r"x\.json: damage: .* Got nan\. Expected float >= "),
            ({"damage": 10**400}, r"x\.json: damage: Number out of range\. Do it again\."),
            ({"rest": -1}, r"x\.json: rest: .* Got -1\. Expected int >= 0\."),
            ({"rest": True}, r"x\.json: rest: .* Got True\. Expected int\."),
            ({"rest": 1.0}, r"x\.json: rest: .* Got 1\.0\. Expected int\."),
            ({"rest": 10**30}, r"x\.json: rest: .* Got 10{29}0\. Expected int <= "),
            ({"head": []}, r"x\.json: head: .* Got \[\]\. Expected int \| str\."),
            ({"head": "many"}, r"x\.json: head: Invalid enum value 'many'\."),
            ({"parts": {}}, r"x\.json: parts: .* Got \{\}\. Expected array\."),
            ({"parts": [{"name": "a"}]}, r"x\.json: parts\[0\]: Object missing required field size\."),
            ({"parts": [{"name": "a", "size": 1, "widths": [3, 9]}]}, r"x\.json: parts\[0\]\.widths\[1\]: .* Got 9\."),
            (
                {"parts": [{"name": "a", "size": 1, "widths": [2, 2]}]},
                r"x\.json: parts\[0\]: more widths than the part",
            ),
            ({"free": {"\x1b": {"a": "b"}}}, r"x\.json: free\[\.\.\.\]\[\.\.\.\]: .* Got str\. Expected int\."),
        ],
    )
    def test_refuses_in_a_sentence(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps({**self.GOOD, **changes}))
        with pytest.raises(ConfigError, match=message):
            check_schema(read_json(path, ConfigError), Whole, ConfigError, where=str(path), remedy="Do it again.")

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "[]", ""])
    def test_refuses_what_is_no_object(self, text: str) -> None:
        with pytest.raises(FormatError, match=r"^here: (not valid|wrong) JSON"):
            parse_schema(text, Whole, FormatError, where="here")

    def test_takes_whole_surrogate_pairs(self) -> None:
        text = json.dumps({**self.GOOD, "parts": [{"name": "\U0001f600", "size": 1}]})
        assert "\\ud83d" in text
        with pytest.raises(FormatError, match=r"here: the key .* is not valid Unicode"):
            parse_schema(text.replace('"parts"', '"\\ud83d": 1, "parts"'), Whole, FormatError, where="here")
        assert parse_schema(text, Whole, FormatError, where="here").parts[0].name == "\U0001f600"
