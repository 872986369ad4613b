"""Digests of whole files, and when they are read again."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.files import digests as content
from bpwise.checkpoint.files.digests import cache_directory, file_digests
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.views import CheckpointView
from bpwise.cli import cli
from bpwise.errors import CheckpointError
from bpwise.progress import silent
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

PIECE = 3 << 19
"""Less than in use, so that files of several pieces are small."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one test alone, and small pieces."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_CHUNK_BYTES", PIECE)
    return tmp_path / "cache" / "bpwise" / "file-digests.json"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files were written long ago: nothing can set a ctime back, so the clock goes ahead."""
    monkeypatch.setattr(content.time, "time_ns", lambda: time.monotonic_ns() + (1 << 62))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, once for each piece."""
    names: list[str] = []
    real = content._chunk_digest

    def noted(path: Path, *arguments: Any) -> bytes:
        names.append(path.name)
        return real(path, *arguments)

    monkeypatch.setattr(content, "_chunk_digest", noted)
    return names


def by_hand(data: bytes) -> str:
    pieces = [data[start : start + PIECE] for start in range(0, len(data) or 1, PIECE)]
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()


def digest(path: Path) -> str:
    return file_digests([path], CheckpointError)[0]


@pytest.mark.parametrize("size", [0, 1, 1000, PIECE, PIECE + 1], ids=["empty", "one", "small", "a-piece", "two-pieces"])
def test_the_digest_is_that_of_all_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "f").write_bytes(data[:size])
    assert digest(tmp_path / "f") == by_hand(data[:size])


def test_files_are_read_once(tmp_path: Path, cache: Path, settled: None, reads: list[str]) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    first = file_digests([tmp_path / "a", tmp_path / "b"], CheckpointError)
    assert first == [by_hand(b"a"), by_hand(b"b")]
    assert sorted(reads) == ["a", "b"]
    (tmp_path / "link").symlink_to("a")
    assert file_digests([tmp_path / "b", tmp_path / "link"], CheckpointError) == first[::-1]
    assert sorted(reads) == ["a", "b"]
    assert str(tmp_path / "a") in json.loads(cache.read_text())["files"]


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"y")


def rename_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"yx")
    other.replace(path)


def copy_preserving(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"yx")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    subprocess.run(["cp", "-p", other, path], check=True)


def truncate_and_write(path: Path) -> None:
    path.write_bytes(b"yx")


def write_through_a_map(path: Path) -> None:
    mapped = torch.from_file(str(path), shared=True, size=2, dtype=torch.uint8)
    mapped[0] = ord("y")


@pytest.mark.parametrize(
    "change", [write_in_place, rename_over, copy_preserving, truncate_and_write, write_through_a_map]
)
@pytest.mark.parametrize("touched", [False, True], ids=["", "mtime-set-back"])
def test_changes_of_equal_size_are_noticed(
    change: Callable[[Path], None], touched: bool, tmp_path: Path, settled: None
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"xx")
    before = path.stat()
    assert digest(path) == by_hand(b"xx")
    time.sleep(0.02)  # a kernel's clock ticks each 4 ms or 10 ms; real files settle for two seconds
    change(path)
    if touched:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert digest(path) == by_hand(path.read_bytes()) != by_hand(b"xx")


