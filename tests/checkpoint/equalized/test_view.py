"""Equalized channels: the same function for every family, columns of one size, factors that repeat."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.equalized.view import (
    EQUALIZED,
    EqualizedView,
    column_factors,
    equalized,
    equalized_as,
    original_of,
)
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.mxfp4 import Mxfp4View
from bpwise.checkpoint.source.views import CheckpointView
from bpwise.errors import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from ...decoders import DECODERS
from ...saved_decoders import save_decoder
from ...tiny_models import FAMILIES, save_family, save_with_vision, streamed_logits

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def to_float32(directory: Path) -> Path:
    """Store the weights in float32, so that nothing is rounded, with channels of very different sizes."""
    file = directory / "model.safetensors"
    rng = torch.Generator().manual_seed(1)
    made = {}
    for name, tensor in load_file(file).items():
        value = tensor.float()
        if value.ndim == 2:
            value = value * torch.exp(torch.randn(value.shape[1], generator=rng))  # columns, or rows if turned
        made[name] = value
    save_file(made, file, {"format": "pt"})
    return directory


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    return Checkpoint.open(to_float32(save_family(tmp_path / "m", request.param, byte_tokenizer)))


def test_every_family_computes_the_same(family: Checkpoint) -> None:
    before, after = streamed_logits(family, TOKENS), streamed_logits(equalized(family), TOKENS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4 * float(before.abs().max()))


def test_every_linear_of_a_block_is_reached(family: Checkpoint) -> None:
    view, model = equalized(family), language_model(family)
    for group in model.structure.structures[0].groups:
        for linear in group.linears:
            reaches = column_factors(view, model, f"{model.blocks}.0.{linear}") is not None
            assert reaches is not linear.endswith("c_proj"), linear  # no gate: the activation is not linear


@pytest.mark.parametrize("name", list(DECODERS))
def test_families_that_are_not_listed(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path / "m", name)
    checkpoint = Checkpoint.open(to_float32(tmp_path / "m"))
    view = equalized(checkpoint)
    if name in {"exaone4", "olmo2", "olmo3"}:  # norms stand behind linears, none before them
        assert view is checkpoint
        return
    before, after = streamed_logits(checkpoint, TOKENS % 200), streamed_logits(view, TOKENS % 200)
    assert not torch.equal(before, after)
    # A token whose experts are nearly as good as others may get others.
    close = torch.isclose(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())).all(dim=-1)
    assert close.float().mean() > 0.9


def test_experts_and_routers_are_reached(tmp_path: Path) -> None:
    save_decoder(tmp_path / "m", "qwen3_next")
    checkpoint = Checkpoint.open(tmp_path / "m")
    view = equalized(checkpoint)
    for name in sorted(checkpoint.names):
        reads = any(part in name for part in ("gate", "up_proj", "q_proj", "k_proj", "v_proj", "in_proj"))
        if name.endswith(".weight") and ".layers." in name and "norm" not in name:
            assert torch.equal(view.tensor(name), checkpoint.tensor(name)) is not reads, name


def test_weights_that_a_format_holds_exactly_stay(tmp_path: Path) -> None:
    save_decoder(tmp_path / "m", "gpt_oss")

    class Stored(Mxfp4View):
        """As if its experts were stored in MXFP4."""

        def __init__(self, base: Checkpoint) -> None:
            super().__init__(base)
            self._names = base.names

        @property
        def dequantized(self) -> frozenset[str]:
            return frozenset(name for name in self.names if ".experts." in name)

    checkpoint = CheckpointView(Stored(Checkpoint.open(tmp_path / "m")))
    view = equalized(checkpoint)
    changed = {name for name in view.names if not torch.equal(view.tensor(name), checkpoint.tensor(name))}
    assert any("q_proj" in name for name in changed)
    assert not any("experts" in name or "router" in name or "post_attention" in name for name in changed)


def test_columns_get_one_size(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = Checkpoint.open(to_float32(save_family(tmp_path / "m", "mistral", byte_tokenizer)))
    view, model, block = equalized(checkpoint), language_model(checkpoint), "model.layers.1."
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ):
        # By a loop over columns, from the weights as they are stored.
        weights = [load_file(checkpoint.directory / "model.safetensors")[f"{block}{name}.weight"] for name in names]
        size = [sum(float((w[:, j] ** 2).mean() / (w**2).mean()) for w in weights) for j in range(weights[0].shape[1])]
        factors = column_factors(view, model, block + names[0])
        assert factors is not None
        even = factors.double() * torch.tensor(size).double().sqrt()
        assert max(size) / min(size) > 50
        assert even.max() / even.min() < 2 ** (1.01 / 8)
        changed = view.tensor(f"{block}{names[-1]}.weight") / weights[-1]
        if names == ("mlp.down_proj",):
            torch.testing.assert_close(changed, factors.expand_as(changed))


def test_heads_share_the_factors_of_their_values(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = Checkpoint.open(to_float32(save_family(tmp_path / "m", "mistral", byte_tokenizer)))
    view = equalized(checkpoint)
    output, values = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    factors = (view.tensor(output) / checkpoint.tensor(output))[0]
    heads, kept, width = 4, 2, 16
    norm = (view.tensor(values) / checkpoint.tensor(values)).median(dim=1).values
    for column in range(heads * width):
        value = column // width // (heads // kept) * width + column % width
        assert float(factors[column] * norm[value]) == pytest.approx(float(factors[0] * norm[0]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_norms_are_exact(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, name: str, offset: float, dtype: torch.dtype
) -> None:
    directory = save_family(tmp_path / "m", name, byte_tokenizer)
    file = directory / "model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    checkpoint = Checkpoint.open(directory)
    view, model = equalized(checkpoint), language_model(checkpoint)
    norm, linear = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
    factors = column_factors(view, model, linear)
    assert factors is not None
    got, expected = view.tensor(norm).double() + offset, checkpoint.tensor(norm).double() + offset
    assert view.tensor(norm).dtype == dtype
    torch.testing.assert_close(got * factors.double(), expected, rtol=1e-6, atol=0)
    assert (factors != 1).any()


def test_a_view_repeats(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = Checkpoint.open(to_float32(save_family(tmp_path / "m", "llama", byte_tokenizer)))
    view = equalized(checkpoint)
    assert isinstance(view, EqualizedView)
    assert equalized(view) is view
    assert original_of(view) is checkpoint
    assert original_of(checkpoint) is checkpoint
    assert view.changes == {EQUALIZED: 1}
    assert view.fingerprint not in (checkpoint.fingerprint, "")
    copied = pickle.loads(pickle.dumps(equalized(checkpoint)))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            other = equalized(Checkpoint.open(checkpoint.directory))
            for name in sorted(checkpoint.names, reverse=True):
                assert torch.equal(view.tensor(name), other.tensor(name)), name
                assert torch.equal(view.tensor(name), copied.tensor(name)), name
    finally:
        torch.set_num_threads(threads)


def test_dead_and_huge_channels_stay_finite(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    directory = save_family(tmp_path / "m", "llama", byte_tokenizer)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor[:, 3] = 0
        if name.endswith("norm.weight"):
            tensor[5], tensor[7] = 0, -tensor[7]
    tensors["model.layers.0.mlp.down_proj.weight"][:, 4] = 60000
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint.open(directory)
    before, after = streamed_logits(checkpoint, TOKENS), streamed_logits(equalized(checkpoint), TOKENS)
    assert after.isfinite().all()
    torch.testing.assert_close(after, before, rtol=0, atol=5e-3 * float(before.abs().max()))


def test_language_model_of_a_model_with_vision(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = Checkpoint.open(to_float32(save_with_vision(tmp_path / "m", "gemma3", byte_tokenizer)))
    view = equalized(checkpoint)
    before, after = streamed_logits(checkpoint, TOKENS), streamed_logits(view, TOKENS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-4 * float(before.abs().max()))
    towers = [name for name in checkpoint.names if "vision" in name or "projector" in name]
    assert towers
    assert all(torch.equal(view.tensor(name), checkpoint.tensor(name)) for name in towers)


def test_other_rules_are_refused(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint: Any = Checkpoint.open(save_family(tmp_path / "m", "llama", byte_tokenizer))
    assert equalized_as(checkpoint, None, tmp_path) is checkpoint
    assert equalized_as(checkpoint, "1", tmp_path).fingerprint == equalized(checkpoint).fingerprint
    with pytest.raises(CheckpointError, match=r"equalized by rules 7\. Expected rules 1"):
        equalized_as(checkpoint, 7, tmp_path)
