"""Memory that runs out, wherever a run asks torch for some: a sentence says what to lower, and the next run goes on."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from .commands import COMMANDS, Command, Stage, timeless
from .disk import Tree, restore, tree_of, unsynchronised
from .test_points import differences

FAILURES: list[Callable[[], BaseException]] = [
    lambda: MemoryError("Unable to allocate 3 GiB"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 3 GiB"),
]

NEEDING = ("measure", "quantize, exl2", "quantize, tuned", "eval, with its cache")
"""Commands in which much is in memory; each is failed at places that are spread over the whole run."""


class Failing(TorchFunctionMode):
    """Counts what torch is asked for; fails once, at the n-th."""

    def __init__(self, at: int | None, failure: Callable[[], BaseException]) -> None:
        super().__init__()
        self.count = 0
        self._at = at
        self._failure = failure

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self._at:
            raise self._failure()
        return function(*args, **(kwargs or {}))


def failed(stage: Stage, command: Command, places: int) -> list[str]:
    """Fail a command at so many places; return what goes wrong, a line each."""
    expected = stage.finished(command)
    counting = Failing(None, FAILURES[0])
    stage.begin(command)
    with unsynchronised(), counting:
        assert stage.run(command).exit_code == 0
    faults = []
    points = [counting.count * number // places for number in range(places)]
    for point, failure in zip(points, cycle(FAILURES), strict=False):
        fault = fault_at(stage, command, point, failure, expected)
        if fault:
            faults.append(f"{command.name}, {point} of {counting.count}, {failure()!r}: {fault}")
    return faults


def fault_at(stage: Stage, command: Command, point: int, failure: Callable[[], BaseException], expected: Tree) -> str:
    stage.begin(command)
    with unsynchronised(), Failing(point, failure):
        done = stage.run(command)
    last = (done.stderr.splitlines() or [""])[-1]
    if done.exit_code == 1 and not (last.startswith("Error: memory: there is not enough") and "Lower --rows" in last):
        return f"no sentence: {done.exception!r} {last}"
    if done.exit_code not in (0, 1):
        return f"exit code {done.exit_code}: {done.exception!r}"
    restore(stage.disk, tree_of(stage.disk))
    with unsynchronised():
        again = stage.run(command)
    if again.exit_code != 0:
        return f"does not go on: {again.stderr}"
    return differences(timeless(tree_of(stage.disk)), expected)


@pytest.mark.parametrize("name", NEEDING)
def test_some_memory_that_runs_out(name: str, stage: Stage) -> None:
    assert failed(stage, next(command for command in COMMANDS if command.name == name), len(FAILURES)) == []


@pytest.mark.crash
@pytest.mark.parametrize("name", NEEDING)
def test_memory_that_runs_out(name: str, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    faults = failed(stage, next(command for command in COMMANDS if command.name == name), 60)
    with capsys.disabled():
        print(f"\n{name}: places without memory 60, wrong {len(faults)}")
    assert faults == []
