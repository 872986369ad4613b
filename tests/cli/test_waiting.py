"""A run that waits for room on a full disk, and one that does not."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bpwise.cli import cli, group
from bpwise.convert.exl2.file import writer
from click.testing import CliRunner, Result

FULL = "out: not written, the disk is full (No space left on device). Free some space there, or choose a path on"


def quantize(model: Path, output: Path, *options: str) -> Result:
    command = ["quantize", str(model), str(output), "--bpw", "4", "--rows", "2", "--row-tokens", "32", "--no-eval"]
    return CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that is full whenever the output's config is written, until its free space has been asked for thrice."""
    asked: list[int] = []
    plain = shutil.disk_usage

    def usage(path: Any) -> Any:
        asked.append(1)
        return SimpleNamespace(free=plain(path).free + (10 << 20) * (len(asked) > 3))

    def refused(path: Path, value: Any) -> None:
        if len(asked) <= 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    write_json = writer.write_json
    monkeypatch.setattr(writer, "write_json", refused)
    monkeypatch.setattr(group, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(group, "shutil", SimpleNamespace(disk_usage=usage))
    return asked


def test_waits_says_so_once_and_goes_on(tiny_model: Path, tmp_path: Path, full_disk: list[int]) -> None:
    result = quantize(tiny_model, tmp_path / "out", "--wait-for-space")
    assert result.exit_code == 0, result.stderr
    waiting = [line for line in result.stderr.splitlines() if line.startswith("waiting")]
    assert len(waiting) == 1
    assert FULL in waiting[0]
    assert waiting[0].endswith("This run goes on by itself.")
    assert len(full_disk) > 3
    assert not (tmp_path / "out.work" / ".lock").exists()
    whole = quantize(tiny_model, tmp_path / "whole")
    assert whole.exit_code == 0
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_ends_unless_it_is_asked_to_wait(tiny_model: Path, tmp_path: Path, full_disk: list[int]) -> None:
    result = quantize(tiny_model, tmp_path / "out")
    assert result.exit_code == 1
    assert FULL in result.stderr
    assert not (tmp_path / "out").exists()


def test_tries_again_after_a_while_in_any_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What is left of a quota shows nowhere.
    seconds = 0.0

    def sleep(given: float) -> None:
        nonlocal seconds
        seconds += given

    monkeypatch.setattr(group, "time", SimpleNamespace(monotonic=lambda: seconds, sleep=sleep))
    monkeypatch.setattr(group, "shutil", SimpleNamespace(disk_usage=lambda _path: SimpleNamespace(free=5)))
    group._wait_for_room(tmp_path / "not" / "there")
    assert seconds == 600
