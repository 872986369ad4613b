"""Whole runs with linears in float16, widths of linears, and sizes: from the command line to what is on the disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.plan.vram import exl2_overhead_bytes
from bpwise.convert.registry import load_plan
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from ..rounded import calibration, measured_model, token_ids

MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
TEXT = ("--rows", "8", "--row-tokens", "32", "--device", "cpu", "--eval-rows", "2", "--eval-row-tokens", "32")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def plan_of(path: Path) -> Exl2Plan:
    """The plan of an output, or in a file."""
    plan = load_plan(path if path.is_file() else path.with_name(f"{path.name}.work") / "plan.json")
    assert isinstance(plan, Exl2Plan)
    return plan


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The MLP of block 0 in float16, wide keys, and a head of exactly 8 bits."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    options = ("--keep-fp16", "*.0.mlp.*", "--override", "*.k_proj=8", "--override", "lm_head=8")
    return out, run("quantize", tiny_model, out, "--bpw", 8.0, *options, *TEXT)


class TestMixedModel:
    def test_what_is_stored(self, mixed: tuple[Path, str], tiny_model: Path) -> None:
        tensors, original = stored(mixed[0]), load_file(tiny_model / "model.safetensors")
        kept = [f"model.layers.0.{x}" for x in MLP]
        for name in kept:
            assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"].half())
            assert not [key for key in tensors if key.startswith(f"{name}.q_")]
        linears = {key.removesuffix(".q_weight") for key in tensors if key.endswith(".q_weight")}
        assert len(linears) == 2 * 7 + 1 - 3
        for name in linears:
            widths = set(tensors[f"{name}.q_groups"][::2].tolist())
            assert widths == {8} if name.endswith(("k_proj", "lm_head")) else widths <= {2, 3, 4, 5, 6, 8}
        parts = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
        bits = sum(
            8 * t.numel() * t.element_size()
            for key, t in tensors.items()
            if key.rpartition(".")[2] in parts and not key.startswith("lm_head")
        )
        bits += 16 * 3 * 64 * 96
        # The largest step is 2 bits of 32 x 96 of the 61440 weights.
        assert 8.0 - 0.11 < bits / (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)) <= 8.0

    def test_what_is_said(self, mixed: tuple[Path, str]) -> None:
        out, printed = mixed
        assert "in float16: 3 linears, 18432 weights: asked for" in printed
        plan = plan_of(out)
        assert plan.head is not None
        assert f"decoder {plan.bpw:.4f} bits per weight, head {plan.head.bpw:.4f} (asked 8, head 6)" in printed
        report = json.loads((out / "report.json").read_text())
        costs = {each["name"]: each for each in report["linears"]}
        assert costs["model.layers.0.mlp.up_proj"] == {
            "name": "model.layers.0.mlp.up_proj",
            "bpw": 16.0,
            "damage_nats": 0.0,
        }
        assert "3 linears, 18432 weights: asked for" in (out / "report.md").read_text()
        assert "3 linears of the decoder" in (out / "README.md").read_text()

    def test_readers_understand_it(self, mixed: tuple[Path, str], tiny_model: Path, tmp_path: Path) -> None:
        out, _ = mixed
        verified = run("verify", out)
        assert "12 quantized and 9 other tensors read back exactly as written" in verified
        assert f"decoder {plan_of(out).bpw:.4f} bpw, head " in verified
        assert "3 linears of the decoder in float16" in verified
        inspected = run("inspect", out)
        assert "3 linears of the decoder in float16" in inspected
        assert f"decoder {plan_of(out).bpw:.4f} bits per weight" in inspected
        assert "in float16: 3 linears" in run("inspect", out.with_name("out.work") / "plan.json")
        run("dequantize", out, tmp_path / "dense")
        dense, original = (
            load_file(tmp_path / "dense" / "model.safetensors"),
            load_file(tiny_model / "model.safetensors"),
        )
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(dense[name], original[name].half())
        run("eval", tiny_model, out, tmp_path / "dense", "-r", 2, "-l", 32, "-o", tmp_path / "e", "--device", "cpu")
        ids = torch.arange(200).view(4, 50)
        with torch.no_grad():
            p, q = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
                for path in (tiny_model, tmp_path / "dense")
            )
        # The rest has 5 bits on average; uniform guesses would be 5.6 nats away.
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.5

    def test_same_command_again_but_for_an_override(self, mixed: tuple[Path, str], tiny_model: Path) -> None:
        out, _ = mixed
        options = ("--keep-fp16", "*.0.mlp.*", "--override", "*.k_proj=6", "--override", "lm_head=8", "--no-eval")
        assert "exists already" in run("quantize", tiny_model, out, "--bpw", 8.0, *options, *TEXT, code=1)


@pytest.mark.parametrize("kept", [("*.self_attn.*",), ("*.mlp.*",), ("*.0.*",)], ids=["attention", "mlp", "block"])
def test_drift_is_cancelled_around_what_stays(save_model: Any, tmp_path: Path, kept: tuple[str, ...]) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=3)
    measured = measured_model(model, tmp_path, rows=96)
    lowest = {"*.self_attn.*": 8.0, "*.mlp.*": 11.0, "*.0.*": 7.5}[kept[0]]
    plan = measured.plan(lowest, 16, keep_fp16=kept)
    held_out = token_ids(16, seed=9)
    errors = []
    for correct_drift in (False, True):
        rounded = measured.round(plan, tmp_path / str(correct_drift), correct_drift=correct_drift)
        assert set(rounded.names) == {p.name for p in plan.linears}
        original, quantized = measured.dense(), measured.dense(rounded)
        states = [m(input_ids=held_out, output_hidden_states=True).hidden_states[-1] for m in (original, quantized)]
        errors.append(float((states[1] - states[0]).detach().square().mean()))
        # What rounding saw is what the model makes of the rounded weights beside the original ones.
        seen: list[Tensor] = []
        quantized.model.norm.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            quantized(input_ids=calibration(96).tokens)
        state = rounded.store.load("state-2")["quantized"]
        assert float((seen[0] - state).norm() / state.norm()) < 2e-3  # those are in float16 there
    assert errors[1] < errors[0]


def test_width_that_exl2_cannot_hold(save_model: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", kind=Qwen2Config, intermediate_size=80)
    printed = run("quantize", model, tmp_path / "out", "--bpw", 11, *TEXT)
    assert "in float16: 6 linears" in printed
    assert "down_proj has 80 input features" in printed
    assert "down_proj has 80 input features" in (tmp_path / "out" / "report.md").read_text()
    tensors = stored(tmp_path / "out")
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.float16
    assert "model.layers.1.self_attn.q_proj.q_weight" in tensors
    run("verify", tmp_path / "out")
    assert "in float16: 6 linears" in run("quantize", model, tmp_path / "x", "--bpw", 11, *TEXT, "--dry-run")


def test_nothing_fits(save_model: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = save_model(tmp_path / "model", **sizes)
    for extra in ((), ("--dry-run",)):
        message = run("quantize", model, tmp_path / "out", "--bpw", 8, *TEXT, *extra, code=1)
        assert "nothing is left to quantize" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("largest", "options"),
    [
        (150_000, ()),
        (170_000, ("--head-bits", "auto")),
        (185_000, ("--head-bits", "16", "--keep-fp16", "*.0.mlp.*")),
    ],
)
def test_largest_size(
    mixed: tuple[Path, str], tiny_model: Path, tmp_path: Path, largest: int, options: tuple[str, ...]
) -> None:
    measurement = mixed[0].with_name("out.work") / "measurement.safetensors"
    command = ("quantize", tiny_model, tmp_path / "out", "--max-size", largest, "-m", measurement, "--no-eval")
    run(*command, "--device", "cpu", *options)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    # Below, headers included; that of a float16 MLP is shorter than it might be, by 15 names of about 240 bytes.
    assert largest - (4_800 if "--keep-fp16" in options else 1_000) < size <= largest
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == plan_of(tmp_path / "out").target_bpw


def test_gpu_memory(mixed: tuple[Path, str], tiny_model: Path, tmp_path: Path) -> None:
    measurement = mixed[0].with_name("out.work") / "measurement.safetensors"
    config = json.loads((tiny_model / "config.json").read_text())
    beside = [exl2_overhead_bytes(1 << 40, config, tokens, cache_bits=8) for tokens in (1024, 1028)]
    vram = beside[0] + 75_000
    for context, taken in zip(("1k", "1028"), beside, strict=True):
        out = tmp_path / context
        command = ("quantize", tiny_model, out, "--vram", vram, "--context", context, "-m", measurement)
        run(*command, "--no-eval", "--device", "cpu", "--cache-bits", 8)
        on_gpu = sum(
            tensor.numel() * min(2, tensor.element_size()) if name.endswith("norm.weight") else tensor.nbytes
            for name, tensor in stored(out).items()
            if "embed" not in name
        )
        # The largest step is one of 2 bits of 32 x 96 weights.
        assert vram - 800 < taken + on_gpu <= vram
    message = run("quantize", tiny_model, tmp_path / "z", "--vram", "300MB", "-m", measurement, code=1)
    assert "leave no room for weights" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--bpw", "4", "--max-size", "1GB"),
        ("--max-size", "1GB", "--vram", "2GB"),
        ("--bpw", "4", "--context", "4k"),
        ("--bpw", "4", "--cache-bits", "4"),
        ("--vram", "2GB", "--context", "many"),
        ("--format", "gguf", "--bpw", "4", "--keep-fp16", "*"),
    ],
)
def test_usage(tiny_model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert "Usage: " in run("quantize", tiny_model, tmp_path / "out", *options, code=2)


def test_plan_command(mixed: tuple[Path, str], tmp_path: Path) -> None:
    measurement = mixed[0].with_name("out.work") / "measurement.safetensors"
    options = ("--override", "*.down_proj=5:", "--keep-fp16", "*.0.self_attn.*", "--override", "lm_head=8")
    page = tmp_path / "plans.html"
    printed = run("plan", measurement, "--max-size", "170000", *options, "-o", tmp_path / "p.json", "--html", page)
    plan = plan_of(tmp_path / "p.json")
    assert [x.name for x in plan.unquantized] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    assert all(min(p.group_bits) >= 5 for p in plan.linears if p.name.endswith("down_proj"))
    assert "in float16: 4 linears, 12288 weights: asked for" in printed
    assert page.exists()
    assert "no quantized linear" in run("plan", measurement, "--bpw", 5, "--override", "x=5", code=1)
    assert "Usage" in run("plan", measurement, "--bpw", 5, "--max-size", "1GB", code=2)
