"""Several runs at once in one place: one makes what it always makes, the others say that it is in use."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from .commands import COMMANDS, TEXT, Command, Stage, timeless
from .disk import tree_of
from .test_points import differences

TOGETHER = 3
ONE_AT_A_TIME = ("measure", "quantize, exl2", "quantize, gguf", "quantize, a series")
BUSY = "in use by another bpwise run"


def named(name: str) -> Command:
    return next(command for command in COMMANDS if command.name == name)


def started_together(stage: Stage, *commands: Command) -> list[tuple[int, str]]:
    """Run commands in processes of their own, all at once; return exit codes and last lines, the first ended first."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(len(commands)), context.SimpleQueue()

    def run(command: Command) -> None:
        torch.set_num_threads(1)
        start.wait()
        done = stage.run(command)
        answers.put((done.exit_code, (done.stderr.splitlines() or [""])[-1]))

    runs: list[Any] = [context.Process(target=run, args=(command,)) for command in commands]
    for each in runs:
        each.start()
    ended = [answers.get() for _ in runs]
    for each in runs:
        each.join()
    return ended


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_one_place_is_one_runs(name: str, stage: Stage) -> None:
    command = named(name)
    expected = stage.finished(command)
    stage.begin(command)
    ended = started_together(stage, *[command] * TOGETHER)
    codes = sorted(code for code, _ in ended)
    assert codes[0] == 0
    assert set(codes) <= {0, 1}
    assert all(BUSY in last for code, last in ended if code == 1), ended
    assert differences(timeless(tree_of(stage.disk)), expected) == ""


def test_one_work_directory_is_one_outputs(stage: Stage) -> None:
    # Outputs of other names, so that nothing but the work directory is shared; the others run when the first is done.
    outputs = [f"DISK/{name}" for name in ("a", "b", "c")]
    options = ("--bpw", 5, *TEXT, "--no-eval", "--work-dir", "DISK/work")
    commands = [Command(output, ("quantize", "MODEL", output, *options)) for output in outputs]
    expected = stage.finished(commands[0])
    stage.begin(commands[0])
    ended = started_together(stage, *commands)
    assert [code for code, _ in ended].count(0) >= 1
    assert all(BUSY in last for code, last in ended if code), ended
    assert [stage.run(command).exit_code for command in commands] == [0, 0, 0]
    found = timeless(tree_of(stage.disk))
    for output in outputs:
        name = output.removeprefix("DISK/")
        own = {path.replace(name, "a", 1): node for path, node in found.items() if path.split("/")[0] == name}
        assert differences(own, {path: node for path, node in expected.items() if path.split("/")[0] == "a"}) == ""


def test_one_cache_and_one_report_serve_all(stage: Stage) -> None:
    command = named("eval, with its cache")
    expected = stage.finished(command)
    stage.begin(command)
    ended = started_together(stage, *[command] * TOGETHER)
    assert [code for code, _ in ended] == [0] * TOGETHER, ended
    assert differences(timeless(tree_of(stage.disk)), expected) == ""


def test_a_report_waits_for_another(stage: Stage, tmp_path: Path) -> None:
    from bpwise.checkpoint.files.paths import locked
    from bpwise.errors import WorkDirectoryError
    from bpwise.eval.report import report as reports

    held = []

    def write(path: Path, _: Any) -> None:
        with pytest.raises(WorkDirectoryError, match="in use"), locked(tmp_path / ".report.lock", path, "wait"):
            pytest.fail("two write one report")
        held.append(path.name)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reports, "write_json", write)
        reports.write_report(SomeReport(), tmp_path)  # type: ignore[arg-type]
    assert held == ["report.json"]
    assert list(tmp_path.iterdir()) == []


class SomeReport:
    """As much of a report as is asked for before the first file is written."""

    def to_dict(self) -> dict[str, Any]:
        return {}
