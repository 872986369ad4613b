"""The narrower model: the same function where nothing is cut away, and the subspace that is kept."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("narrow_model")


def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=80, head_dim=16, tie_word_embeddings=True, **sizes))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return made.eval()


@torch.no_grad()
def test_a_full_basis_changes_nothing(narrow: ModuleType) -> None:
    source, tokens = model(), torch.arange(40).view(2, 20)
    basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1)))[0]
    turned = narrow.narrowed(source, basis)
    assert turned.config.model_type == "mistral"
    # The same sums in another basis, in float32.
    assert torch.allclose(turned(input_ids=tokens).logits, source(input_ids=tokens).logits, atol=1e-4)


def test_basis_keeps_the_power_and_stays_near_the_channels(narrow: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 40, generator=rng) @ torch.randn(40, 48, generator=rng) * torch.logspace(0, -2, 48)
    covariance = inputs.T @ inputs / 500
    basis = narrow.basis_of(covariance, 32)
    assert torch.allclose(basis.T @ basis, torch.eye(32), atol=1e-5)
    best = torch.linalg.eigvalsh(covariance)[-32:].sum()  # no subspace of 32 directions holds more
    assert float((basis.T @ covariance @ basis).trace()) == pytest.approx(float(best), rel=1e-4)
    assert float(basis[0, 0]) > 0.9  # the strongest channel is still one
