"""The same input, seed, device and number of threads make the same bytes, whatever else surrounds a run."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.engine import gate
from bpwise.convert.registry import formats

from ..conftest import Converted
from ..crash.commands import timeless
from ..crash.disk import Tree, tree_of
from ..crash.test_points import differences
from ..quantize.runs import succeed
from .environments import PLAIN, STRANGE, VARIED, Environment, Model, run
from .threads import differences as number_differences
from .threads import plan_differences

THREADS = (2, 3)
CUT_OFF = (1, 4, 8, 12)
"""Resume artifacts after which a run is cut off: of its text, blocks forward, the head, and blocks backward."""


@pytest.fixture(scope="module")
def model(converted: dict[str, Converted]) -> Model:
    return Model(converted["llama"].directory, converted["llama"].file)


@pytest.fixture(scope="module")
def expected(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return run(model, tmp_path_factory.mktemp("undisturbed"), PLAIN)


@pytest.fixture(scope="session")
def turkish(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Has a locale whose numbers have decimal commas, and whose letters i are four, if the system can make it."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        return {}
    subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", folder / "tr_TR.UTF-8"], check=False)
    return {"LOCPATH": str(folder)} if any(folder.iterdir()) else {}


def test_all_formats_are_tried(model: Model) -> None:
    outputs = {Path(command[2]).suffix for command in model.commands("") if command[0] == "quantize"}
    assert outputs == {each.suffix for each in formats().values()}


def test_bytes_do_not_depend_on_what_surrounds_a_run(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turkish: dict[str, str]
) -> None:
    # This process is one environment; a strange one begins, is cut off, and another one goes on.
    monkeypatch.setattr(gate, "_library", lambda: None)
    monkeypatch.setattr(GgufCurves, "warm_up", lambda _: None)
    here = tmp_path / "here"
    here.mkdir()
    for command in model.commands(f"{here}/"):
        succeed(*command)
    begun = run(model, tmp_path / "there", STRANGE, saves=CUT_OFF[2])
    assert "m.safetensors.work" in begun
    other = Environment({"LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "1", **turkish}, folder=STRANGE.folder)
    assert differences(run(model, tmp_path / "there", other), timeless(tree_of(here))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_one_thing_at_a_time(name: str, model: Model, expected: Tree, tmp_path: Path, turkish: dict[str, str]) -> None:
    environment = replace(VARIED[name], variables={**VARIED[name].variables, **turkish})
    assert differences(run(model, tmp_path, environment), expected) == ""
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / environment.folder).rglob("*") if path.is_file()}
    assert modes == {0o666 & ~environment.umask}


@pytest.mark.slow
@pytest.mark.parametrize("saves", CUT_OFF)
def test_cut_off_and_gone_on_elsewhere(saves: int, model: Model, expected: Tree, tmp_path: Path) -> None:
    run(model, tmp_path, replace(STRANGE, folder="run"), saves=saves)
    assert differences(run(model, tmp_path, PLAIN), expected) == ""


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS)
def test_as_many_threads_make_the_same_bytes(threads: int, model: Model, tmp_path: Path) -> None:
    first = run(model, tmp_path / "first", PLAIN, threads=threads)
    assert differences(run(model, tmp_path / "second", STRANGE, threads=threads), first) == ""


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS)
def test_plans_are_those_of_one_thread(threads: int, model: Model, expected: Tree, tmp_path: Path) -> None:
    run(model, tmp_path, PLAIN, threads=threads, only=("measure",))
    measurement, single = tmp_path / PLAIN.folder / "m.safetensors", tmp_path / "single.safetensors"
    content = expected["m.safetensors"]
    assert isinstance(content, bytes)
    single.write_bytes(content)
    # Sums of float32 in another order; sketches of how outputs act together are kept in float16.
    found = number_differences(single, measurement)
    assert found.integers == 0
    assert found.damage < 1e-5
    assert found.others < 4 * 2**-11
    for name in formats():
        assert plan_differences(single, measurement, name).plans == 0
