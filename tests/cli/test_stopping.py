"""Ctrl-C and the signals that end a process: nothing half made is left, and the exit code tells which it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAIT = """
import signal
import time
from pathlib import Path
from bpwise.cli.group import cli, main
from bpwise.checkpoint.files.atomic import atomic_directory, atomic_file
from bpwise.checkpoint.files.paths import reserved

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

@cli.command()
def wait():
    out = Path("out")
    with reserved(out), atomic_file(Path("x")) as file, atomic_directory(out) as directory:
        file.write_text("half")
        (directory / "big").write_text("half")
        print("ready", flush=True)
        time.sleep(60)

main()
"""


def stopped_by(number: int, folder: Path) -> tuple[int, str]:
    listening = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # the tests may run under nohup
    command = [sys.executable, "-c", f"{listening}\n{WAIT}", "wait"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_cleans_up_and_says_so_in_a_line(tmp_path: Path, name: str, code: int) -> None:
    returned, errors = stopped_by(getattr(signal, name), tmp_path)
    assert returned == code
    assert errors.split("\n") == ["", "Stopped.", ""]
    assert list(tmp_path.iterdir()) == []


def test_nohup_keeps_it_running(tmp_path: Path) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    command = [sys.executable, "-c", f"{ignoring}\n{WAIT}", "wait"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGHUP)
        os.kill(process.pid, signal.SIGTERM)  # comes after the other
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_killed_one_leaves_what_the_next_takes_away(tmp_path: Path) -> None:
    returned, _ = stopped_by(signal.SIGKILL, tmp_path)
    assert returned == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3  # the lock, a partial file and a partial directory
    stopped_by(signal.SIGTERM, tmp_path)
    assert [path.name.split("partial")[0] for path in tmp_path.iterdir()] == [".x."]  # of another output
