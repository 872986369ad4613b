"""From an original to an MLX directory and back, with mlx-lm's part played by the test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.convert.mlx.mlx_lm import loading
from bpwise.convert.opening import open_any, verify_model
from bpwise.convert.registry import format_named
from bpwise.errors import FormatError, VerificationError
from bpwise.measure.measurement import Measurement
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from ...mlx_stand_in import play_mlx_lm
from ...tiny_models import save_family, streamed_logits

SaveModel = Callable[..., Path]

TEXT = ("-r", 2, "-l", 32, "--device", "cpu")


def bpwise(*arguments: object) -> Result:
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_from_a_model_to_a_directory_and_back(save_model: SaveModel, tmp_path: Path) -> None:
    model, output = save_model(tmp_path / "tiny"), tmp_path / "out"
    bpwise("measure", model, "-o", tmp_path / "m.safetensors", "--formats", "mlx", *TEXT)
    planned = bpwise("plan", tmp_path / "m.safetensors", "--format", "mlx", "--bpw", 5, "-o", tmp_path / "plan.json")
    assert "bits per weight over all tensors" in planned.stdout
    done = bpwise(
        *("quantize", model, output, "--format", "mlx", "--bpw", 5, "-m", tmp_path / "m.safetensors"),
        *("--eval-rows", 2, "--eval-row-tokens", 32, "--device", "cpu"),
    )
    assert "output" in done.stdout

    plan = json.loads((tmp_path / "plan.json").read_text())
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    tensors = load_file(output / "model.safetensors")
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weights = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert 4.8 < bits / weights <= 5
    assert verify_model(output).bpw == pytest.approx(bits / weights)
    for tensor in plan["tensors"]:
        module = tensor["name"].removesuffix(".weight")
        if tensor["scheme"] is None:
            assert module not in config["quantization"]
            continue
        settings = config["quantization"][module]
        assert tensor["scheme"] == f"{settings['bits']}g{settings['group_size']}"
        assert tensors[f"{module}.weight"].dtype == torch.uint32
        groups = tensor["shape"][-1] // settings["group_size"]
        assert tensors[f"{module}.scales"].shape == (*tensor["shape"][:-1], groups)
    report = json.loads((output / "report.json").read_text())
    assert 1 / 3 < report["comparison"]["summary"]["kl_nats"]["value"] / plan["predicted_damage_nats"] < 3
    assert "mlx_lm.generate" in (output / "README.md").read_text()
    dense = bpwise("dequantize", output, tmp_path / "dense")
    assert "dense float16 checkpoint" in dense.output


def test_experts_are_stacked_and_read_one_by_one(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_family(tmp_path / "moe", "mixtral", byte_tokenizer)

    def stacked(tensors: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        experts: dict[str, list[Any]] = {}
        for name, tensor in tensors.items():
            block, inside, rest = name.partition(".experts.")
            if not inside:
                found[name] = tensor + 1 if "norm" in name else tensor  # as of models whose norms lack a one
            else:
                experts.setdefault(f"{block}.switch.{rest.partition('.')[2]}", []).append(tensor)
        return {**found, **{name: torch.stack(own) for name, own in experts.items()}}

    play_mlx_lm(monkeypatch, stacked)
    bpwise("quantize", model, tmp_path / "out", "--format", "mlx", "--bpw", 6, "--no-eval", *TEXT)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    (switch, *_) = [name for name in stored if ".switch." in name and name.endswith(".scales")]
    assert stored[switch].ndim == 3
    original = open_any(str(model))
    read = open_any(tmp_path / "out").beside(original)  # type: ignore[union-attr]  # a quantized model
    tokens = torch.tensor([[256, 5, 77, 130, 9, 44, 200, 3]])
    found, expected = (streamed_logits(each, tokens).log_softmax(-1) for each in (read, original))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.05
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    if name in read.names:
        assert float((read.tensor(name) - original.tensor(name).float()).abs().max()) < 0.2


def test_a_changed_byte_is_noticed(save_model: SaveModel, tmp_path: Path) -> None:
    model, output = save_model(tmp_path / "tiny"), tmp_path / "out"
    bpwise("quantize", model, output, "--format", "mlx", "--bpw", 8, "--no-eval", *TEXT)
    path = output / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="not what was written"):
        verify_model(output)


def test_a_manifest_that_does_not_fit_the_file_is_refused(save_model: SaveModel, tmp_path: Path) -> None:
    output = tmp_path / "out"
    bpwise("quantize", save_model(tmp_path / "tiny"), output, "--format", "mlx", "--bpw", 8, "--no-eval", *TEXT)
    whole = json.loads((output / "bpwise.json").read_text())
    del whole["sha256"]  # as of files without
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = whole["layout"]["tensors"]
    for change, says in (
        ({key: own for key, own in tensors.items() if key != name}, "is not in bpwise.json"),
        ({**tensors, name: {**tensors[name], "linears": []}}, "cannot be stored as it says"),
        (
            {**tensors, name: {**tensors[name], "shape": [64, 32]}},
            "cannot be stored as it says|is not as bpwise.json says",
        ),
    ):
        changed = {**whole, "layout": {**whole["layout"], "tensors": change}}
        (output / "bpwise.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=says):
            verify_model(output)


def test_a_tied_table_is_one_module(save_model: SaveModel, tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny", tie_word_embeddings=True)
    bpwise("quantize", model, tmp_path / "out", "--format", "mlx", "--bpw", 6, "--no-eval", *TEXT)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "out" / "model.safetensors"))
    (found,) = (tmp_path / "out.work").glob("measurement*.safetensors")
    curves = Measurement.load(found).curves["mlx"]
    hidden = 64
    assert curves.table["gram"].shape == (hidden, hidden)


def test_it_is_left_out_of_measurements_where_mlx_lm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert format_named("mlx").is_installed()
    monkeypatch.setattr(loading, "_versions", lambda: ["", ""])
    assert not format_named("mlx").is_installed()
    assert format_named("exl2").is_installed()
