"""Models with vision: the language model is quantized, the rest is carried over under the names of EXL2 readers."""

import json
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.readers.limits import require_reader
from bpwise.errors import UnsupportedModelError
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.run import quantize_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from ..tiny_models import PROCESSORS, VISION, save_with_vision, streamed_logits
from .runs import arguments, exl2

# Where EXL2 readers look: ExLlamaV2 0.3.2, architecture.py (lm_prefix, vt_prefix, mmp_prefix).
PLACES = {
    "gemma3": ("language_model.", "vision_tower.vision_model.", "multi_modal_projector."),
    "llava": ("language_model.", "vision_tower.", "multi_modal_projector."),
    "mistral3": ("language_model.", "vision_tower.", "multi_modal_projector."),
    "qwen2_vl": ("", "visual.", "visual.merger."),
    "qwen2_5_vl": ("", "visual.", "visual.merger."),
}
_OTHERS = ("vision_tower.", "multi_modal_projector.", "visual.")


def in_memory(name: str) -> str:
    """Return the name that Transformers 5 gives in memory to what it writes under older names."""
    if name.startswith(_OTHERS):
        return f"model.{name}"
    if "lm_head" in name:
        return "lm_head.weight"
    return "model.language_model." + name.removeprefix("language_model.").removeprefix("model.")


def whole_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model, found = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    drawn = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    return torch.where(drawn == 10, 11, drawn)  # 10 would stand for an image


@pytest.fixture(scope="module", params=VISION)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    original = save_with_vision(folder / "model", request.param, byte_tokenizer)
    measure = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu")
    quantize_model(original, folder / "out", **arguments(exl2(7.5, head_bits=8, measure=measure)))
    return request.param, original, folder / "out"


def test_streaming_gives_what_transformers_gives(quantized: tuple[str, Path, Path], tokens: torch.Tensor) -> None:
    _, original, _ = quantized
    torch.testing.assert_close(
        streamed_logits(open_model(original), tokens), whole_logits(original, tokens), rtol=1e-4, atol=1e-4
    )


def test_names_in_memory_are_known_too(
    quantized: tuple[str, Path, Path], tokens: torch.Tensor, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    name, original, _ = quantized
    renamed = save_with_vision(tmp_path, name, byte_tokenizer, in_memory)
    assert torch.equal(streamed_logits(open_model(renamed), tokens), streamed_logits(open_model(original), tokens))


def test_the_output_is_the_dense_model_of_its_decoded_weights(
    quantized: tuple[str, Path, Path], tokens: torch.Tensor, tmp_path: Path
) -> None:
    _, original, output = quantized
    dequantize_model(output, tmp_path / "dense")
    dense = whole_logits(tmp_path / "dense", tokens)
    torch.testing.assert_close(streamed_logits(Exl2Model.open(output), tokens), dense, rtol=1e-4, atol=1e-4)
    wanted = whole_logits(original, tokens)
    assert float((dense - wanted).square().mean() / wanted.var()) < 0.01


def test_language_linears_are_quantized_under_the_readers_names(quantized: tuple[str, Path, Path]) -> None:
    name, _, output = quantized
    prefix = PLACES[name][0]
    written = Exl2Model.open(output)
    blocks = VISION[name]["text_config"]["num_hidden_layers"]
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    expected = {f"{prefix}model.layers.{index}.{part}" for index in range(blocks) for part in parts}
    assert set(written.linears) == expected | {f"{prefix}lm_head"}


def test_vision_is_carried_over_bit_for_bit(quantized: tuple[str, Path, Path]) -> None:
    name, original, output = quantized
    _, tower, projector = PLACES[name]
    before = {key: value for key, value in load_file(original / "model.safetensors").items() if key.startswith(_OTHERS)}
    shards = [load_file(file) for file in sorted(output.glob("*.safetensors"))]
    after = {key: value for shard in shards for key, value in shard.items() if key.startswith(_OTHERS)}
    assert len(before) > 10
    assert all(key.startswith((tower, projector)) for key in after)
    assert len(after) == len(before)
    for key, tensor in before.items():
        # Transformers 5 leaves out a name that SigLIP's tensors have in files of the Hub, where readers look.
        same = after[tower + key.removeprefix("vision_tower.") if key.startswith("vision_tower.") else key]
        assert same.dtype == tensor.dtype
        assert torch.equal(same, tensor)


def test_the_image_processor_stands_where_readers_look(quantized: tuple[str, Path, Path]) -> None:
    name, original, output = quantized
    both = [json.loads((folder / "processor_config.json").read_text()) for folder in (original, output)]
    assert both[0] == both[1]
    images = json.loads((output / "preprocessor_config.json").read_text())
    assert images.items() >= PROCESSORS[name].items()
    vision = json.loads((output / "config.json").read_text())["vision_config"]
    if name.startswith("qwen"):
        assert (images["min_pixels"], images["max_pixels"]) == (196, 784)
        assert vision["spatial_patch_size"] == 14
    if name in ("llava", "mistral3"):
        assert vision["rope_theta"] == 10000.0


def test_readers_know_it(quantized: tuple[str, Path, Path]) -> None:
    require_reader(json.loads((quantized[1] / "config.json").read_text()))


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ("vision_config", "clip_vision_model", "a vision part of type 'clip_vision_model', expected pixtral"),
        ("text_config", "qwen2", "a language model of type 'qwen2', expected llama or mistral"),
    ],
)
def test_parts_that_readers_do_not_know(part: str, kind: str, message: str) -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], **VISION["llava"]}
    require_reader(config)
    with pytest.raises(UnsupportedModelError, match=rf"{message}\. Use --force"):
        require_reader({**config, part: {**config[part], "model_type": kind}})
