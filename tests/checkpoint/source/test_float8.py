import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.file.config import exl2_config
from bpwise.errors import CheckpointError
from safetensors.torch import save_file
from torch import Tensor

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSOR = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}}


def make(directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None, **config: Any) -> Path:
    directory.mkdir(parents=True)
    quantization = {} if settings is None else {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config, **quantization}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def codes(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001


def by_blocks(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    dense = weight.float().clone()
    for row in range(dense.shape[0]):
        for column in range(dense.shape[1]):
            dense[row, column] *= scale[row // rows, column // columns]
    return dense


@pytest.mark.parametrize(
    ("shape", "grid"), [((256, 128), (2, 1)), ((130, 200), (2, 2)), ((5, 3), (1, 1))], ids=["whole", "edges", "small"]
)
def test_blocks(shape: tuple[int, int], grid: tuple[int, int], tmp_path: Path) -> None:
    tensors = {"a.weight": codes(*shape), "a.weight_scale_inv": scales(*grid), "norm.weight": torch.ones(4)}
    model = open_model(make(tmp_path / "m", tensors, BLOCKS, torch_dtype="float32"))
    assert model.names == {"a.weight", "norm.weight"}
    # One rounding of a float32 product on either side: the same number.
    assert torch.equal(
        model.tensor("a.weight"), by_blocks(tensors["a.weight"], tensors["a.weight_scale_inv"], 128, 128)
    )
    assert torch.equal(model.tensor("norm.weight"), torch.ones(4))


def test_as_transformers_dequantizes(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = codes(256, 384), scales(2, 3)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    model = open_model(make(tmp_path / "m", {"a.weight": weight, "a.weight_scale_inv": scale}, BLOCKS))
    assert model.tensor("a.weight").dtype == torch.bfloat16
    assert torch.equal(model.tensor("a.weight"), expected)


@pytest.mark.parametrize(
    ("suffix", "scale"),
    [
        ("_scale", torch.tensor(0.01)),
        ("_scale", torch.tensor([0.01])),
        ("_scale", scales(6, 1)),
        ("_scale", scales(6)),
        ("_scale", scales(6, 1).bfloat16()),
        ("_scale_inv", torch.tensor(0.01)),
    ],
    ids=["tensor", "one", "row", "flat-row", "bfloat16", "inverse"],
)
def test_tensors_and_rows(suffix: str, scale: Tensor, tmp_path: Path) -> None:
    weight = codes(6, 4)
    tensors = {"a.weight": weight, f"a.weight{suffix}": scale, "a.input_scale": torch.tensor(2.0)}
    model = open_model(make(tmp_path / "m", tensors, TENSOR, torch_dtype="float32"))
    assert model.names == {"a.weight"}
    column = scale.float().reshape(-1, 1).expand(6 if scale.numel() > 1 else 1, 1)
    assert torch.equal(model.tensor("a.weight"), weight.float() * column)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    weight, scale = codes(2, 130, 128), scales(2, 2, 1)
    tensors = {"experts.up_proj": weight, "experts.up_proj_scale_inv": scale}
    model = open_model(make(tmp_path / "m", tensors, BLOCKS, torch_dtype="float32"))
    for expert in range(2):
        expected = by_blocks(weight[expert], scale[expert], 128, 128)
        assert torch.equal(model.tensor("experts.up_proj")[expert], expected)
        assert torch.equal(model.entry("experts.up_proj", expert), expected)


@pytest.mark.parametrize("shape", [(), (1,), (2, 6), (2, 6, 1)], ids=["whole", "one", "flat-row", "row"])
def test_one_expert_of_a_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"experts.up_proj": codes(2, 6, 4), "experts.up_proj_scale": scales(*shape)}
    model = open_model(make(tmp_path / "m", tensors, TENSOR, torch_dtype="float32"))
    for expert in range(2):
        assert torch.equal(model.entry("experts.up_proj", expert), model.tensor("experts.up_proj")[expert])


def test_block_structure_of_compressed_tensors(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"block_structure": [2, 4]}}}}
    weight, scale = codes(5, 9), scales(3, 3)
    path = make(tmp_path / "m", {"a.weight": weight, "a.weight_scale": scale}, settings, dtype="float32")
    assert torch.equal(open_model(path).tensor("a.weight"), by_blocks(weight, scale, 2, 4))


