"""What is written, read by ExLlamaV2 itself: its reconstructed weights bit for bit, and its logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.conversion import Target
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.options import Exl2Options
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from transformers import LlamaForCausalLM

from ..quantize.runs import arguments

pytestmark = [
    pytest.mark.gpu,
    # Warnings of ExLlamaV2 and of what it imports are not ours to fix.
    pytest.mark.filterwarnings("default"),
]

VOCABULARY = 512


@pytest.fixture
def exllamav2() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        import exllamav2
    except ImportError as error:  # also if its extension was built for another PyTorch
        pytest.skip(f"ExLlamaV2 cannot be imported: {error}")
    return exllamav2


@pytest.fixture(params=["tied-head-6", "untied-head-8", "tied-head-16"])
def quantized(request: pytest.FixtureRequest, exllamav2: Any, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    kind, _, head_bits = request.param.rpartition("-")
    original = make_model(
        "original",
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=kind.startswith("tied"),
        change=_shrink,
    )
    config = QuantizeConfig(
        target=Target(bpw=4.3),
        options=Exl2Options(head_bits=int(head_bits)),
        measure=MeasureConfig(calibration=CalibrationConfig(rows=8, row_tokens=128), device="cpu"),
        evaluate=None,
    )
    return quantize_model(original, tmp_path / "quantized", **arguments(config)).output


@pytest.fixture
def loaded(exllamav2: Any, quantized: Path) -> Any:
    config = exllamav2.ExLlamaV2Config(str(quantized))
    # Its SDPA path leaves the causal mask out (0.3.2, attn.py); plain attention has it and needs no other package.
    config.no_flash_attn = config.no_xformers = config.no_sdpa = True
    config.max_input_len = 256
    model = exllamav2.ExLlamaV2(config)
    model.load()
    yield model
    model.unload()


def test_weights_are_reconstructed_bit_for_bit(quantized: Path, loaded: Any) -> None:
    written = Exl2Model.open(quantized)
    assert len(written.linears) >= 14
    for name in written.linears:
        linear = written.linear(name)
        expected = linear.dequantize().T
        block, _, role = name.rpartition(".")
        # The MLP is held in down_proj's stored order: its rows as they stand, the columns of the others to match.
        if role == "down_proj":
            expected = expected[linear.order]
        elif role in ("gate_proj", "up_proj"):
            expected = expected[:, written.linear(f"{block}.down_proj").order]
        got = loaded.modules_dict[name].get_weight_tensor_dq().cpu()
        assert got.dtype == torch.float16
        # Equal as numbers: a code of zero may decode to -0 in one of them.
        assert torch.equal(got[:, : expected.shape[1]], expected), name
        assert not got[:, expected.shape[1] :].any(), f"{name}: padding"


@pytest.mark.parametrize("tokens", [24, 120], ids=["fused-kernel", "reconstructed"])
def test_logits_are_those_of_the_decoded_model(
    exllamav2: Any, quantized: Path, loaded: Any, tokens: int, tmp_path: Path
) -> None:
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = exllamav2.ExLlamaV2Cache(loaded, max_seq_len=256)
    got = loaded.forward(ids, cache)[0, :, :VOCABULARY].float().cpu()

    dequantize_model(quantized, tmp_path / "dense")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits[0]
    # Float16 keeps 3 digits and the fused kernel sums in float16: a few thousandths over two blocks. A wrong order of
    # rows, a wrong group or scale is off by order 1.
    assert float((got - expected).norm() / expected.norm()) < 0.02


def _shrink(parameters: dict[str, torch.Tensor]) -> None:
    # Weights like a trained model's: with larger ones attention saturates and float16 errors are blown up.
    for parameter in parameters.values():
        if parameter.ndim == 2:
            parameter.mul_(0.25)
