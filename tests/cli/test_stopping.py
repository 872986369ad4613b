"""Ctrl-C and the signals that end a process: nothing half made is left, and the exit code tells which it was."""

import os
import signal
import subprocess
import sys
import time
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
    assert errors.split("\n") == ["", "Stopped. Run the same command to continue.", ""]
    assert list(tmp_path.iterdir()) == []


STUCK = """
import hashlib
import signal
import sys
import time
from bpwise.cli import group
from bpwise.cli.group import cli, main

signal.signal(signal.SIGINT, signal.default_int_handler)
kind, group._CLEANING_SECONDS = sys.argv[1], float(sys.argv[2])

@cli.command()
def wait():
    if kind == "threads":
        import torch
        from bpwise.linalg.parallel import run_all
    print("ready", flush=True)
    if kind == "threads":
        run_all([lambda: time.sleep(600)], torch.device("cpu"))
    if kind == "C":
        hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
    try:
        time.sleep(600)
    finally:
        print("cleaning", flush=True)
        time.sleep(1)
        print("clean", flush=True)

sys.argv[1:] = ["wait"]
main()
"""


def started(kind: str, cleaning_seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", STUCK, kind, str(cleaning_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # in the middle of it
    return process


@pytest.mark.parametrize("kind", ["threads", "C"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_takes_long_in_threads_or_in_c_is_not_waited_for(kind: str, name: str, code: int) -> None:
    with started(kind, 0.3) as process:
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.split("\n") == ["", "Stopped. Run the same command to continue.", ""]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_it_at_once(name: str) -> None:
    with started("body", 600.0) as process:
        assert process.stdout is not None
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == "cleaning\n"
        time.sleep(0.2)
        process.send_signal(getattr(signal, name))
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert rest == ""
    assert errors.split("\n") == ["", "Stopped. Run the same command to continue.", ""]


def test_one_that_comes_with_the_first_does_not() -> None:
    # `timeout` sends the signal to the process, then to its group, which the process is in.
    with started("body", 600.0) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert rest == "cleaning\nclean\n"


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
