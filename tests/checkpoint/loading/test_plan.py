"""Parameters made one at a time are those that ``from_pretrained`` loads, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.loading.plan import LoadPlan
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.errors import CheckpointError, UnsupportedModelError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, __version__, conversion_mapping

from tests.saved_decoders import ALL, save_decoder


def loaded(directory: Path, **how: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(directory, **how).state_dict()
    return weights


def plan_of(source: Checkpoint) -> LoadPlan:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.directory))
    return LoadPlan(model, {name: source.shape(name) for name in source.names}, source.directory)


class Recorder:
    """Reads tensors and notes which."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self.read: list[str] = []

    def tensor(self, name: str) -> Tensor:
        self.read.append(name)
        return self._source.tensor(name)

    def entry(self, name: str, index: int) -> Tensor:
        self.read.append(f"{name}[{index}]")
        return self._source.entry(name, index)


def stacks(plan: LoadPlan) -> Iterator[str]:
    return (name for name in sorted(plan.names) if "experts" in name and len(plan.shape(name)) == 3)


@pytest.mark.parametrize("name", sorted(ALL))
def test_as_from_pretrained(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    source = Checkpoint.open(tmp_path)
    plan, expected = plan_of(source), loaded(tmp_path, dtype=torch.bfloat16)
    assert (plan.missing, plan.unused) == ((), ())
    tied = {"lm_head.weight"} if source.config["tie_word_embeddings"] else set()
    assert plan.names == expected.keys() - tied
    for parameter in plan.names:
        assert plan.shape(parameter) == tuple(expected[parameter].shape)
        assert torch.equal(plan.make(parameter, source.tensor), expected[parameter]), parameter
    for parameter in stacks(plan):
        for expert, weight in enumerate(expected[parameter]):
            reader = Recorder(source)
            assert torch.equal(plan.make_expert(parameter, expert, reader.tensor, reader.entry), weight), parameter
            # Of a stack, only this expert; else only tensors with its number in their names.
            assert all(f".{expert}." in read or read.endswith(f"[{expert}]") for read in reader.read)
            assert len(reader.read) <= 2


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
        ("qwen2_moe", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.3.up_proj.weight"),
    ],
)
def test_experts_one_tensor_each(name: str, stored: str, tmp_path: Path) -> None:
    # As the Hub has them: what the test above compares is made of these.
    save_decoder(tmp_path, name)
    source = Checkpoint.open(tmp_path)
    plan = plan_of(source)
    assert stored in plan.sources("model.layers.1.mlp.experts.gate_up_proj")
    assert not plan.stored_as_is("model.layers.1.mlp.experts.gate_up_proj")
    assert plan.sources("model.norm.weight") == ("model.norm.weight",)
    assert plan.stored_as_is("model.norm.weight")


def test_stored_without_the_prefix_of_the_head(tmp_path: Path) -> None:
    # As gpt2 lies on the Hub: saved from a model without head, with masks that no model has any more.
    save_decoder(tmp_path, "gpt2")
    expected = loaded(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**weights, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file, {"format": "pt"})
    source = Checkpoint.open(tmp_path)
    plan = plan_of(source)
    assert (plan.missing, plan.unused) == ((), ("h.0.attn.bias",))
    for parameter in plan.names:
        assert torch.equal(plan.make(parameter, source.tensor), expected[parameter])


def test_float8(tmp_path: Path) -> None:
    # Whole blocks: of others, Transformers takes the sizes from the number of scales.
    wide = {"q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    save_decoder(tmp_path, "deepseek_v3", **wide)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        stored[name] = tensor
        if "_proj" in name:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            blocks = [-(-size // 16) for size in tensor.shape]
            stored[f"{name}_scale_inv"] = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(stored, file, {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": settings}))
    source = open_model(tmp_path)
    plan, expected = plan_of(source), loaded(tmp_path, dtype=torch.bfloat16)
    assert (plan.missing, plan.unused) == ((), ())
    for parameter in plan.names:
        assert torch.equal(plan.make(parameter, source.tensor), expected[parameter]), parameter


def test_mxfp4(tmp_path: Path) -> None:
    model = save_decoder(tmp_path, "gpt_oss", intermediate_size=64)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    rng = torch.Generator().manual_seed(0)
    stored = load_file(file)
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32, 16)
            stored[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(118, 124, shape[:-1], generator=rng, dtype=torch.uint8)
            del stored[name]
    save_file(stored, file, {"format": "pt"})
    settings = {"quant_method": "mxfp4", "dequantize": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": settings}))
    source = open_model(tmp_path)
    plan, expected = plan_of(source), loaded(tmp_path, dtype=torch.bfloat16)
    assert (plan.missing, plan.unused) == ((), ())
    for parameter in plan.names:
        assert torch.equal(plan.make(parameter, source.tensor), expected[parameter]), parameter
    for parameter in stacks(plan):
        for expert, weight in enumerate(expected[parameter]):
            assert torch.equal(plan.make_expert(parameter, expert, source.tensor, source.entry), weight)


def test_missing_and_unused(tmp_path: Path) -> None:
    save_decoder(tmp_path, "olmoe")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file({**weights, "mtp.fc.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    plan = plan_of(Checkpoint.open(tmp_path))
    assert plan.missing == ("model.layers.1.self_attn.q_proj.weight",)
    assert plan.unused == ("mtp.fc.weight",)


@pytest.mark.parametrize(
    ("stored", "shape", "message"),
    [
        ("model.layers.0.mlp.gate.weight", (4, 31), r"Got shape \(4, 31\) for model.layers.0.mlp.gate.weight"),
        ("model.layers.0.mlp.experts.2.up_proj.weight", (47, 32), "do not fit together"),
        ("model.layers.0.mlp.experts.4.up_proj.weight", (96, 64), r"Expected what makes \(4, 192, 64\)"),
    ],
    ids=["plain", "expert", "one-expert-more"],
)
def test_sizes_that_do_not_fit(stored: str, shape: tuple[int, int], message: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, "olmoe")
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), stored: torch.ones(shape)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        plan_of(Checkpoint.open(tmp_path))


def test_another_version_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_decoder(tmp_path, "smollm3")
    monkeypatch.delattr(conversion_mapping, "get_model_conversion_mapping")
    with pytest.raises(UnsupportedModelError, match=f"Transformers {__version__} cannot read the names"):
        plan_of(Checkpoint.open(tmp_path))
