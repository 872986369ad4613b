"""Forecasts of time: what is counted of a run that goes on, and what commands say of it."""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.conversion import Exl2Conversion
from bpwise.convert.registry import formats
from bpwise.errors import BpwiseError
from bpwise.eval.config import EvalConfig
from bpwise.linalg.work import Rates, Work
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.progress import ExpectedPart, RunForecast, RunProgress, silent
from bpwise.quantize.checks import forecast_outputs
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from bpwise.quantize.series import quantize_series
from bpwise.quantize.times import measuring_forecast, with_times
from bpwise.quantize.timing.forecast import Forecast

from .runs import EVALUATION, TEXT, arguments, bpwise, exl2, gguf, measurement_of, series_arguments, succeed

MEASURE = MeasureConfig(calibration=CalibrationConfig(rows=8, row_tokens=32), device="cpu")
EVALUATE = EvalConfig(rows=2, row_tokens=32, device="cpu")
CONFIG = exl2(measure=MEASURE, evaluate=EVALUATE)


class Told:
    """A progress that is told what a run will take; it ends a run at the item of a step."""

    def __init__(self, stage: str = "", after: int = 0) -> None:
        self.parts: tuple[ExpectedPart, ...] = ()
        self.labels: list[str] = []
        self._end = stage, after

    def expect(self, forecast: RunForecast) -> None:
        assert not self.parts
        self.parts = forecast.parts

    def __call__(self, items: Sequence[Any], step: str) -> Iterable[Any]:
        self.labels.append(step)
        for number, item in enumerate(items):
            if (step, number) == self._end:
                raise KeyboardInterrupt
            yield item

    @property
    def seconds(self) -> dict[str, float]:
        return {part.label: part.seconds for part in self.parts}

    @property
    def done(self) -> dict[str, float]:
        return {part.label: part.done for part in self.parts}


def told(model: Path, output: Path, config: QuantizeConfig = CONFIG, stage: str = "", after: int = 0) -> Told:
    progress = Told(stage, after)
    try:
        quantize_model(model, output, **arguments(config), progress=progress)
    except KeyboardInterrupt:
        assert stage
    return progress


def timed(model: Path, output: Path, config: QuantizeConfig = CONFIG) -> Forecast:
    conversion = config.conversion(open_model(model))
    work = output.with_name(f"{output.name}.work")
    forecasts = forecast_outputs(conversion, {output: config.target}, config.measure, config.evaluate, work)
    return with_times(forecasts, conversion, config, work, known=None)[output]


def test_progress_that_is_told() -> None:
    assert isinstance(Told(), RunProgress)
    assert not isinstance(silent, RunProgress)


def test_the_forecast_has_the_seconds_of_each_step(tiny_model: Path, tmp_path: Path) -> None:
    forecast = timed(tiny_model, tmp_path / "out")
    assert list(forecast.seconds) == ["measure", "round", "write", "evaluate"]
    assert all(seconds > 0 for seconds in forecast.seconds.values())
    assert sum(forecast.seconds.values()) == pytest.approx(sum(part.seconds for part in forecast.parts))
    assert "evaluate" not in timed(tiny_model, tmp_path / "out", exl2(measure=MEASURE)).seconds


