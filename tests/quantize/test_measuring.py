from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.errors import FormatError
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.progress import silent
from bpwise.quantize import measuring as obtain
from bpwise.quantize.costs import StepClock
from bpwise.quantize.measuring import MEASUREMENT_FILE, load_measurement, load_or_measure


def rows() -> CalibrationSet:
    ids = torch.randint(0, 264, (4, 16), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * 4, description="random ids", adds_bos=False)


def get(model: Path, work: Path, **settings: bool) -> tuple[str, ...]:
    config = MeasureConfig(device="cpu", **settings)
    measured, kept = load_or_measure(
        Checkpoint.open(model), config, work, StepClock(), silent, given=None, calibration=rows()
    )
    assert kept.fingerprint == rows().fingerprint
    return measured.types


def test_what_knows_more_is_taken_and_what_knows_less_is_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install 'bpwise[gguf]'")
    assert get(tiny_model, tmp_path, types=False) == ()
    first = (tmp_path / MEASUREMENT_FILE).read_bytes()
    assert "Q4_0" in get(tiny_model, tmp_path, types=True)
    assert (tmp_path / MEASUREMENT_FILE).read_bytes() != first
    monkeypatch.setattr(obtain, "measure_model", lambda *_: pytest.fail("was done again"))
    assert "Q4_0" in get(tiny_model, tmp_path, types=False)
    assert "Q4_0" in get(tiny_model, tmp_path, types=True)


@pytest.mark.parametrize("damage", ["cut", "other-version"])
def test_a_damaged_measurement_is_made_again(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    get(tiny_model, tmp_path, types=False)
    kept = tmp_path / MEASUREMENT_FILE
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5] if damage == "cut" else whole.replace(b'\\"version\\": 5', b'\\"version\\": 4'))
    assert kept.read_bytes() != whole
    with pytest.warns(
        UserWarning, match=r"measure the model again\. It is measured again|Measure the model again\. It is measured"
    ):
        get(tiny_model, tmp_path, types=False)
    assert kept.read_bytes() == whole


def test_a_measurement_of_other_linears_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path, types=False)
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    for changed in (
        replace(measured, linears=measured.linears[1:]),
        replace(measured, linears=(replace(measured.linears[0], name="x"), *measured.linears[1:])),
    ):
        changed.save(tmp_path / "m.safetensors")
        with pytest.raises(FormatError, match=r"m\.safetensors: the measurement has other linears than"):
            load_measurement(tmp_path / "m.safetensors", Checkpoint.open(tiny_model))


def test_a_measurement_of_other_embeddings_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path, types=False)
    measured, checkpoint = Measurement.load(tmp_path / MEASUREMENT_FILE), Checkpoint.open(tiny_model)
    assert load_measurement(tmp_path / MEASUREMENT_FILE, checkpoint).fingerprint == measured.fingerprint
    table = measured.embedding
    for changes in (
        {"name": "model.embed"},
        {"tokens": table.tokens + 1},
        {"importance": table.importance[1:]},
        {"tied": True},
    ):
        replace(measured, embedding=replace(table, **changes)).save(tmp_path / "m.safetensors")
        with pytest.raises(FormatError, match=r"m\.safetensors: .* other token embeddings .*Expected .* of 264 x 64"):
            load_measurement(tmp_path / "m.safetensors", checkpoint)


def test_a_measurement_that_does_not_describe_its_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path, types=False)
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    provenance = {key: value for key, value in measured.provenance.items() if key != "calibration_text"}
    replace(measured, provenance=provenance).save(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="calibration_text"):
        load_measurement(tmp_path / "m.safetensors", Checkpoint.open(tiny_model))