def test_files_just_written_are_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "f").write_bytes(b"x")
    for _ in range(2):
        digest(tmp_path / "f")
    assert reads == ["f", "f"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"files": {}}'),
        lambda path: path.write_text(path.read_text().replace(by_hand(b"x"), "no digest")),
        lambda path: path.write_text(path.read_text().replace('"state"', '"size"')),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to(path.name)),
        lambda path: (path.unlink(), path.parent.rmdir(), path.parent.write_text("in the way")),
    ],
    ids=["no-text", "deep", "empty", "no-digest", "no-state", "directory", "fifo", "loop", "no-place"],
)
def test_a_damaged_cache_costs_time_only(
    damage: Callable[[Path], object], tmp_path: Path, cache: Path, settled: None, reads: list[str]
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    assert digest(tmp_path / "f") == by_hand(b"x")
    damage(cache)
    assert digest(tmp_path / "f") == by_hand(b"x")
    assert reads == ["f", "f"]


def test_without_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(content.Path, "home", nowhere)
    (tmp_path / "f").write_bytes(b"x")
    assert digest(tmp_path / "f") == by_hand(b"x")


def test_the_cache_does_not_grow_without_end(
    tmp_path: Path, cache: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_MOST_REMEMBERED", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        digest(tmp_path / name)
    assert [Path(key).name for key in json.loads(cache.read_text())["files"]] == ["b", "c"]


def test_names_that_are_no_text(tmp_path: Path, settled: None, reads: list[str]) -> None:
    path = tmp_path / os.fsdecode(b"f\xff")
    path.write_bytes(b"x")
    assert [digest(path), digest(path)] == [by_hand(b"x")] * 2
    assert len(reads) == 1


def test_a_change_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = content._chunk_digest

    def disturbed(path: Path, *arguments: Any) -> bytes:
        found = real(path, *arguments)
        path.write_bytes(b"xyz")
        return found

    monkeypatch.setattr(content, "_chunk_digest", disturbed)
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"f: changed while it was read\. Leave the file alone and run again"):
        digest(tmp_path / "f")


def test_long_reading_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []

    def progress(items: Sequence[Any], stage: str) -> Sequence[Any]:
        shown.append((len(items), stage))
        return items

    (tmp_path / "f").write_bytes(bytes(PIECE + 1))
    file_digests([tmp_path / "f"], CheckpointError, progress)
    assert shown == []
    monkeypatch.setattr(content, "_SHOWN_PIECES", 1)
    assert file_digests([tmp_path / "f"], CheckpointError, progress) == [by_hand(bytes(PIECE + 1))]
    assert shown == [(2, "read: weights")]


def test_a_prepared_fingerprint_is_the_same(make_model: Callable[..., Path], reads: list[str]) -> None:
    model = make_model("m")
    checkpoint = CheckpointView(Checkpoint.open(model))
    checkpoint.prepare_fingerprint(silent)
    assert sorted(reads) == ["config.json", "model.safetensors"]
    fingerprint = checkpoint.fingerprint
    checkpoint.prepare_fingerprint(silent)
    assert sorted(reads) == ["config.json", "model.safetensors"]
    assert fingerprint == open_model(model).fingerprint


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="f: cannot be read"):
        digest(tmp_path / "f")


def test_the_place_is_that_of_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == tmp_path / "cache" / "bpwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "bpwise"


def test_signs_flipped_in_place_make_another_model(make_model: Callable[..., Path], settled: None) -> None:
    model = make_model("m")
    weights = model / "model.safetensors"
    before, status = Checkpoint.open(model).fingerprint, weights.stat()
    time.sleep(0.02)
    tensors = load_file(weights)
    flipped = {name: -tensor if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(flipped, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_size == status.st_size
    assert Checkpoint.open(model).fingerprint != before
    save_file(tensors, weights, metadata={"format": "pt"})
    assert Checkpoint.open(model).fingerprint == before


def test_quick_commands_read_no_weights(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("m")

    def fail(*arguments: object) -> bytes:
        raise AssertionError("read the weights")

    monkeypatch.setattr(content, "_chunk_digest", fail)
    missing = ("-c", tmp_path / "missing.txt")
    for command, code in (
        (("inspect", model), 0),
        (("quantize", model, tmp_path / "out", "--bpw", "4.5", "--dry-run"), 0),
        (("measure", model, "-o", tmp_path / "x.safetensors", *missing), 1),
        (("quantize", model, tmp_path / "out", "--bpw", "4.5", *missing), 1),
    ):
        result = CliRunner().invoke(cli, [str(part) for part in command])
        assert result.exit_code == code, result.output
        assert not isinstance(result.exception, AssertionError)
    # The guard itself guards.
    with pytest.raises(AssertionError, match="read the weights"):
        _ = open_model(model).fingerprint
