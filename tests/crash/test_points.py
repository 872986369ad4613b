"""A crash at every operation of every command, and a disk that refuses each: the same command then ends as ever."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
from bpwise.cli import cli
from bpwise.convert.registry import formats

from .commands import COMMANDS, FORMATS, PUSHES, READING, Command, Stage, readable_models, timeless
from .disk import REFUSALS, Picture, Recorder, Refusing, Site, Tree, restore, tree_of, unsynchronised

ALL = [pytest.param(command, id=command.name) for command in COMMANDS]
SEED = 22
SAMPLED = 6
SAMPLED_REFUSALS = 2


def differences(found: Tree, expected: Tree) -> str:
    """Say how a disk differs from what it should be; nothing if it does not."""
    more, less = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    changed = sorted(path for path in found.keys() & expected.keys() if found[path] != expected[path])
    said = {"too many": more, "missing": less, "changed": changed}
    return ", ".join(f"{what} {', '.join(paths)}" for what, paths in said.items() if paths)


def fault_after(stage: Stage, command: Command, picture: Picture, expected: Tree) -> str:
    """Say what is wrong after a crash, or once the command has run again; nothing if all is well."""
    restore(stage.disk, picture.tree)
    for path in readable_models(stage.disk):
        name = path.name
        for each in (name, f"{name}/config.json", f"{name}/output.safetensors", f"{name}/bpwise.json"):
            if each in expected and picture.tree.get(each, "") != expected[each]:
                return f"{each} looks finished and is not"
    with unsynchronised():
        done = stage.run(command)
    if done.exit_code != 0:
        return f"does not go on: {done.exception!r} {done.stderr.splitlines()[-1:]}"
    return differences(timeless(tree_of(stage.disk)), expected)


def recorded(stage: Stage, command: Command) -> tuple[Recorder, Tree]:
    """Run a command once, watched, whoever asks first; what it leaves must be what it always leaves."""
    if command.name in stage.recorded:
        return stage.recorded[command.name]
    expected = stage.finished(command)
    stage.begin(command)
    recorder = Recorder(stage.disk)
    with recorder.watching():
        done = stage.run(command)
    assert done.exit_code == 0, done.output
    assert differences(timeless(tree_of(stage.disk)), expected) == ""
    assert recorder.odd == []
    stage.recorded[command.name] = recorder, expected
    return recorder, expected


def crash(stage: Stage, command: Command, expected: Tree, pictures: Sequence[Picture]) -> list[str]:
    """Crash at these points; return what goes wrong, a line each."""
    faults = []
    for picture in pictures:
        fault = fault_after(stage, command, picture, expected)
        if fault:
            faults.append(f"{picture.kind} at operation {picture.point}: {fault}")
            print(faults[-1], flush=True)
    return faults


def test_every_command_and_every_format_is_tried() -> None:
    assert set(cli.commands) == {command.command for command in [*COMMANDS, *PUSHES]} | READING
    assert set(FORMATS) == set(formats())


@pytest.mark.parametrize("command", ALL)
def test_some_crashes(command: Command, stage: Stage) -> None:
    recorder, expected = recorded(stage, command)
    some = random.Random(SEED).sample(recorder.pictures, min(SAMPLED, len(recorder.pictures)))
    assert crash(stage, command, expected, some) == []


@pytest.mark.crash
@pytest.mark.parametrize("command", ALL)
def test_every_crash(command: Command, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    recorder, expected = recorded(stage, command)
    faults = crash(stage, command, expected, recorder.pictures)
    tried = Counter(picture.kind for picture in recorder.pictures)
    with capsys.disabled():
        kinds = ", ".join(f"{kind} {recorder.tried[kind]}" for kind in recorder.tried)
        print(f"\n{command.name}: {recorder.count} operations, crashes {sum(recorder.tried.values())} ({kinds}), ")
        print(f"  different disks {len(recorder.pictures)} ({dict(tried)}), wrong {len(faults)}")
    assert faults == []


def fault_of_refusal(stage: Stage, command: Command, site: Site, error: str, expected: Tree) -> str:
    """Say what is wrong with a run that is refused one operation, or with the run after it; nothing if all is well."""
    stage.begin(command)
    refusing = Refusing(site, error)
    with refusing.watching():
        done = stage.run(command)
    assert refusing.refused
    last = (done.stderr.splitlines() or [""])[-1]
    if done.exit_code == 1 and (not isinstance(done.exception, SystemExit) or not last.startswith("Error: ")):
        return f"no sentence: {done.exception!r} {last}"
    if done.exit_code not in (0, 1):
        return f"exit code {done.exit_code}: {done.exception!r}"
    left = {path: node for path, node in timeless(tree_of(stage.disk)).items() if path in expected}
    if done.exit_code == 0 and not command.spares(set(expected) - set(left)):
        return f"exit code 0, and {differences(left, expected)}"
    return fault_after(stage, command, Picture(0, error, tree_of(stage.disk)), expected)


def refuse(stage: Stage, command: Command, sample: int | None) -> tuple[int, list[str]]:
    """Refuse operations of a command, one a run; return how many were tried, and what goes wrong, a line each."""
    recorder, expected = recorded(stage, command)
    pairs = list(product(recorder.sites, REFUSALS))
    if sample is not None:
        pairs = random.Random(SEED).sample(pairs, min(sample, len(pairs)))
    faults = []
    for site, error in pairs:
        fault = fault_of_refusal(stage, command, site, error, expected)
        if fault:
            faults.append(f"{error} of {recorder.sites[site]} at {' '.join(site)}: {fault}")
            print(faults[-1], flush=True)
    return len(pairs), faults


@pytest.mark.parametrize("command", ALL)
def test_some_refusals(command: Command, stage: Stage) -> None:
    _, faults = refuse(stage, command, SAMPLED_REFUSALS)
    assert faults == []


@pytest.mark.crash
@pytest.mark.parametrize("command", ALL)
def test_every_refusal(command: Command, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    tried, faults = refuse(stage, command, None)
    with capsys.disabled():
        print(f"\n{command.name}: refusals {tried} ({', '.join(REFUSALS)}), wrong {len(faults)}")
    assert faults == []
