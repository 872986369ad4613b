"""Positions whose hidden state no norm brings to size: embeddings that are zero, or nearly so."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bpwise.checkpoint.model.families import family_of
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.errors import NumericalError
from bpwise.measure.layers.normless import hold_small_states, norms_of_stream
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.statistics import probes
from bpwise.measure.text.calibration import CalibrationSet
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ...measured import damage_of
from ...tiny_models import FAMILIES, SIZES, randomize

ROWS, TOKENS, BOS = 4, 24, 3


def rows() -> Tensor:
    """Random ids behind a BOS that is nowhere else."""
    ids = torch.randint(BOS + 1, 264, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    return ids


def save_model(
    directory: Path, model_type: str, *, bos: float, change: Callable[[nn.Module], None] | None = None, **sizes: int
) -> Path:
    """A model without biases whose BOS embedding is scaled."""
    settings = {**SIZES, **FAMILIES[model_type], "pad_token_id": None, "attention_bias": False, "mlp_bias": False}
    settings |= sizes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    randomize(model, 0)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= bos
        if change is not None:
            change(model)
    model.save_pretrained(directory)
    return directory


def measure(directory: Path, work: Path, **options: object) -> Measurement:
    calibration = CalibrationSet(tokens=rows(), origins=("r",) * ROWS, description="random ids", adds_bos=True)
    config = MeasureConfig(device="cpu", **options)  # type: ignore[arg-type]
    return measure_checkpoint(Checkpoint.open(directory), calibration, config, [Exl2Curves()], work)


def gradients_of_others(directory: Path, signs: Tensor) -> dict[str, Tensor]:
    """dL/dy of every linear of the blocks in float64 from a plain backward pass, without BOS: (rows, tokens - 1, out).

    What other tokens have to do with BOS is in it: attention reaches back, never forward.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:

            def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                outputs[name] = output

            module.register_forward_hook(keep)
    logits = model(input_ids=rows(), use_cache=False).logits
    probabilities = logits.detach().softmax(dim=-1)
    signed = probabilities.sqrt() * signs.view(logits.shape)
    logits.backward(signed - probabilities * signed.sum(dim=-1, keepdim=True))
    return {name: output.grad[:, 1:] for name, output in outputs.items()}


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "cohere", "gemma2"])
def test_a_zero_bos_stays_out_of_the_statistics(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[Tensor] = []
    draw = probes._signs

    def spied(*args: object) -> Tensor:
        signs.append(draw(*args))  # type: ignore[arg-type]
        return signs[-1]

    monkeypatch.setattr(probes, "_signs", spied)
    directory = save_model(tmp_path / "model", model_type, bos=0)
    measured = measure(directory, tmp_path / "work")
    expected = gradients_of_others(directory, torch.where(torch.cat(signs) < 0, -1.0, 1.0))
    for linear in measured.linears:
        shared = [linear.name]
        if linear.name.endswith(("gate_proj", "up_proj")):
            shared = [linear.name.rpartition(".")[0] + name for name in (".gate_proj", ".up_proj")]
        weights = torch.stack([expected[name].square().sum(dim=-1) for name in shared]).sum(dim=0)
        fisher = expected[linear.name].square().sum(dim=(0, 1)) / (ROWS * TOKENS)
        # Gradients in float32 through up to three blocks; weights are kept in float16.
        assert np.allclose(linear.fisher, fisher, rtol=2e-3, atol=2e-3 * float(fisher.max())), linear.name
        assert not linear.token_weights[:, 0].any(), linear.name
        wanted = weights / (weights.sum() / (ROWS * TOKENS))
        assert np.allclose(linear.token_weights[:, 1:], wanted, rtol=5e-3, atol=1e-3), linear.name
    assert np.isfinite(measured.embedding.importance).all()


@pytest.mark.parametrize("bos", [1e-6, 1e-4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_bos_that_was_never_trained_does_not_hide_the_others(model_type: str, bos: float, tmp_path: Path) -> None:
    measured = measure(save_model(tmp_path / "model", model_type, bos=bos), tmp_path / "work")
    for linear in measured.linears:
        # Of mean 1. Held from a twentieth of the usual size on, BOS counts 400 times as much as one of the others at
        # most, which are 23 of 24.
        assert float(linear.token_weights[:, 1:].astype(np.float32).mean()) > 24 / 423 / 4, linear.name


def test_gradients_do_not_overflow_in_deep_models(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 14, "hidden_size": 32, "intermediate_size": 32}  # a thousandfold at 28 norms
    measured = measure(save_model(tmp_path / "model", "llama", bos=0, **sizes), tmp_path / "work")
    assert all(np.isfinite(damage_of(measured, linear.name)).all() for linear in measured.linears)
    assert not any(linear.token_weights[:, 0].any() for linear in measured.linears)


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_norms_of_the_stream(model_type: str) -> None:
    settings = {**SIZES, **FAMILIES[model_type]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    blocks = settings["num_hidden_layers"]
    a_block = 1 if model_type.startswith("cohere") else 2  # attention beside the MLP: both read one norm
    norms = list(norms_of_stream(model, "model.layers", family_of({"model_type": model_type}).groups))
    assert len(norms) == len(set(norms)) == a_block * blocks + 1
    assert all(norm.weight.shape == (settings["hidden_size"],) for norm in norms)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_only_small_states_are_held(kind: type[nn.Module]) -> None:
    norm = kind(8, eps=1e-6)
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    states[0, 1] = 0
    states[1, 2] *= 1e-3
    states[1, 4] = 0.7  # a LayerNorm sees nothing in it
    held = {(0, 1), (1, 2)} | ({(1, 4)} if kind is nn.LayerNorm else set())
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))

    def gradient() -> tuple[Tensor, Tensor]:
        own = states.clone().requires_grad_()
        output = norm(own)
        output.backward(direction)
        assert own.grad is not None
        return output.detach(), own.grad

    output, plain = gradient()
    hold_small_states(norm)
    same, got = gradient()
    assert torch.equal(same, output)
    for row in range(2):
        for token in range(5):
            wanted = torch.zeros(8) if (row, token) in held else plain[row, token]
            assert torch.equal(got[row, token], wanted), (row, token)


def test_squares_beyond_float32_name_the_linear(tmp_path: Path) -> None:
    def stretch(model: nn.Module) -> None:
        # Nothing changes for the model, but gradients at the neurons grow by 1e21.
        mlp = model.get_submodule("model.layers.1.mlp")
        mlp.get_submodule("up_proj").weight.mul_(1e-21)  # type: ignore[operator]
        mlp.get_submodule("down_proj").weight.mul_(1e21)  # type: ignore[operator]

    directory = save_model(tmp_path / "model", "llama", bos=1, change=stretch)
    message = r"^model\.layers\.1\.mlp\.up_proj: NaN or infinity in the squared gradients"
    with pytest.raises(NumericalError, match=message):
        measure(directory, tmp_path / "work")