def test_sizes_and_config_are_of_the_dense_model(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(128, 128), "a.weight_scale_inv": scales(1, 1), "b": torch.zeros(3)}
    path = make(tmp_path / "m", tensors, BLOCKS, torch_dtype="float16", architectures=["LlamaForCausalLM"])
    model = open_model(path)
    assert model.info("a.weight").dtype == torch.float16
    assert (model.total_bytes, model.parameter_count) == (2 * 128 * 128 + 12, 128 * 128 + 3)
    assert "quantization_config" not in model.config
    written = exl2_config(model.config, {"bits": 4.0}, tied_embeddings=False)
    assert written["quantization_config"] == {"quant_method": "exl2", "bits": 4.0}
    assert model.fingerprint == Checkpoint.open(path, quantized=True).fingerprint
    other = make(tmp_path / "n", {**tensors, "a.weight_scale_inv": 2 * scales(1, 1)}, BLOCKS, torch_dtype="float16")
    assert open_model(other).fingerprint != model.fingerprint


def with_nan() -> Tensor:
    raw = codes(4, 4).view(torch.uint8)
    raw[1, 2] = 0x7F  # the one code of E4M3 (without infinities) that is no number
    return raw.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (with_nan(), scales(1, 1), "NaN or infinite values. Got 1 of 16"),
        (codes(4, 4), torch.tensor([[float("inf")]]), "NaN or infinite values"),
        (codes(4, 4), torch.tensor([[3e38]]), "dequantized, holds NaN or infinite"),
    ],
    ids=["code", "scale", "overflow"],
)
def test_values_that_are_no_numbers(weight: Tensor, scale: Tensor, message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m", {"a.weight": weight, "a.weight_scale_inv": scale}, BLOCKS)
    with pytest.raises(CheckpointError, match=message):
        open_model(path).tensor("a.weight")


@pytest.mark.parametrize(
    ("settings", "shape", "grid", "message"),
    [
        (BLOCKS, (256, 256), (2, 1), r"Got \(2, 1\). Expected \(2, 2\) for blocks of 128 x 128"),
        (BLOCKS, (256, 256), (1, 1), r"Got \(1, 1\). Expected \(2, 2\)"),
        (TENSOR, (6, 4), (3,), r"Got \(3,\). Expected \(\) or \(6, 1\)"),
        (TENSOR, (6, 4), (1, 4), r"Got \(1, 4\)"),
        (TENSOR, (6, 4), None, "there is no a.weight_scale_inv or a.weight_scale"),
        ({**BLOCKS, "weight_block_size": [0, 128]}, (6, 4), (1, 1), "Expected two numbers"),
    ],
    ids=["blocks", "one-for-many", "shards", "columns", "none", "block-size"],
)
def test_scales_that_do_not_fit(
    settings: dict[str, Any], shape: tuple[int, ...], grid: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    tensors = {"a.weight": codes(*shape)} | ({} if grid is None else {"a.weight_scale": scales(*grid)})
    with pytest.raises(CheckpointError, match=message):
        open_model(make(tmp_path / "m", tensors, settings))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantized_models_are_refused(method: str, tmp_path: Path) -> None:
    tensors = {"a.qweight": torch.ones(2, 2, dtype=torch.int32), "b.weight": torch.ones(2, 2)}
    path = make(tmp_path / "m", tensors, {"quant_method": method})
    with pytest.raises(CheckpointError, match="already quantized"):
        open_model(path)


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "gptq"])
def test_settings_left_over_beside_dense_weights(method: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m", {"a.weight": torch.ones(2, 2).bfloat16()}, {"quant_method": method})
    with pytest.raises(CheckpointError, match=r"not quantized\. Remove 'quantization_config' from config.json"):
        open_model(path)


def test_settings_in_the_language_models_part(tmp_path: Path) -> None:
    # As Kimi-K2.5 and others with vision have them.
    path = make(tmp_path / "m", {"a.weight": codes(4, 4), "a.weight_scale_inv": scales(1, 1)}, None)
    parts = {"model_type": "llava", "text_config": {"model_type": "llama", "quantization_config": BLOCKS}}
    (path / "config.json").write_text(json.dumps(parts))
    with pytest.raises(CheckpointError, match="already quantized"):
        Checkpoint.open(path)
    model = open_model(path)
    assert torch.equal(model.tensor("a.weight"), by_blocks(codes(4, 4), scales(1, 1), 128, 128).bfloat16())
    assert "quantization_config" not in model.config["text_config"]
