"""Runs of a tiny model that are stopped in each step, by Ctrl-C and SIGTERM: what they say, leave, and go on from."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bpwise.quantize.series  # noqa: F401 - so that no process needs to import it, and torch, for itself
import pytest
from bpwise.checkpoint.files.shards import ShardWriter
from bpwise.cli import main, output
from bpwise.linalg.work import Rates

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks of this one")

OPTIONS = ("--bpw", "4", "--rows", "2", "--row-tokens", "32", "--eval-rows", "2", "--eval-row-tokens", "32")


def work(folder: Path, arguments: Sequence[str], place: int) -> None:
    """Be the process ``bpwise``; where it is goes to a pipe, a line each."""

    def lines(items: Sequence[Any], label: str, _left: Any) -> Iterator[Any]:
        for item in items:
            os.write(place, f"{label}\n".encode())
            yield item

    def add(self: ShardWriter, tensors: Any) -> None:
        os.write(place, b"writing\n")
        plain(self, tensors)

    output._progress_lines = lines
    plain, ShardWriter.add = ShardWriter.add, add  # type: ignore[method-assign]
    Rates._timed = lambda *_args, **_kwargs: [1e-3]  # type: ignore[method-assign]
    os.chdir(folder)
    sys.stdout = sys.stderr = Path("log").open("a", encoding="utf-8")  # noqa: SIM115 - until the process ends
    sys.argv = ["bpwise", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()


def run(folder: Path, arguments: Sequence[str], stop: tuple[str, int] | None = None) -> tuple[int, list[str]]:
    """Run a command in a process, and stop it where it says a label; return the exit code and all labels."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are there the child needs none
        process = os.fork()
    if process == 0:
        code: Any = 1
        try:
            os.close(reading)
            work(folder, arguments, writing)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    labels = []
    with os.fdopen(reading, encoding="utf-8") as said:
        for line in said:
            labels.append(line.rstrip("\n").rpartition("] ")[2])  # which step of how many depends on what is left
            if stop is not None and labels[-1] == stop[0]:
                os.kill(process, stop[1])
                stop = None
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), labels


def test_every_step_can_be_stopped_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    command = ["quantize", str(tiny_model), "out", *OPTIONS]
    places = tmp_path / "stopped"
    places.mkdir()
    stops = [
        ("forward", signal.SIGINT),
        ("backward, curves", signal.SIGTERM),
        ("round", signal.SIGINT),
        ("writing", signal.SIGTERM),
        ("logits", signal.SIGINT),
    ]
    for label, number in stops:
        code, labels = run(places, command, (label, number))
        assert label in labels
        log = (places / "log").read_text(encoding="utf-8").rstrip("\n").split("\n")
        assert code == 128 + number, log
        assert log[-1] == "Stopped. Run the same command to resume. Finished work is kept in out.work."
        assert [path for path in places.rglob("*") if "partial" in path.name or path.suffix == ".lock"] == []
        assert (places / "out").exists() == (label == "logits")
    code, labels = run(places, command)
    assert code == 0
    assert "writing" not in labels  # the output was finished before
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, command)[0] == 0
    made = sorted(path.name for path in (whole / "out").iterdir())
    assert sorted(path.name for path in (places / "out").iterdir()) == made
    for name in made:
        if name.endswith(".safetensors"):
            assert (places / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