def test_nothing_is_timed_for_the_library(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(Rates, "learn", never)
    quantize_model(tiny_model, tmp_path / "out", **arguments(exl2(measure=MEASURE)))
    conversion = CONFIG.conversion(open_model(tiny_model))
    forecasts = forecast_outputs(conversion, {tmp_path / "new": CONFIG.target}, MEASURE, EVALUATE, tmp_path / "work")
    assert [each.seconds for each in forecasts.values()] == [{}]


def test_every_label_of_a_run_is_expected(tiny_model: Path, tmp_path: Path) -> None:
    progress = told(tiny_model, tmp_path / "out")
    assert set(progress.labels) <= {part.label for part in progress.parts}
    # In their order, so that none that is still to come is taken to be over.
    places = iter(part.label for part in progress.parts)
    assert all(label in places for label in progress.labels)


@pytest.mark.parametrize(
    ("stage", "after", "done"),
    [
        (
            "measure: backward, curves",
            1,
            {"measure: forward": 1.0, "measure: head": 1.0, "measure: backward, curves": 0.5},
        ),
        ("quantize: round", 1, {"quantize: round": 0.5}),
    ],
    ids=["measuring", "rounding"],
)
def test_a_run_that_goes_on_counts_what_is_left(
    stage: str, after: int, done: dict[str, float], tiny_model: Path, tmp_path: Path
) -> None:
    first = told(tiny_model, tmp_path / "out", stage=stage, after=after)
    assert set(first.done.values()) == {0.0}
    again = told(tiny_model, tmp_path / "out")
    for label, share in done.items():
        assert again.done[label] == share
        assert again.seconds[label] == pytest.approx(first.seconds[label] * (1 - share), rel=0.2)
    assert ("measure: forward" in again.seconds) == stage.startswith("measure")
    assert again.seconds["evaluate: logits"] == pytest.approx(first.seconds["evaluate: logits"])


def test_other_options_measure_anew(tiny_model: Path, tmp_path: Path) -> None:
    told(tiny_model, tmp_path / "out", stage="quantize: round")
    assert "measure" not in timed(tiny_model, tmp_path / "out").seconds
    for change in ({"seed": 1}, {"calibration": CalibrationConfig(rows=4, row_tokens=32)}, {"damping": 0.3}):
        other = exl2(measure=MeasureConfig(**{"calibration": MEASURE.calibration, "device": "cpu", **change}))
        assert "measure" in timed(tiny_model, tmp_path / "out", other).seconds
    (tmp_path / "out.work" / "measurement.safetensors").write_bytes(b"damaged")
    assert "measure" not in timed(tiny_model, tmp_path / "out").seconds  # all of its artifacts are there
    for store in (tmp_path / "out.work").glob("measure-*"):
        shutil.rmtree(store)
    assert "measure" in timed(tiny_model, tmp_path / "out").seconds


def test_a_finished_output_is_only_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    told(tiny_model, tmp_path / "out", stage="evaluate: logits")
    assert list(timed(tiny_model, tmp_path / "out").seconds) == ["evaluate"]


def test_a_measurement_that_is_given(tiny_model: Path, tmp_path: Path) -> None:
    told(tiny_model, tmp_path / "first")
    measurement = tmp_path / "m.safetensors"
    shutil.copy(measurement_of(tmp_path / "first"), measurement)
    progress = Told()
    quantize_model(
        tiny_model, tmp_path / "out", **arguments(exl2(measure=MEASURE)), measurement=measurement, progress=progress
    )
    assert {part.step for part in progress.parts} == {"round", "write"}
    assert Measurement.load(measurement)


def test_a_series_measures_and_runs_the_original_once(tiny_model: Path, tmp_path: Path) -> None:
    progress = Told()
    quantize_series(tiny_model, tmp_path / "out", [8.0, 4.5], **series_arguments(CONFIG), progress=progress)
    labels = [part.label for part in progress.parts]
    assert [labels.count(f"measure: {each}") for each in ("forward", "head", "backward, curves")] == [1, 1, 1]
    assert labels.count("quantize: round") == labels.count("evaluate: quantized model") == 2
    assert labels.count("evaluate: original model") == 1
    (tmp_path / "out" / "report.md").unlink()
    again = Told()
    quantize_series(tiny_model, tmp_path / "out", [8.0, 4.5, 3.0], **series_arguments(CONFIG), progress=again)
    assert [part.step for part in again.parts].count("round") == 1
    assert "measure" not in {part.step for part in again.parts}
    assert [part.label for part in again.parts].count("evaluate: quantized model") == 1  # the others have reports
    assert [part.label for part in again.parts].count("evaluate: original model") == 1


def test_mixtures_are_not_measured(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    conversion = gguf(mixture="Q8_0").conversion(open_model(tiny_model))
    forecasts = forecast_outputs(conversion, {tmp_path / "o.gguf": None}, MEASURE, EVALUATE, tmp_path / "work")
    config = gguf(mixture="Q8_0", measure=MEASURE, evaluate=EVALUATE)
    forecast = with_times(forecasts, conversion, config, tmp_path / "work", known=None)[tmp_path / "o.gguf"]
    assert list(forecast.seconds) == ["prepare", "write", "evaluate"]


def test_formats_without_tools_are_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    conversions = {"exl2": CONFIG.conversion(open_model(tiny_model))}
    alone = measuring_forecast(conversions, MEASURE, tmp_path / "new", tmp_path / "work", rows=None)
    assert {part.step for part in alone.parts} == {"measure"}

    class Without(Exl2Conversion):
        def require_support(self) -> None:
            raise BpwiseError("a tool is missing")

    refused = Without(open_model(tiny_model), CONFIG.options)
    assert (
        measuring_forecast({**conversions, "other": refused}, MEASURE, tmp_path / "new", tmp_path / "work", rows=None)
        == alone
    )
    assert measuring_forecast({}, MEASURE, tmp_path / "new", tmp_path / "work", rows=None).parts == ()


def test_a_dry_run_says_how_long(tiny_model: Path, tmp_path: Path) -> None:
    printed = succeed("quantize", tiny_model, tmp_path / "out", "--bpw", "6.0,4.5", *TEXT, *EVALUATION, "--dry-run")
    lines = printed.splitlines()[-5:]
    pattern = r"( {14}|time {10})(measure|round|write|evaluate|in all) +\d+\.\d min(, roughly, on this machine)?"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert [line[14:23].strip() for line in lines] == ["measure", "round", "write", "evaluate", "in all"]
    assert lines[0].startswith("time")


def test_runs_begin_with_what_they_take(tiny_model: Path, tmp_path: Path) -> None:
    result = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, *EVALUATION)
    pattern = (
        r"expected    \d+\.\d min \(measure .* min, round .* min, write .* min, evaluate .* min\), "
        r"at most \S+ [MG]B of memory and \S+ [kM]B in the work directory, roughly"
    )
    about, expected, *_ = result.stderr.splitlines()
    assert about.startswith("tiny (llama, 2 blocks, ")
    assert re.fullmatch(pattern, expected)
    measured = bpwise("measure", tiny_model, "-o", tmp_path / "m.safetensors", "--formats", "exl2", *TEXT)
    assert re.fullmatch(r"expected    \d+\.\d min \(measure \d+\.\d min\), roughly", measured.stderr.splitlines()[1])


@pytest.mark.parametrize("name", list(formats()))
def test_work_of_formats_can_be_timed(name: str, tiny_model: Path, timed: None) -> None:
    options = formats()[name].Options()
    work = formats()[name].conversion(open_model(tiny_model), options).work(4.5)
    cpu = torch.device("cpu")
    both = work.curves(256, [64, 32], cpu) + work.linear(256, 64) + work.curves(48, [64], cpu) + work.linear(48, 64)
    assert 0 < Rates(cpu).seconds(both) < 10
    assert isinstance(work.once(cpu) + work.decoded(8) + work.written(8) + work.preparing(8, 8), Work)
