import json
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.errors import CheckpointError
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

NAME = "mlp.experts.gate_up_proj"
BIAS = torch.arange(6, dtype=torch.bfloat16).view(2, 3)


def make(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir()
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = {"model_type": "gpt_oss", "num_local_experts": 2, "quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def packed(first_scale: int, last_scale: int) -> dict[str, Tensor]:
    """Two experts with three outputs and 64 inputs: every byte of codes, and scales from a range."""
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), generator=rng, dtype=torch.uint8)
    scales = torch.randint(first_scale, last_scale + 1, (2, 3, 2), generator=rng, dtype=torch.uint8)
    return {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, f"{NAME}_bias": BIAS}


@pytest.mark.parametrize(("first", "last"), [(110, 130), (0, 3), (250, 251)], ids=["usual", "tiny", "huge"])
def test_as_transformers_dequantizes(first: int, last: int, tmp_path: Path) -> None:
    tensors = packed(first, last)
    model = open_model(make(tmp_path / "m", tensors))
    expected = convert_moe_packed_tensors(tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"])
    assert model.names == {NAME, f"{NAME}_bias"}
    assert model.info(NAME).dtype == torch.bfloat16
    assert model.info(NAME).size_bytes == 2 * 2 * 64 * 3
    assert model.shape(NAME) == tuple(expected.shape) == (2, 64, 3)
    assert torch.equal(model.tensor(NAME), expected)
    for expert in range(2):
        assert torch.equal(model.entry(NAME, expert), expected[expert])
        assert torch.equal(model.entry(f"{NAME}_bias", expert), BIAS[expert])
    assert torch.equal(model.tensor(f"{NAME}_bias"), BIAS)
    assert "quantization_config" not in model.config


@pytest.mark.parametrize(("scale", "message"), [(255, "NaN or infinite"), (254, "NaN or infinite")], ids=["nan", "inf"])
def test_values_that_are_no_numbers(scale: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_model(make(tmp_path / "m", packed(scale, scale))).tensor(NAME)


def test_scales_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    tensors = packed(120, 130)
    short = {**tensors, f"{NAME}_scales": tensors[f"{NAME}_scales"][:, :2].contiguous()}
    with pytest.raises(CheckpointError, match=r"Got \(2, 2, 2\)"):
        open_model(make(tmp_path / "short", short))
    del tensors[f"{NAME}_scales"]
    with pytest.raises(CheckpointError, match="gate_up_proj_scales beside it"):
        open_model(make(tmp_path / "none", tensors))
