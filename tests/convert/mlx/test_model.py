"""MLX directories read back, against a decoder of the test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.mlx.file.model import MlxModel
from bpwise.convert.opening import verify_model
from bpwise.convert.registry import format_of
from bpwise.errors import BpwiseError, FormatError
from safetensors.torch import load_file, save_file

SCHEMES = {"model.embed_tokens": (6, 32), "model.layers.0.mlp.down_proj": (3, 64)}
SHAPES = {"model.embed_tokens": (12, 32), "model.layers.0.mlp.down_proj": (8, 128)}


def packed(codes: list[int], bits: int) -> list[int]:
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory as other programs write it, and the weights that it stands for."""
    rng = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.randn(32, generator=rng).bfloat16()}
    weights = {"model.norm.weight": tensors["model.norm.weight"]}
    for module, (bits, group) in SCHEMES.items():
        rows, channels = SHAPES[module]
        codes = torch.randint(0, 1 << bits, (rows, channels), generator=rng)
        scales, biases = (torch.randn(rows, channels // group, generator=rng).bfloat16() for _ in range(2))
        words = torch.tensor([packed(row, bits) for row in codes.tolist()], dtype=torch.int32)
        tensors |= {f"{module}.weight": words.view(torch.uint32), f"{module}.scales": scales}
        tensors[f"{module}.biases"] = biases
        spread = [x.float().repeat_interleave(group, dim=1) for x in (scales, biases)]
        weights[f"{module}.weight"] = codes * spread[0] + spread[1]
    directory = tmp_path / "theirs"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "mlx"})
    settings = {"group_size": 64, "bits": 3, "model.embed_tokens": {"group_size": 32, "bits": 6, "mode": "affine"}}
    config = {"model_type": "llama", "tie_word_embeddings": True, "quantization": settings}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory, weights


def test_a_model_of_others_decodes_to_its_weights(theirs: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, weights = theirs
    found = format_of(directory)
    assert found is not None
    assert found.name == "mlx"
    model = MlxModel.open(directory)
    assert model.names == weights.keys()
    assert "quantization" not in model.config
    for name, weight in weights.items():
        assert model.shape(name) == weight.shape
        assert torch.equal(model.tensor(name).float(), weight.float()), name
    assert model.stored_bpw() == {"model.embed_tokens": 6 + 32 / 32, "model.layers.0.mlp.down_proj": 3 + 32 / 64}
    verified = verify_model(directory)
    assert (verified.quantized, verified.others, verified.compared) == (2, 1, False)
    stored = 12 * (24 + 4) + 8 * (48 + 8) + 64
    assert verified.bpw == pytest.approx(8 * stored / (12 * 32 + 8 * 128 + 32))


def _settings(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["quantization"]["model.embed_tokens"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_settings(bits=7), "Expected affine groups"),
        (_settings(bits=True), "Expected affine groups"),
        (_settings(group_size=48), "Expected affine groups"),
        (_settings(mode="mxfp4"), "no other mode of MLX"),
        (_settings(bits=5), "not stored as its scheme 5g32 says"),
        (_settings(group_size=64), "not stored as its scheme 6g64 says"),
        (lambda config: config.update(quantization=[4]), "Expected an object"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    theirs: tuple[Path, dict[str, torch.Tensor]], change: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = theirs[0] / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=says):
        MlxModel.open(theirs[0])


@pytest.mark.parametrize("missing", ["weight", "biases"])
def test_a_module_without_one_of_its_parts_is_refused(
    theirs: tuple[Path, dict[str, torch.Tensor]], missing: str
) -> None:
    path = theirs[0] / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.embed_tokens.{missing}"]
    save_file(tensors, path)
    with pytest.raises(BpwiseError, match="lacks its codes or biases"):
        MlxModel.open(theirs[0])
