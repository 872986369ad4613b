"""Readers on mutants of what they take: a few of some in every run, thousands of all with ``make fuzz``."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from bpwise.checkpoint.source.hub import resolve_model
from bpwise.errors import CheckpointError, PublishError
from bpwise.eval.publishing.push import Upload, upload_model

from . import mutations
from .hub import answers_of, lying_hub
from .kinds import JSON, TENSORS, Kind
from .pool import BAD, Mutant, run_all
from .readers import READERS, fuzz
from .seeds import build_seeds

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are limited as on Linux")

SMOKE = {"plan": 20, "measurement": 4, "pieces": 5, "imatrix": 30, "exl2": 5, "cache": 20, "logits": 20}
SMOKE |= {"row-map": 20, "card": 10, "hub": 5}
"""Readers that a default run tries, and on how many mutants."""


@pytest.fixture(scope="module")
def smoke_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    build_seeds(folder, {READERS[name].seeds for name in SMOKE})
    return folder


def broken(reader: str, seeds: Path, scratch: Path, mutants: int, *, seed: int) -> list[str]:
    outcomes = fuzz(reader, seeds, scratch, mutants=mutants, seed=seed)
    assert len(outcomes) == mutants
    assert 2 * sum(outcome.parses for outcome in outcomes) >= mutants
    assert {"ok", "refused"} & {outcome.kind for outcome in outcomes}
    return [f"mutant {each.index}: {each.kind}, {each.detail}" for each in outcomes if each.kind in BAD]


@pytest.mark.parametrize("reader", SMOKE)
def test_a_few_mutants(reader: str, smoke_seeds: Path, tmp_path: Path) -> None:
    assert broken(reader, smoke_seeds, tmp_path, SMOKE[reader], seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_mutants(reader: str, tmp_path: Path) -> None:
    build_seeds(tmp_path / "seeds", [READERS[reader].seeds])
    (tmp_path / "scratch").mkdir()
    assert broken(reader, tmp_path / "seeds", tmp_path / "scratch", 500, seed=0) == []


def test_what_becomes_of_children() -> None:
    def read(number: int) -> tuple[str, str]:
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
        outcomes = run_all(lambda number: Mutant(partial(read, number), number != 0), 6, workers=workers, seconds=0.1)
        kinds = ["ok", "traceback", "hang", "memory", "crash", "ok"]
        assert [(each.index, each.kind) for each in outcomes] == list(enumerate(kinds))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("kind", [JSON, TENSORS], ids=["json", "safetensors"])
def test_a_seed_makes_the_same_mutants(kind: Kind) -> None:
    header = b'{"__metadata__":{"a":"[1]"},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    image = len(header).to_bytes(8, "little") + header + bytes(8)
    data = image if kind is TENSORS else b'{"a": [1, 2.5, {"b": null}], "c": "text", "d": {"e": true}}'
    first, again, other = ([kind.mutated(data, Random(f"{seed}/{n}")) for n in range(50)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sum(mutant != data for mutant in first) > 40
    assert kind.passes(data)
    assert not kind.passes(data[:-9])


@pytest.mark.parametrize("mutated", [mutations.mutated_template, mutations.mutated_card, mutations.mutated_text])
def test_a_seed_makes_the_same_texts(mutated: Callable[[bytes, Random], bytes]) -> None:
    data = b"---\nlicense: mit\ntags: [a]\n---\n{{ a }}{% if b %}{{ c }}{% endif %}"
    first, again = ([mutated(data, Random(n)) for n in range(50)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 25


def test_a_hub_that_lies(tmp_path: Path) -> None:
    # What the Hub's client raises of an answer that it does not expect is anything: KeyError, TypeError, ValueError.
    answers = tmp_path / "answers.json"
    honest = json.loads(answers_of({"config.json": b"{}"}))
    lies = honest | {"GET /api/models/org/name/revision/main": {**honest["GET /api/models/org/name"], "body": [1]}}
    lies["POST /api/repos/create"] = {**honest["POST /api/repos/create"], "body": {"url": 1}}
    upload = Upload(output=tmp_path, repo="org/name", branch=None, files=(("config.json", answers),), left_out=())
    answers.write_text(json.dumps(honest))
    with lying_hub(answers, tmp_path / "cache"):
        assert (resolve_model("org/name") / "config.json").read_bytes() == b"{}"
        assert upload_model(upload).startswith("https://huggingface.co/org/name/commit/")
    answers.write_text(json.dumps(lies))
    with lying_hub(answers, tmp_path / "other"):
        with pytest.raises(CheckpointError, match="could not be downloaded"):
            resolve_model("org/name")
        with pytest.raises(PublishError, match="not uploaded"):
            upload_model(upload)
