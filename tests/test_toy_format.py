"""A third format, registered and taken through everything without touching a line elsewhere."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpwise
import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.conversion import Target
from bpwise.convert.dense import dequantize_model
from bpwise.convert.opening import open_any, verify_model
from bpwise.convert.registry import load_plan, registered
from bpwise.errors import WorkDirectoryError
from bpwise.eval.comparison import EvalConfig, evaluate_models
from bpwise.measure.run import MeasureConfig, measure_to_file
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.inspect import inspect_path
from bpwise.quantize.planning.plans import make_plan
from bpwise.quantize.run import quantize_model
from bpwise.quantize.series import quantize_series

from . import toy_format
from .quantize.runs import arguments, series_arguments
from .toy_format import FORMAT, ToyOptions

ROOT = Path(bpwise.__file__).parent
CALIBRATION = CalibrationConfig(rows=4, row_tokens=64)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with registered(FORMAT):
        yield


def config(bpw: float = 10.0, *, evaluate: bool = False, **options: Any) -> QuantizeConfig:
    return QuantizeConfig(
        target=Target(bpw=bpw),
        options=ToyOptions(**options),
        measure=MeasureConfig(calibration=CALIBRATION, device="cpu"),
        evaluate=EvalConfig(rows=2, row_tokens=64, device="cpu") if evaluate else None,
    )


def test_is_complete_in_150_lines() -> None:
    assert len(Path(toy_format.__file__).read_text(encoding="utf-8").splitlines()) <= 150


def test_goes_the_whole_way(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = quantize_model(tiny_model, output, **arguments(config(evaluate=True)))
    assert result.comparison is not None
    assert 0 < result.comparison.summary.kl_nats.value < 0.01
    assert result.plan.bpw <= 10
    assert result.plan.shares()["16 bits"] == pytest.approx((result.plan.bpw - 8) / 8)
    assert {path.name for path in output.iterdir()} >= {"toy.safetensors", "README.md", "report.html", "tokenizer.json"}
    # Independent of the format: eight bits of the largest weight of every output, by hand.
    original, model = open_model(tiny_model), open_any(output)
    rounded = [cost.name for cost in result.plan.costs() if cost.bpw == 8]
    assert rounded
    for name in rounded:
        weight = model.tensor(f"{name}.weight")
        steps = weight / (weight.abs().amax(dim=1, keepdim=True) / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert (weight - original.tensor(f"{name}.weight")).abs().max() < 0.2
    verified = verify_model(output)
    assert verified.quantized == len(model.stored_bpw())
    described = inspect_path(output)
    assert described.kind == "toy model"
    assert inspect_path(tmp_path / "out.work" / "plan.json").kind == "plan for toy"
    assert load_plan(tmp_path / "out.work" / "plan.json") == result.plan
    dequantize_model(output, tmp_path / "dense")
    again = evaluate_models(output, tmp_path / "dense", EvalConfig(rows=2, row_tokens=64, device="cpu"))
    assert again.summary.kl_nats.value < 1e-4  # float16 of the same weights


def test_plans_from_a_measurement_alone(tiny_model: Path, tmp_path: Path) -> None:
    measured = measure_to_file(
        tiny_model,
        tmp_path / "m.safetensors",
        MeasureConfig(calibration=CALIBRATION),
        formats={"toy": FORMAT.conversion(open_model(tiny_model), ToyOptions())},
    )
    plans = [make_plan(measured, bpw=bpw, options=ToyOptions()) for bpw in (8.0, 12.0, 16.0)]
    assert [plan.bpw <= bpw for plan, bpw in zip(plans, (8, 12, 16), strict=True)] == [True] * 3
    damages = [plan.damage_nats or 0 for plan in plans]
    assert damages[0] > damages[1] > damages[2] == 0
    kept = make_plan(measured, bpw=12.0, options=ToyOptions(keep="v_proj"))
    assert {cost.bpw for cost in kept.costs() if cost.name.endswith("v_proj")} == {16.0}


def test_a_series(tiny_model: Path, tmp_path: Path) -> None:
    result = quantize_series(tiny_model, tmp_path / "out", [8.0, 12.0], **series_arguments(config()))
    assert [output.bpw == pytest.approx(bpw, abs=0.5) for output, bpw in zip(result.outputs, (8, 12), strict=True)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        f"{tiny_model.name}-12.0bpw-toy",
        f"{tiny_model.name}-8.0bpw-toy",
    ]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_killed_run_goes_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_model(tiny_model, tmp_path / "whole", **arguments(config()))
    save, saved = ResumeStore.save, []

    def dying(store: ResumeStore, artifact: str, tensors: dict[str, torch.Tensor]) -> None:
        save(store, artifact, tensors)
        saved.append(artifact)
        if artifact == "state-0":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ResumeStore, "save", dying)
        with pytest.raises(Killed):
            quantize_model(tiny_model, tmp_path / "out", **arguments(config()))
    before = set(saved)
    saved.clear()
    monkeypatch.setattr(
        ResumeStore, "save", lambda store, name, tensors: (saved.append(name), save(store, name, tensors))
    )
    again = quantize_model(tiny_model, tmp_path / "out", **arguments(config()))
    assert not before & set(saved)  # nothing was done twice
    names = [path / "toy.safetensors" for path in (whole.output, again.output)]
    assert names[0].read_bytes() == names[1].read_bytes()
    quantize_model(tiny_model, tmp_path / "out", **arguments(config()))  # finished: nothing is done
    with pytest.raises(WorkDirectoryError, match="not the output of this run"):
        quantize_model(tiny_model, tmp_path / "out", **arguments(config(12.0)))


CLI = """
import sys
sys.path.insert(0, {tests!r})
from bpwise.convert import registry
import toy_format
registry._FORMATS["toy"] = toy_format.FORMAT
from bpwise.cli import main
sys.argv = ["bpwise", *{args!r}]
main()
"""


def run_cli(args: list[str]) -> Any:
    # In a process of its own: commands take their options from the formats that there are when they are imported.
    import subprocess
    import sys

    code = CLI.format(tests=str(Path(toy_format.__file__).parent), args=args)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_line_has_its_options(tiny_model: Path, tmp_path: Path) -> None:
    helped = run_cli(["quantize", "--help"])
    assert "--toy-keep" in helped.stdout
    assert "exl2|gguf|mlx|toy" in helped.stdout
    output = tmp_path / "out"
    args = [
        "quantize",
        str(tiny_model),
        str(output),
        "--format",
        "toy",
        "--bpw",
        "12",
        "-r",
        "4",
        "-l",
        "64",
        "--no-eval",
    ]
    done = run_cli([*args, "--toy-keep", "v_proj"])
    assert done.returncode == 0, done.stderr
    bpw = json.loads((output / "toy.json").read_text())["bpw"]
    assert {bits for name, bits in bpw.items() if name.endswith("v_proj")} == {16.0}
    refused = run_cli([*args, "--head-bits", "8"])
    assert refused.returncode == 2
    assert "--head-bits has no effect" in refused.stderr
    refused = run_cli(["quantize", str(tiny_model), str(tmp_path / "x"), "--bpw", "4", "--toy-keep", "v_proj"])
    assert refused.returncode == 2
    assert "for Toy only" in refused.stderr


WORD = re.compile("exl2|gguf|ggml", re.IGNORECASE)
ALLOWED = {
    Path("__init__.py"),  # public names of formats' options
    Path("convert/registry.py"),
}


def code_words(path: Path) -> list[str]:
    """Names and strings of a module's code that name a format; documentation and help texts aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, and those under constants
            texts |= {id(each.value) for each in body if isinstance(each, ast.Expr)}
        if isinstance(node, ast.keyword) and node.arg in ("help", "examples"):
            texts |= {id(each) for each in ast.walk(node.value)}
    found = []
    for node in ast.walk(tree):
        if id(node) in texts:
            continue
        words = [getattr(node, "value", None)] if isinstance(node, ast.Constant) else []
        words += [getattr(node, key, None) for key in ("id", "attr", "name", "module", "arg", "asname")]
        found += [word for word in words if isinstance(word, str) and WORD.search(word)]
    return found


MODULES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] in ("cli", "quantize", "eval", "convert", "measure", "linalg", "checkpoint")
    or path.parent == ROOT
]
OUTSIDE = [
    path.relative_to(ROOT)
    for path in MODULES
    if path.relative_to(ROOT).parts[:2] not in (("convert", "exl2"), ("convert", "gguf"))
    and path.relative_to(ROOT) not in ALLOWED
]


@pytest.mark.parametrize("path", OUTSIDE, ids=str)
def test_no_code_outside_names_a_format(path: Path) -> None:
    assert code_words(ROOT / path) == []


def test_names_of_formats_are_found() -> None:
    # The test above would pass if it saw nothing.
    assert "exl2" in code_words(ROOT / "convert/registry.py")
    assert len(OUTSIDE) > 100
