"""A run that goes on takes the calibration rows that it began with, whatever the model or the Hub would give now."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.registry import formats
from bpwise.errors import BpwiseWarning
from bpwise.measure import calibrated
from bpwise.measure.run import MeasureConfig, measure_to_file
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.progress import Progress, silent
from bpwise.quantize.run import quantize_model
from bpwise.quantize.series import quantize_series
from bpwise.quantize.times import measuring_forecast

from .runs import arguments, exl2, series_arguments
from .test_times import timed

Run = Callable[[Path, Path, MeasureConfig, Progress], None]


def measure(model: Path, place: Path, config: MeasureConfig, progress: Progress) -> None:
    formats_ = {"exl2": exl2().conversion(open_model(model))}
    measure_to_file(model, place / "out", config, formats=formats_, progress=progress)


def quantize(model: Path, place: Path, config: MeasureConfig, progress: Progress) -> None:
    quantize_model(model, place / "out", **arguments(exl2(measure=config)), progress=progress)


def series(model: Path, place: Path, config: MeasureConfig, progress: Progress) -> None:
    quantize_series(model, place / "out", [6.0, 4.5], **series_arguments(exl2(measure=config)), progress=progress)


def config_of(source: str) -> MeasureConfig:
    return MeasureConfig(calibration=CalibrationConfig(source=source, rows=8, row_tokens=32), device="cpu")


def stopped_by(label: str) -> Progress:
    def progress(items: Sequence[Any], step: str) -> Iterable[Any]:
        if step == label:
            raise KeyboardInterrupt
        return items

    return progress


def files_in(place: Path) -> dict[str, bytes]:
    names = (path for path in place.rglob("*") if path.is_file() and not path.name.startswith(("report.", "README")))
    return {str(path.relative_to(place)): path.read_bytes() for path in names}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of the Hub, but for one, which is out of reach."""

    def load(name: str, *_: Any, **__: Any) -> Iterator[dict[str, str]]:
        if name.startswith("codeparrot"):
            raise ConnectionError("no answer")
        return iter([{"text": f"{name} {number} " * 20} for number in range(400)])

    monkeypatch.setattr(datasets, "load_dataset", load)


def forbid_making(patch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("rows were made again")

    patch.setattr(datasets, "load_dataset", never)
    for name in ("write_rows", "build_calibration"):
        patch.setattr(calibrated, name, never)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("run", [measure, quantize, series])
@pytest.mark.parametrize("source", ["self", "mix=2,self", "org/data=2,self"])
def test_a_run_that_goes_on_takes_the_rows_it_began_with(
    run: Run, source: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_warning(words: str | None, place: Path, progress: Progress) -> None:
        if words is None or "mix" not in source:
            run(tiny_model, tmp_path / place, config_of(source), progress)
        else:
            with pytest.warns(BpwiseWarning, match=words):
                run(tiny_model, tmp_path / place, config_of(source), progress)

    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    with_warning("codeparrot.*cannot be reached", Path("whole"), silent)
    with pytest.raises(KeyboardInterrupt):
        with_warning("codeparrot.*cannot be reached", Path("broken"), stopped_by("measure: forward"))
    forbid_making(monkeypatch)
    with_warning(r"calibration\.safetensors: .*in place of codeparrot", Path("broken"), silent)
    assert files_in(tmp_path / "broken") == files_in(tmp_path / "whole")
    left = {path.name for path in tmp_path.glob("broken/out.work/**/*")}
    assert ("calibration.safetensors" in left) == (run is not measure)
    assert not any(name.startswith("calibrate-") for name in left)


def test_a_finished_run_takes_its_rows_again(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(tiny_model, tmp_path, config_of("self"), silent)
    forbid_making(monkeypatch)
    quantize_model(
        tiny_model, tmp_path / "smaller", **arguments(exl2(3.0, measure=config_of("self"))), work=tmp_path / "out.work"
    )


@pytest.mark.parametrize("run", [measure, quantize])
def test_rows_that_are_kept_take_no_time(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = config_of("self")

    def steps() -> set[str]:
        if run is quantize:
            return set(timed(tiny_model, tmp_path / "out", exl2(measure=config)).seconds)
        conversions = {"exl2": formats()["exl2"].conversion(open_model(tiny_model), exl2().options)}
        forecast = measuring_forecast(conversions, config, tmp_path / "out", tmp_path / "out.work", rows=None)
        return {part.step for part in forecast.parts}

    assert {"calibrate", "measure"} <= steps()
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, config, stopped_by("measure: forward"))
    assert "calibrate" not in steps()
    assert "measure" in steps()


@pytest.mark.parametrize(("run", "label"), [(measure, "measure: forward"), (quantize, "quantize: round")])
def test_damaged_rows_are_made_again(run: Run, label: str, tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_model, tmp_path, config_of("self"), silent)
    whole = files_in(tmp_path)
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, config_of("self"), stopped_by(label))
    (kept,) = tmp_path.glob("out.work/**/calibration.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    with pytest.warns(BpwiseWarning, match=r"contents were changed.*They are made again now"):
        run(tiny_model, tmp_path, config_of("self"), silent)
    assert {name: made for name, made in files_in(tmp_path).items() if not name.startswith("first")} == whole
