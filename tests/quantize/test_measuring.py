import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.errors import FormatError
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.progress import silent
from bpwise.quantize import measuring as obtain
from bpwise.quantize.inspect import inspect_path
from bpwise.quantize.measuring import MEASUREMENT_FILE, load_measurement, load_or_measure
from bpwise.quantize.timing.costs import StepClock

from ..measured import gguf_curves_of


def rows() -> CalibrationSet:
    ids = torch.randint(0, 264, (4, 16), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * 4, description="random ids", adds_bos=False)


def get(model: Path, work: Path, *, types: bool = False, group_size: int = 32) -> set[str]:
    curves = [Exl2Curves(group_size), *(gguf_curves_of(model) if types else [])]
    measured, kept = load_or_measure(
        Checkpoint.open(model),
        MeasureConfig(device="cpu"),
        lambda: curves,
        work,
        StepClock(),
        silent,
        given=None,
        calibration=rows(),
    )
    assert kept.fingerprint == rows().fingerprint
    return set(measured.curves)


def test_what_knows_more_is_taken_and_what_knows_less_is_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    assert get(tiny_model, tmp_path) == {"exl2"}
    first = (tmp_path / MEASUREMENT_FILE).read_bytes()
    assert get(tiny_model, tmp_path, types=True) == {"exl2", "gguf"}
    assert (tmp_path / MEASUREMENT_FILE).read_bytes() != first
    with monkeypatch.context() as patch:
        patch.setattr(obtain, "measure_checkpoint", lambda *_: pytest.fail("was done again"))
        assert get(tiny_model, tmp_path) == get(tiny_model, tmp_path, types=True) == {"exl2", "gguf"}
    assert get(tiny_model, tmp_path, group_size=64) == {"exl2"}  # groups of 32 do not serve


@pytest.mark.parametrize("damage", ["cut", "other-version"])
def test_a_damaged_measurement_is_made_again(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    get(tiny_model, tmp_path)
    kept = tmp_path / MEASUREMENT_FILE
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5] if damage == "cut" else whole.replace(b'\\"version\\": 7', b'\\"version\\": 5'))
    assert kept.read_bytes() != whole
    with pytest.warns(UserWarning, match=r"[Mm]easure the model again( with `bpwise measure`)?\. It is measured again"):
        get(tiny_model, tmp_path)
    assert kept.read_bytes() == whole


def test_a_measurement_of_other_linears_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path)
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    for changed in (
        replace(measured, linears=measured.linears[1:], curves={}),
        replace(measured, linears=(replace(measured.linears[0], name="x"), *measured.linears[1:]), curves={}),
    ):
        changed.save(tmp_path / "m.safetensors")
        with pytest.raises(FormatError, match=r"m\.safetensors: the measurement has other linears than"):
            load_measurement(tmp_path / "m.safetensors", Checkpoint.open(tiny_model))


def test_a_measurement_of_other_embeddings_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path)
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
    get(tiny_model, tmp_path)
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    provenance = {key: value for key, value in measured.provenance.items() if key != "calibration_text"}
    replace(measured, provenance=provenance).save(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="calibration_text"):
        load_measurement(tmp_path / "m.safetensors", Checkpoint.open(tiny_model))


@pytest.mark.parametrize("change", ["none", "other"])
def test_a_measurement_of_other_blocks_is_refused(tiny_model: Path, tmp_path: Path, change: str) -> None:
    get(tiny_model, tmp_path)
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    provenance = json.loads(json.dumps(measured.provenance))
    if change == "none":
        del provenance["structure"]
    else:
        provenance["structure"]["kinds"][0]["groups"][1]["scale"] = 0.5
    replace(measured, provenance=provenance).save(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"m\.safetensors: .* describes different blocks .* version of Transf"):
        load_measurement(tmp_path / "m.safetensors", Checkpoint.open(tiny_model))


def test_a_measurement_tells_what_blocks_are_made_of(tiny_model: Path, tmp_path: Path) -> None:
    get(tiny_model, tmp_path)
    facts = inspect_path(tmp_path / MEASUREMENT_FILE).facts
    assert [fact for fact in facts if "blocks" in fact] == ["structure: 2 blocks of one kind, with 6 input groups"]
    measured = Measurement.load(tmp_path / MEASUREMENT_FILE)
    replace(measured, provenance={"structure": {"blocks": 1}}).save(tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"m\.safetensors: provenance: structure"):
        inspect_path(tmp_path / "m.safetensors")
