"""What mlx-lm itself makes of our directories: names, shapes and numbers, in every family that it knows."""

from pathlib import Path

import pytest
import torch
from bpwise import quantize_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.mlx.file.model import MlxModel
from bpwise.convert.mlx.grid.schemes import SCHEMES
from bpwise.convert.mlx.options import MlxOptions
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from transformers import PreTrainedTokenizerFast

from ...tiny_models import FAMILIES, save_family, streamed_logits

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: make test-readers")
utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed: make test-readers")

pytestmark = pytest.mark.readers

NOT_ITS_OWN = {
    "qwen2_moe": "mlx-lm knows no blocks without experts in this family",
    "cohere2": "mlx-lm takes the pattern of its windows to be four blocks long",
}
"""Families, or forms of them, that mlx-lm does not run."""

TOKENS = torch.tensor([[256, 5, 77, 130, 9, 44, 200, 3]])


@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - NOT_ITS_OWN.keys()))
def pair(
    request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A tiny model, and what became of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_family(folder / "model", request.param, byte_tokenizer)
    rows = CalibrationConfig(rows=1, row_tokens=32)
    quantize_model(
        model,
        folder / "out",
        bpw=5.0,
        options=MlxOptions(),
        measure=MeasureConfig(calibration=rows, device="cpu"),
        evaluate=False,
    )
    return model, folder / "out"


def test_logits_are_those_of_the_decoded_weights(pair: tuple[Path, Path]) -> None:
    original, output = pair
    expected = streamed_logits(MlxModel.open(output).beside(open_model(original)), TOKENS)
    mx.set_default_device(mx.cpu)
    loaded, _ = utils.load_model(output)
    loaded.set_dtype(mx.float32)  # products of bfloat16 are summed coarsely on a CPU
    found = torch.tensor(loaded(mx.array(TOKENS.numpy())).astype(mx.float32).tolist())
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_greedy_text_is_the_same(pair: tuple[Path, Path]) -> None:
    original, output = pair
    model = MlxModel.open(output).beside(open_model(original))
    mx.set_default_device(mx.cpu)
    loaded, _ = utils.load_model(output)
    loaded.set_dtype(mx.float32)
    ours, theirs = (TOKENS[0, :3].tolist() for _ in range(2))
    for _ in range(5):
        ours.append(int(streamed_logits(model, torch.tensor([ours]))[0, -1].argmax()))
        theirs.append(int(mx.argmax(loaded(mx.array([theirs]))[0, -1]).item()))
    assert ours == theirs


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda each: each.name)
def test_codes_are_packed_as_mlx_packs_its_own(scheme: object, tmp_path: Path) -> None:
    from bpwise.convert.mlx.grid.packing import decode, pack_codes, unpack_codes

    bits, group = scheme.bits, scheme.group_size  # type: ignore[attr-defined]  # a scheme, from a list of them
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(bits))
    words, scales, biases = mx.quantize(mx.array(weight.numpy()), group_size=group, bits=bits)
    stored = torch.tensor([[each - (1 << 32) if each >> 31 else each for each in row] for row in words.tolist()])
    codes = unpack_codes(stored.int(), bits)
    assert torch.equal(pack_codes(codes, bits), stored.int())
    values = torch.tensor(mx.dequantize(words, scales, biases, group_size=group, bits=bits).tolist())
    assert torch.equal(decode(codes, torch.tensor(scales.tolist()), torch.tensor(biases.tolist())), values)
