import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.model.structure import BlockStructure
from bpwise.checkpoint.source.language import WeightOverlay
from bpwise.checkpoint.source.original import open_model
from bpwise.cli import cli
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.rounding import rounder as rounding
from bpwise.convert.numerics import fit as tuning
from bpwise.convert.numerics.fit import _add_gradient, tune_scales
from bpwise.convert.numerics.scales import Groups, GroupScales
from bpwise.eval.metrics.passes import last_hidden
from bpwise.measure.layers import positionwise as positions
from bpwise.measure.measurement import Measurement
from bpwise.measure.model.stream import StreamedModel
from bpwise.progress import silent
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ...rounded import measured_model
from ...tiny_models import save_family

MakeFamily = Callable[[str], Path]

TEXT = ("--rows", "24", "--row-tokens", "32", "--device", "cpu")


@pytest.fixture
def make_family(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> MakeFamily:
    return lambda kind: save_family(tmp_path / kind, kind, byte_tokenizer)


def streamed(source: Any) -> StreamedModel:
    return StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)


def mean_divergence(original: Tensor, quantized: Tensor) -> Tensor:
    """Mean KL of predictions by the formula, from logits of shape (rows, tokens, vocabulary)."""
    p, q = original.log_softmax(dim=-1), quantized.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).mean()


