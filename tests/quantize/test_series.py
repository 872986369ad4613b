"""Several bitrates from one measurement: `bpwise quantize --bpw 6.0,4.5`."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.conversion import Exl2Conversion
from bpwise.convert.exl2.format import Exl2Format
from bpwise.convert.exl2.rounding.rounder import rounded_linear
from bpwise.errors import ConfigError
from bpwise.eval.metrics import passes
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.progress import silent
from bpwise.quantize import measuring, series
from bpwise.quantize.series import quantize_series

from . import runs
from .runs import EVALUATION, bpwise, exl2, series_arguments, succeed

TEXT = (*runs.TEXT, *EVALUATION)
NAMES = ["tiny-6.0bpw-6hb-exl2", "tiny-4.5bpw-6hb-exl2"]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("series") / "out"
    with pytest.MonkeyPatch.context() as patch:
        seen = count(patch)
        result = bpwise("quantize", tiny_model, out, "--bpw", "6.0,4.5", *TEXT)
    assert result.exit_code == 0, result.stderr
    begins = [line.split()[0] for line in result.stdout.splitlines()]
    assert begins == ["output", "output", "measurement", "total", "report"]
    # Measured once, and the original run once, in float32 and for the floor.
    assert seen == {
        "measured": 1,
        "original model": 1,
        "original model in bfloat16": 1,
        "original model in float64": 1,
        "quantized model": 2,
    }
    return out


def count(patch: pytest.MonkeyPatch) -> dict[str, int]:
    seen: dict[str, int] = {}

    def counted(function: Callable[..., Any], key: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            name = key(*args)
            seen[name] = seen.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    from bpwise.eval import comparison, original

    patch.setattr(measuring, "measure_checkpoint", counted(measuring.measure_checkpoint, lambda *_: "measured"))
    last_hidden = counted(passes.last_hidden_of_all, lambda model, texts, role, progress: role)
    for module in (passes, comparison, original):
        patch.setattr(module, "last_hidden_of_all", last_hidden)
    return seen


def test_outputs(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [*NAMES, "report.html", "report.json", "report.md"]
    )
    for name, bits in zip(NAMES, (6.0, 4.5), strict=True):
        config = json.loads((finished / name / "config.json").read_text())
        assert config["quantization_config"]["bits"] == bits
        assert (finished / name / "README.md").read_text().startswith("---\n")
        assert (finished / name / "report.md").is_file()
    work = finished.with_name("out.work")
    assert {path.name for path in work.iterdir()} == {"measure", *NAMES}
    assert (work / "measure" / "measurement.safetensors").is_file()
    assert {path.name for path in (work / NAMES[0]).iterdir()} == {
        "calibration.safetensors",
        "finished.json",
        "plan.json",
    }


def test_common_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert [output["name"] for output in report["outputs"]] == NAMES
    assert [output["asked_bpw"] for output in report["outputs"]] == [6.0, 4.5]
    text = (finished / "report.md").read_text()
    for name, output in zip(NAMES, report["outputs"], strict=True):
        own = json.loads((finished / name / "report.json").read_text())["comparison"]["summary"]
        assert output["comparison"]["summary"] == own
        assert output["asked_bpw"] - 0.02 < output["bpw"] <= output["asked_bpw"]
        assert output["broken"] is None
        assert f"| {name} | {output['asked_bpw']:g} | {output['bpw']:.4f} |" in text
    kls = [output["comparison"]["summary"]["kl_nats"]["value"] for output in report["outputs"]]
    assert kls[0] < kls[1]
    page = (finished / "report.html").read_text()
    assert page.count('aria-label="KL divergence against size"') == 1
    for name, output in zip(NAMES, report["outputs"], strict=True):
        assert f"{output['bpw']:.4f} bits per weight, {output['asked_bpw']:g} asked for" in page
        assert name in page


def test_one_of_them_alone_is_the_same(tiny_model: Path, finished: Path, tmp_path: Path) -> None:
    measurement = finished.with_name("out.work") / "measure" / "measurement.safetensors"
    options = ("--bpw", 4.5, "--device", "cpu", "-m", measurement, "--no-eval")
    assert bpwise("quantize", tiny_model, tmp_path / "x", *options).exit_code == 0
    alone, series = (path / "output.safetensors" for path in (tmp_path / "x", finished / NAMES[1]))
    assert alone.read_bytes() == series.read_bytes()


def test_goes_on_where_it_was_cut_off(
    tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", tiny_model, tmp_path / "out", "--bpw", "6.0,4.5", *TEXT)
    rounds = 0

    def progress(items: Sequence[Any], name: str) -> Iterable[Any]:
        nonlocal rounds
        rounds += name == "quantize: round"
        for number, item in enumerate(items):
            if rounds == 2 and name == "quantize: round" and number == 1:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr("bpwise.cli.quantize.RunBar", lambda: progress)
        assert bpwise(*command).exit_code == 130
    assert (tmp_path / "out" / NAMES[0]).is_dir()
    assert not (tmp_path / "out" / NAMES[1]).exists()
    before = (tmp_path / "out" / NAMES[0] / "output.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(measuring, "measure_checkpoint", lambda *_: pytest.fail("was done again"))
    verified: list[str] = []
    verify = Exl2Format.verify
    monkeypatch.setattr(Exl2Format, "verify", lambda self, path: (verified.append(path.name), verify(self, path))[1])
    assert bpwise(*command).exit_code == 0
    assert verified == [NAMES[0]]  # once; the other one is read back where it is written
    assert (tmp_path / "out" / NAMES[0] / "output.safetensors").stat().st_mtime_ns == before
    for name in NAMES:
        assert (tmp_path / "out" / name / "output.safetensors").read_bytes() == (
            finished / name / "output.safetensors"
        ).read_bytes()


def test_a_broken_one_does_not_stop_the_others(
    tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement = finished.with_name("out.work") / "measure" / "measurement.safetensors"
    make = series.make_output

    def spoiled(*args: Any, **named: Any) -> Any:
        linear = rounded_linear(*args, **named)
        return replace(linear, max_scales=(linear.max_scales.float() * 12).half())

    def make_first_badly(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if "6.0bpw" in args[1].name:
                patch.setattr("bpwise.convert.exl2.conversion.rounded_linear", spoiled)
            return make(*args)

    monkeypatch.setattr(series, "make_output", make_first_badly)
    result = bpwise(
        *("quantize", tiny_model, tmp_path / "out", "--bpw", "6.0,4.5", "-m", measurement, "--device", "cpu"),
        *("--eval-rows", 2, "--eval-row-tokens", 32),
    )
    assert result.exit_code == 1
    assert f"1 of 2 outputs are broken and marked so: {NAMES[0]}" in result.stderr
    assert (tmp_path / "out" / NAMES[0] / "BROKEN.md").is_file()
    assert not (tmp_path / "out" / NAMES[0] / "README.md").exists()
    assert (tmp_path / "out" / NAMES[1] / "README.md").is_file()
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"**{NAMES[0]} is broken:**" in text
    assert f"| {NAMES[1]} |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    table = page[page.index('id="models"') : page.index("</table>", page.index('id="models"'))]
    assert re.search(rf"{NAMES[0]}</span><small>broken</small>.*>–<", table)
    assert f"| {NAMES[0]} (broken) | – |" in text


def test_what_is_in_the_way_shows_first(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_checkpoint", lambda *_: pytest.fail("was measured"))
    (tmp_path / NAMES[1]).mkdir()
    (tmp_path / NAMES[1] / "thesis.txt").write_text("the only copy")
    assert "exists already" in bpwise("quantize", tiny_model, tmp_path, "--bpw", "6.0,4.5", *TEXT).stderr
    result = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", "6.0,2.01", *TEXT)
    assert result.exit_code == 1
    assert "from" in result.stderr


@pytest.mark.parametrize(
    "options",
    [("out", "-b", "4,4"), ("out", "-b", "4,five"), ("out", "-b", ""), ("out.gguf", "-b", "4,5")],
    ids=" ".join,
)
def test_usage(options: tuple[str, ...]) -> None:
    assert bpwise("quantize", "model", *options).exit_code == 2


@pytest.mark.parametrize("rates", [[], [4.0, 4.0]], ids=["none", "twice"])
def test_rates(tiny_model: Path, tmp_path: Path, rates: list[float]) -> None:
    with pytest.raises(ConfigError, match="sizes"):
        quantize_series(tiny_model, tmp_path / "out", rates, **series_arguments(exl2()))


def test_dry_run_of_several(tiny_model: Path, tmp_path: Path) -> None:
    result = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", "6.0,4.5", *TEXT, "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    named = {line.split()[1]: lines[place + 2] for place, line in enumerate(lines) if line.startswith("output ")}
    rates = {path: re.search(r"at (\S+) bpw$", line) for path, line in named.items()}
    expected = {str(tmp_path / "out" / name): rate for name, rate in zip(NAMES, ("6", "4.5"), strict=True)}
    assert {path: rate and rate[1] for path, rate in rates.items()} == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rates", ["4.5", "6.0,4.5"], ids=["one", "series"])
def test_looks_and_reads_once(
    rates: str, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return call

    writable = counted("tensors", Exl2Conversion.require_writable)
    monkeypatch.setattr(Exl2Conversion, "require_writable", writable)
    monkeypatch.setattr(measuring, "load_measurement", counted("measurement", measuring.load_measurement))
    monkeypatch.setattr("bpwise.quantize.judge.load_tokenizer", counted("tokenizer", load_tokenizer))
    measurement = finished.with_name("out.work") / "measure" / "measurement.safetensors"
    options = ("--device", "cpu", "-m", measurement, "--eval-rows", 2, "--eval-row-tokens", 32)
    assert bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", rates, *options).exit_code == 0
    assert sorted(seen) == ["measurement", "tensors", "tokenizer"]


@pytest.mark.parametrize("rates", ["4.5", "6.0,4.5"], ids=["one", "series"])
def test_the_model_is_never_read_in_silence(
    rates: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint._fingerprint

    def shown(self: Checkpoint, progress: Any) -> str:
        assert progress is not silent or self.directory != tiny_model
        return read(self, progress)

    monkeypatch.setattr(Checkpoint, "_fingerprint", shown)
    command = ("quantize", tiny_model, tmp_path / "out", "--bpw", rates, *TEXT, "--no-eval")
    for _ in range(2):  # the second finds the output there
        succeed(*command)
    model = next((tmp_path / "out").glob("**/output.safetensors")).parent
    for cache in ((), ("--no-cache",)):
        assert bpwise("eval", tiny_model, model, "-r", 2, "-l", 32, "--device", "cpu", *cache).exit_code == 0
    work = tmp_path / "out.work"
    measurement = next(work.glob("**/measurement.safetensors"))
    assert (
        bpwise("quantize", tiny_model, tmp_path / "new", "--bpw", rates, "-m", measurement, "--dry-run").exit_code == 0
    )
