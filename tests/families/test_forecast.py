"""Forecasts of time for every family, experts and blocks without attention among them."""

from pathlib import Path

import pytest
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.registry import formats
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.quantize.timing.parts import (
    OutputState,
    evaluation_parts,
    expected_parts,
    measuring_parts,
    output_parts,
)
from bpwise.quantize.timing.shapes import ModelShape

from .models import build_family, family_names

SAMPLE = ("llama", "lfm2_moe")

NAMES = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in family_names()]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_forecast(name: str, tmp_path: Path) -> None:
    model = open_model(build_family(name, tmp_path / "model"))
    shape = ModelShape.of(language_model(model))
    assert sum(shape.blocks.values()) == language_model(model).block_count
    config = MeasureConfig(device="cpu")
    for each in formats().values():
        conversion = each.conversion(model, each.Options())
        counted = [
            *measuring_parts([conversion], config, (8, 64), tmp_path / "work" / "none"),
            *output_parts(conversion, 4.5, config, (8, 64), OutputState(work=tmp_path, exists=False, measures=True)),
            *evaluation_parts(conversion, EvalConfig(device="cpu"), 64, original=True),
        ]
        assert all(part.seconds >= 0 for part in expected_parts(counted))
        assert sum(part.seconds for part in expected_parts(counted)) > 0
