"""Recipes: what a run writes of its options, and that they make it again."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.errors import ConfigError
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.recipe import read_recipe, recipe_of

from ..fuzz.hub import COMMIT, answers_of, lying_hub
from .runs import bpwise, refused, succeed


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_repeated(tiny_model: Path, here: Path) -> None:
    (here / "notes.txt").write_text("".join(f"Sentence {each} is about {each * each}.\n" for each in range(400)))
    options = (
        "--bpw",
        4.5,
        "--head-bits",
        8,
        "--override",
        "*.o_proj=5:",
        "--rows",
        4,
        "--row-tokens",
        32,
        "--no-eval",
    )
    text = ("--calibration", f"built-in=3,{here / 'notes.txt'}=1", "--device", "cpu")
    succeed("quantize", tiny_model, "out", *options, *text)
    written = (here / "out" / "recipe.yaml").read_text()
    assert written.startswith("# Made with bpwise ")
    assert yaml.safe_load(written) == {
        "format": "exl2",
        "bpw": 4.5,
        "head-bits": 8,
        "override": ["*.o_proj=5:8"],
        "effort": "normal",
        "cache-bits": 16,
        "group-size": 32,
        "shard-size": 8192,
        "calibration": "built-in=3,notes.txt=1",
        "rows": 4,
        "row-tokens": 32,
        "seed": 0,
        "precision": "auto",
        "no-eval": True,
    }
    succeed("quantize", tiny_model, "again", "--config", "out/recipe.yaml", "--device", "cpu")
    for name in ("output.safetensors", "recipe.yaml", "bpwise.json"):
        assert (here / "again" / name).read_bytes() == (here / "out" / name).read_bytes()


def test_what_came_with_a_measurement_or_a_saved_set_is_told(tiny_model: Path, here: Path) -> None:
    (here / "notes.txt").write_text("".join(f"Sentence {each} is about {each * each}.\n" for each in range(400)))
    text = ("--calibration", f"built-in=3,{here / 'notes.txt'}=1", "--rows", 4, "--row-tokens", 32, "--seed", 1)
    options = ("--damping", 0.05, "--precision", "float32")
    output = ("--bpw", 4.5, "--no-eval", "--device", "cpu")
    succeed("measure", tiny_model, "-o", "m.safetensors", *text, *options, "--formats", "exl2", "--device", "cpu")
    succeed("quantize", tiny_model, "first", *output, "-m", "m.safetensors")
    told = yaml.safe_load((here / "first" / "recipe.yaml").read_text())
    expected = {
        "calibration": "built-in=3,notes.txt=1",
        "rows": 4,
        "row-tokens": 32,
        "seed": 1,
        "damping": 0.05,
        "precision": "float32",
    }
    assert expected.items() <= told.items()
    succeed("quantize", tiny_model, "second", "--config", "first/recipe.yaml", "--device", "cpu")
    saved = ("-c", here / "second.work" / "calibration.safetensors", "--seed", 1, *options)
    succeed("quantize", tiny_model, "third", *output, *saved)
    for name in ("output.safetensors", "recipe.yaml", "bpwise.json"):
        assert (here / "second" / name).read_bytes() == (here / "first" / name).read_bytes()
        assert (here / "third" / name).read_bytes() == (here / "first" / name).read_bytes()
    # One seed drew the rows, another the probes: no command says both.
    succeed("quantize", tiny_model, "fourth", *output, "-c", here / "second.work" / "calibration.safetensors")
    fourth = (here / "fourth" / "recipe.yaml").read_text()
    assert "The calibration text is not recorded" in fourth
    assert "calibration" not in yaml.safe_load(fourth)
    assert yaml.safe_load(fourth)["seed"] == 0


def test_the_commit_of_a_model_on_the_hub(tiny_model: Path, here: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    answers = json.loads(answers_of(files, "org/tiny"))
    answers[f"GET /api/models/org/tiny/revision/{COMMIT}"] = answers["GET /api/models/org/tiny/revision/main"]
    (here / "answers.json").write_text(json.dumps(answers))
    options = ("--rows", 4, "--row-tokens", 32, "--no-eval", "--device", "cpu")
    with lying_hub(here / "answers.json", here / "cache"):
        succeed("quantize", "org/tiny", "out", *options)
        assert yaml.safe_load((here / "out" / "recipe.yaml").read_text())["revision"] == COMMIT
    del answers["GET /api/models/org/tiny/revision/main"]  # has moved on
    (here / "answers.json").write_text(json.dumps(answers))
    with lying_hub(here / "answers.json", here / "another-cache"):
        succeed("quantize", "org/tiny", "again", "--config", "out/recipe.yaml", "--device", "cpu")
    assert (here / "again" / "recipe.yaml").read_bytes() == (here / "out" / "recipe.yaml").read_bytes()
    succeed("quantize", tiny_model, "--config", "out/recipe.yaml", "--dry-run", "--device", "cpu")  # not on the Hub
    assert "--revision: has no effect" in refused("quantize", tiny_model, "x", "--revision", COMMIT, "--dry-run")


def test_gguf_and_evaluation(tiny_model: Path, here: Path) -> None:
    base, text = here / "base.gguf", here / "text.txt"
    text.write_text("text")
    overrides = (TypeOverride.parse("blk.0.*=Q8_0,Q6_K"),)
    options = GgufOptions(overrides=overrides, feedback=False, base=base, llama_cpp=here, card=True)
    calibration = CalibrationConfig(source="org/name:config", column="words", rows=2, seed=3)
    config = QuantizeConfig(
        options=options,
        measure=MeasureConfig(calibration=calibration, damping=0.1, seed=3, offload_dir=here),
        evaluate=EvalConfig(text=str(text), allow_calibration_text=True, offload_dir=here),
        base_model="org/Name",
    )
    target = Target(vram_bytes=8 * 10**9, context_tokens=4096)
    assert recipe_of(config, target, Checkpoint.open(tiny_model), calibration.options) == {
        "format": "gguf",
        "vram": 8_000_000_000,
        "context": 4096,
        "override": ["blk.0.*=Q8_0,Q6_K"],
        "no-feedback": True,
        "effort": "normal",
        "split-max-size": 48_000_000_000,
        "card": True,
        "base-model": "org/Name",
        "calibration": "org/name:config",
        "column": "words",
        "rows": 2,
        "seed": 3,
        "damping": 0.1,
        "precision": "auto",
        "eval-text": "text.txt",
        "eval-rows": 16,
        "force-eval-text": True,
    }
    mixture = QuantizeConfig(options=GgufOptions(mixture="Q4_K_M", imatrix=here / "i.dat"), evaluate=None)
    assert recipe_of(mixture, None, Checkpoint.open(tiny_model), None) == {
        "format": "gguf",
        "effort": "normal",
        "split-max-size": 48_000_000_000,
        "type": "Q4_K_M",
        "imatrix": "i.dat",
        "no-eval": True,
    }


@pytest.mark.parametrize(
    ("options", "name", "head"),
    [
        ((), "tiny-5.0bpw-8hb-exl2", 8),
        (("--bpw", 4), "tiny-4.0bpw-8hb-exl2", 8),
        (("--max-size", "150kB", "-hb", 4), "tiny-0.15MB-4hb-exl2", 4),
    ],
    ids=str,
)
def test_the_command_line_goes_first(
    tiny_model: Path, here: Path, options: tuple[object, ...], name: str, head: int
) -> None:
    (here / "r.yaml").write_text("bpw: [5.0]\nhead-bits: 8\nno-eval: true\noverride: ['*.o_proj=5:']\n")
    result = bpwise("quantize", tiny_model, "--config", "r.yaml", *options, "--dry-run")
    assert result.stderr.splitlines()[0] == f"output      {name}"
    assert f"              head bits {head}" in result.stdout.splitlines()


def test_unknown_names_are_refused(here: Path) -> None:
    (here / "r.yaml").write_text("bpw: 4\nbits: 4\nconfig: r.yaml\n")
    result = bpwise("quantize", "./no-model", "--config", "r.yaml")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: r.yaml: unknown options. Got bits, config. Expected long")


@pytest.mark.parametrize(
    "text",
    ["", "- bpw", "bpw: {a: 1}", "bpw: [[4]]", "bpw: 'x", "1: {", "[" * 5000, "a: b\n" * 4000, "\x00", "? [a]\n: b"],
    ids=["empty", "list", "mapping", "nested", "open", "brace", "deep", "long", "control", "key"],
)
def test_what_is_no_recipe(here: Path, text: str) -> None:
    (here / "r.yaml").write_text(text)
    assert "r.yaml: not a recipe. Expected at most 16 KiB of YAML" in refused(
        "quantize", "./no-model", "--config", "r.yaml"
    )


def test_spoiled_bytes_are_refused_or_read_as_text(here: Path) -> None:
    rng, whole = Random(0), b"# Made\nformat: exl2\nbpw: [8, 4.5]\noverride: ['*.o_proj=5:']\nno-eval: &a true\n"
    path, taken = here / "r.yaml", 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b"\x00\xff{}[]&*!%@:-?'\"\n\t ")
        path.write_bytes(data)
        try:
            found: dict[Any, Any] = read_recipe(path)
        except ConfigError:
            continue
        taken += 1
        values = [each for value in found.values() for each in (value if isinstance(value, list) else [value])]
        assert all(isinstance(each, str) for each in (*found, *values))
    assert 30 < taken < 300
