"""Whole runs on equalized channels: the output stands for the original, and a measurement says what it is of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.equalized.view import equalized
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.options import Exl2Options
from bpwise.eval.comparison import EvalConfig, compare_models
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import measure_model, quantize_model
from transformers import PreTrainedTokenizerFast

from ..saved_decoders import save_decoder
from ..tiny_models import save_family
from .runs import arguments

EQUALIZED = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu", equalize=True)


def rows() -> CalibrationSet:
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(2))
    return CalibrationSet(tokens=ids, origins=("random",) * 4, description="random ids", adds_bos=False)


def test_an_output_stands_for_the_original(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    original = save_family(tmp_path / "m", "qwen2", byte_tokenizer)
    config = QuantizeConfig(
        target=Target(bpw=8.0), options=Exl2Options(head_bits=8), measure=EQUALIZED, evaluate=EvalConfig(device="cpu")
    )
    result = quantize_model(original, tmp_path / "out", **arguments(config))
    written = Exl2Model.open(result.output)
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(written.tensor(name).float(), Checkpoint.open(original).tensor(name).float())
    again = compare_models(Checkpoint.open(original), written, rows(), EvalConfig(device="cpu"))
    assert again.summary.kl_nats.value < 0.01
    assert result.kl is not None
    assert "equalized" in (result.output / "README.md").read_text()


def test_a_measurement_says_what_quantize_does(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    original, file = save_family(tmp_path / "m", "llama", byte_tokenizer), tmp_path / "m.safetensors"
    measure_model(original, file, formats=["exl2"], measure=EQUALIZED)
    config = QuantizeConfig(target=Target(bpw=6.0), options=Exl2Options(head_bits=8), evaluate=None)
    output = quantize_model(original, tmp_path / "out", **arguments(config), measurement=file).output
    name = "model.layers.0.input_layernorm.weight"
    got, plain = Exl2Model.open(output).tensor(name).float(), Checkpoint.open(original).tensor(name).float()
    factors = Measurement.load(file).linears[0].input_factors
    assert factors is not None
    torch.testing.assert_close(got * torch.from_numpy(factors), plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["smollm3", "olmoe"])
def test_families_without_a_table(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path / "m", name)
    checkpoint, config, made = Checkpoint.open(tmp_path / "m"), MeasureConfig(device="cpu"), {}
    for equalize, own in ((False, checkpoint), (True, equalized(checkpoint))):
        made[equalize] = measure_checkpoint(own, rows(), config, [], tmp_path / str(equalize))
    assert made[True].provenance["changes"] == {"equalized": 1}
    assert "changes" not in made[False].provenance
    plain, equal = ({x.name: x for x in made[each].linears} for each in (False, True))
    query = next(x for x in plain if x.endswith("q_proj"))
    factors = equal[query].input_factors
    assert factors is not None
    # The same inputs, over the factors, but for what rounding the weights moves.
    expected = torch.from_numpy(plain[query].input_power / factors**2)
    torch.testing.assert_close(torch.from_numpy(equal[query].input_power), expected, rtol=0.1, atol=0.01)
