"""Readers on mutants of what they take: a few of each in every run, hundreds with ``make fuzz``."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

import pytest

from . import mutations
from .pool import BAD, run_all
from .readers import READERS, build_seeds, fuzz, targets_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are limited as on Linux")

SMOKE = {"plan": 20, "measurement": 4, "pieces": 5, "imatrix": 30, "exl2": 5, "cache": 20}
"""Readers that a default run tries, and on how many mutants."""


@pytest.fixture(scope="module")
def smoke_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    build_seeds(folder, SMOKE)
    return folder


def broken(reader: str, seeds: Path, scratch: Path, mutants: int, *, seed: int) -> list[str]:
    outcomes = fuzz(reader, seeds, scratch, mutants=mutants, seed=seed)
    assert len(outcomes) == mutants
    assert {"ok", "refused"} & {outcome.kind for outcome in outcomes}
    return [f"mutant {each.index}: {each.kind}, {each.detail}" for each in outcomes if each.kind in BAD]


@pytest.mark.parametrize("reader", SMOKE)
def test_what_mutants_are_made_of_is_read(reader: str, smoke_seeds: Path, tmp_path: Path) -> None:
    # A reader that refused all of it would pass every other test here.
    shutil.copytree(smoke_seeds / READERS[reader].seeds, tmp_path / "own")
    for path in {how: path for path, how in targets_of(reader, smoke_seeds)}.values():
        READERS[reader].read(tmp_path / "own", path)


@pytest.mark.parametrize("reader", SMOKE)
def test_a_few_mutants(reader: str, smoke_seeds: Path, tmp_path: Path) -> None:
    assert broken(reader, smoke_seeds, tmp_path, SMOKE[reader], seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_mutants(reader: str, tmp_path: Path) -> None:
    build_seeds(tmp_path / "seeds", [reader])
    (tmp_path / "scratch").mkdir()
    assert broken(reader, tmp_path / "seeds", tmp_path / "scratch", 500, seed=0) == []


def test_what_becomes_of_children() -> None:
    def run(number: int) -> tuple[str, str]:
        if number == 1:
            raise ZeroDivisionError
        if number == 2:
            while True:
                pass
        if number == 3:
            bytearray(1 << 40)
        if number == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        return "ok", str(number)

    started = time.process_time()
    for workers in (1, 2):
        outcomes = run_all(run, 6, workers=workers, seconds=0.1)
        kinds = ["ok", "traceback", "hang", "memory", "crash", "ok"]
        assert [(each.index, each.kind) for each in outcomes] == list(enumerate(kinds))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", [name for name in mutations.__all__ if name != "mutated_gguf"])
def test_a_seed_makes_the_same_mutants(name: str) -> None:
    mutated = getattr(mutations, name)
    header = b'{"__metadata__":{"a":"[1]"},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    image = len(header).to_bytes(8, "little") + header + bytes(8)
    document = b'{"a": [1, 2.5, {"b": null}], "c": "text", "d": {"e": true}}'
    data = image if name == "mutated_safetensors" else document
    first, again, other = ([mutated(data, Random(f"{seed}/{n}")) for n in range(50)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sum(mutant != data for mutant in first) > 40