def noisy_linears(model: Any) -> dict[str, Tensor]:
    """New weights for all linears of the decoder, by full name."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: module.weight.detach() + 0.1 * torch.randn(module.weight.shape, generator=rng)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def shuffled_groups(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A group of 16 inputs for each input, in no order."""
    rng = torch.Generator().manual_seed(2)
    return {name: torch.randperm(weight.shape[1], generator=rng) // 16 for name, weight in weights.items()}


@pytest.mark.parametrize("at_once", [4096, 16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_the_gradient_is_that_of_the_whole_model(
    family: str, at_once: int, make_family: MakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "CHUNK_POSITIONS", at_once)  # MLPs in artifacts of a row, too
    directory = make_family(family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    weights = noisy_linears(model)
    groups = shuffled_groups(weights)
    outputs = {name: torch.arange(len(weight)) % 24 for name, weight in weights.items()}
    tokens = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(0))

    # By autograd, through Transformers' own model.
    logs = {name: (torch.zeros(int(of.max()) + 1), torch.zeros(24)) for name, of in groups.items()}
    leaves = [each.requires_grad_() for name in groups for each in logs[name]]
    changed = {}
    for name, weight in weights.items():
        of_inputs, of_outputs = (each.exp() for each in logs[name])
        changed[f"{name}.weight"] = weight * of_inputs[groups[name]] * of_outputs[outputs[name]][:, None]
    with torch.no_grad():
        logits = model(tokens).logits
    mean = mean_divergence(logits, functional_call(model, changed, (tokens,)).logits)
    expected = torch.autograd.grad(mean, leaves)

    original = open_model(directory)
    wanted = streamed(original)
    states = last_hidden(wanted, tokens, "original", silent)
    quantized = streamed(WeightOverlay(original, {name: lambda w=w: w for name, w in weights.items()}))
    scales = GroupScales({name: Groups(of, outputs[name]) for name, of in groups.items()}, torch.device("cpu"))
    with wanted.tail(), quantized.tail():
        found = _add_gradient(wanted, quantized, scales, tokens, states)
    assert found == pytest.approx(mean.item(), rel=1e-4)
    # Float32 on both sides, summed in different orders.
    torch.testing.assert_close(scales.gradient, torch.cat(expected), rtol=1e-3, atol=1e-6)


def test_factors_scale_their_groups_and_leave_biases_alone() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(4, 3))
    groups = Groups(torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 0]))
    scales = GroupScales({"full.name": groups}, torch.device("cpu"))
    scales.logs.data.copy_(torch.tensor([2.0, 0.5, 3.0, 0.25]).log())
    weight, bias, inputs = linear[0].weight.detach(), linear[0].bias.detach(), torch.randn(5, 4)
    with scales.applied(linear, BlockStructure(()), {"0": "full.name"}):
        scaled = linear(inputs)
    changed = weight * torch.tensor([0.5, 2.0, 0.5, 2.0]) * torch.tensor([[3.0], [0.25], [3.0]])
    torch.testing.assert_close(scaled, inputs @ changed.T + bias)
    torch.testing.assert_close(linear(inputs), inputs @ weight.T + bias)
    found = scales.factors()["full.name"]
    torch.testing.assert_close(found.inputs, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(found.outputs, torch.tensor([3.0, 0.25]))


def test_scales_that_are_off_are_found(tiny_model: Path, tmp_path: Path) -> None:
    original = open_model(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = {name: w for name, w in model.named_parameters() if "proj" in name}
    groups = shuffled_groups({name.removesuffix(".weight"): weight.detach() for name, weight in weights.items()})
    rng = torch.Generator().manual_seed(3)
    off = {name: torch.exp(0.1 * torch.randn(int(of.max()) + 1, generator=rng)) for name, of in groups.items()}
    spoilt = {name: weights[f"{name}.weight"].detach() * off[name][of] for name, of in groups.items()}
    tokens, others = torch.randint(0, 264, (2, 128, 32), generator=rng)
    quantized = streamed(WeightOverlay(original, {name: lambda w=w: w for name, w in spoilt.items()}))
    artifacts = ResumeStore(tmp_path, "rounded", {})
    wanted = last_hidden(streamed(original), tokens, "original", silent)
    of_inputs = {name: Groups(of) for name, of in groups.items()}
    factors = tune_scales(streamed(original), quantized, of_inputs, tokens, wanted, artifacts, silent)

    def divergence_with(weights: dict[str, Tensor]) -> float:
        changed = {f"{name}.weight": weight for name, weight in weights.items()}
        with torch.no_grad():
            return mean_divergence(model(others).logits, functional_call(model, changed, (others,)).logits).item()

    tuned = {name: weight * factors[name].inputs[groups[name]] for name, weight in spoilt.items()}
    # With as many steps as there are, not all of 10 % can be made good.
    assert divergence_with(tuned) < 0.5 * divergence_with(spoilt)


def bpwise(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def quantize(model: Path, out: Path, *options: object) -> None:
    result = bpwise("quantize", model, out, "--bpw", 3, "--no-eval", *options)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def measurement(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("measured") / "measurement.safetensors"
    result = bpwise("measure", tiny_model, "-o", file, *TEXT)
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture
def measured(measurement: Path) -> tuple[object, ...]:
    return ("--measurement", measurement, "--device", "cpu")


@pytest.fixture(autouse=True)
def many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a step, four in the last."""
    monkeypatch.setattr(tuning, "STEP_TOKENS", 160)


def divergence(model: Path, out: Path, tokens: Tensor) -> float:
    """KL from the original, the quantized model decoded and run by Transformers."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    source = Exl2Model.open(out)
    quantized.load_state_dict({name: source.tensor(name).float() for name in quantized.state_dict()})
    with torch.no_grad():
        return mean_divergence(original(tokens).logits.double(), quantized(tokens).logits.double()).item()


def test_only_ceilings_change_and_the_predictions_come_closer(
    tiny_model: Path, measurement: Path, measured: tuple[object, ...], tmp_path: Path
) -> None:
    for effort in ("normal", "high"):
        quantize(tiny_model, tmp_path / effort, "--effort", effort, *measured)
    before, after = (load_file(tmp_path / effort / "output.safetensors") for effort in ("normal", "high"))
    assert before.keys() == after.keys()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different
    assert all(name.endswith(".q_scale_max") and "lm_head" not in name for name in different)
    for name in different:
        # No step is larger than the rate, at a divergence below 1.
        assert ((after[name] / before[name]).log().abs() < 5 * tuning._RATE).all()
    tokens = torch.from_numpy(Measurement.load(measurement).tokens).long()
    untuned, tuned = (divergence(tiny_model, tmp_path / effort, tokens) for effort in ("normal", "high"))
    assert tuned < untuned


def test_it_goes_on_where_it_was_cut_off(
    tiny_model: Path, measured: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(items: Sequence[Any], name: str) -> Iterable[Any]:
        for number, item in enumerate(items):
            if name == "quantize: tune" and number == 3:
                raise KeyboardInterrupt
            yield item

    options = ("--effort", "high", *measured)
    quantize(tiny_model, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr("bpwise.cli.quantize.RunBar", lambda: progress)
        cut = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", 3, "--no-eval", *options)
    assert cut.exit_code == 130
    assert not (tmp_path / "out").exists()
    steps = []
    add_gradient = tuning._add_gradient
    monkeypatch.setattr(tuning, "_add_gradient", lambda *given: steps.append(1) or add_gradient(*given))
    monkeypatch.setattr(rounding, "round_linear_", lambda *_: pytest.fail("was rounded again"))
    quantize(tiny_model, tmp_path / "out", *options)
    assert len(steps) == 5 - 3
    for name in ("output.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_scales_that_were_tuned_before_a_kill_are_no_part_of_an_untuned_model(
    tiny_model: Path, measured: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    quantize(tiny_model, tmp_path / "whole", *measured)
    with monkeypatch.context() as patch:
        patch.setattr("bpwise.convert.exl2.conversion.write_model", killed)
        arguments = ("--bpw", 3, "--no-eval", "--effort", "high", *measured)
        assert bpwise("quantize", tiny_model, tmp_path / "out", *arguments).exit_code == 130
    quantize(tiny_model, tmp_path / "out", *measured)
    for name in ("output.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_experts_are_tuned_too(make_family: MakeFamily, tmp_path: Path) -> None:
    model = make_family("qwen3_moe")
    for effort in ("normal", "high"):
        quantize(model, tmp_path / effort, "--effort", effort, *TEXT)
    before, after = (load_file(tmp_path / effort / "output.safetensors") for effort in ("normal", "high"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".experts." in name for name in changed)


def test_an_mlp_with_biases_is_scaled_in_its_own_order(make_family: MakeFamily, tmp_path: Path) -> None:
    # Its neurons are written in another order than they are rounded and tuned in.
    measured = measured_model(make_family("starcoder2"), tmp_path, rows=4)
    rounded = measured.round(measured.plan(4.0), tmp_path / "work")
    rng = torch.Generator().manual_seed(0)
    up, down = ("model.layers.0.mlp.c_fc", "model.layers.0.mlp.c_proj")
    factors = {up: torch.rand(2, generator=rng) + 0.5, down: torch.rand(3, generator=rng) + 0.5}
    expected = []
    for name in (down, up):
        artifact = rounded.artifact(name)
        stored_rows = artifact["groups"][:, 1]
        of_stored = factors[name].repeat_interleave(stored_rows)
        of_inputs = torch.empty_like(of_stored)
        of_inputs[artifact["order"]] = of_stored
        expected.append(rounding._unpack(artifact).dequantize().float() * of_inputs)
    rounded.store.save(tuning._TUNED, factors)
    found = [measured.linear(rounded, name).dequantize().float() for name in (down, up)]
    # Without what lies between the two, the order of the neurons does not matter.
    # Ceilings, units and scales are each rounded to float16, by up to 0.1 % where they are small.
    torch.testing.assert_close(found[0] @ found[1], expected[0] @ expected[1], rtol=5e-3, atol=1e-3)


def test_manifest_and_card_tell_the_effort(tiny_model: Path, measured: tuple[object, ...], tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "out", "--effort", "high", *measured)
    manifest = json.loads((tmp_path / "out" / "bpwise.json").read_text())
    assert manifest["provenance"]["effort"] == "high"
    assert "fitted to the original's predictions" in (tmp_path / "out" / "README.md").read_text()


def test_states_in_files_make_no_difference(tiny_model: Path, measured: tuple[object, ...], tmp_path: Path) -> None:
    options = ("--effort", "high", "--head-bits", 16, "--keep-fp16", "*.0.mlp.*", "--bpw", 8, *measured)
    quantize(tiny_model, tmp_path / "memory", *options)
    quantize(tiny_model, tmp_path / "files", "--offload-dir", tmp_path / "states", *options)
    in_memory, in_files = (load_file(tmp_path / place / "output.safetensors") for place in ("memory", "files"))
    assert in_memory.keys() == in_files.keys()
    assert all(torch.equal(in_memory[name], in_files[name]) for name in in_memory)


def test_a_gradient_that_is_not_finite_stops_the_run(
    tiny_model: Path, measured: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(_original: Any, _quantized: Any, scales: GroupScales, *_: Any) -> float:
        scales.gradient[0] = float("nan")
        return 0.1

    options = ("quantize", tiny_model, tmp_path / "out", "--bpw", 3, "--no-eval", "--effort", "high", *measured)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_add_gradient", spoilt)
        result = bpwise(*options)
    assert result.exit_code == 1
    assert "gradient of the scales" in result.output
    assert bpwise(*options).exit_code == 0  # nothing of it was kept
