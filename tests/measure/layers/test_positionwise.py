from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.model.structure import BlockStructure, InputGroup
from bpwise.checkpoint.source.original import open_model
from bpwise.measure.layers import positionwise as positions
from bpwise.measure.layers.positionwise import chunked_positionwise
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.statistics import inputs as statistics
from bpwise.measure.statistics.experts import ExpertInputs, collect_experts
from bpwise.measure.statistics.inputs import InputStatistics, collect
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

STAGES = (
    InputGroup(("self_attn.q_proj",)),
    InputGroup(("mlp.gate_proj", "mlp.up_proj")),
    InputGroup(("mlp.down_proj",)),
)
STRUCTURE = BlockStructure(STAGES)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj = nn.Linear(6, 4)
        self.longest = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.longest = max(self.longest, hidden.shape[1])
        result: Tensor = self.down_proj(torch.tanh(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class Block(nn.Module):
    """Every position sees the mean of those before it, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        self.mlp = Mlp()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.self_attn["q_proj"](hidden).cumsum(dim=1) / hidden.shape[1] + hidden
        result: Tensor = mixed + self.mlp(mixed)
        return result


def run(block: Block, *, cut: bool) -> tuple[Tensor, Tensor, list[InputStatistics]]:
    """Two rows of 19 tokens, one after the other."""
    rng = torch.Generator().manual_seed(1)
    outputs, gradients = [], []
    block.mlp.longest = 0
    with collect(block, STRUCTURE, 19) as sums:
        for _ in range(2):
            hidden = torch.randn(1, 19, 4, generator=rng).requires_grad_()
            with chunked_positionwise(block, STRUCTURE) if cut else nullcontext():
                output = block(hidden)
                output.backward(torch.randn(output.shape, generator=rng))
            for each in sums:
                each.end_batch()
            assert hidden.grad is not None
            outputs.append(output.detach())
            gradients.append(hidden.grad)
    return torch.cat(outputs), torch.cat(gradients), sums


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(weights: Tensor, rng: Any) -> tuple[Tensor, Tensor]:
        return torch.arange(len(weights)), weights

    monkeypatch.setattr(positions, "CHUNK_POSITIONS", 5)
    monkeypatch.setattr(statistics, "subsample_tokens", all_of_them)  # which tokens are left out is chance


def test_the_same_numbers() -> None:
    block = Block()
    output, gradient, sums = run(block, cut=False)
    assert block.mlp.longest == 19
    cut_output, cut_gradient, cut_sums = run(block, cut=True)
    assert block.mlp.longest == 5
    # Float32 sums of a dozen numbers around 1, cut in another way.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(cut_output, output, **close)
    torch.testing.assert_close(cut_gradient, gradient, **close)
    for got, expected in zip(cut_sums, sums, strict=True):
        torch.testing.assert_close(torch.cat(got.token_weights), torch.cat(expected.token_weights), **close)
        torch.testing.assert_close(got.fisher, expected.fisher, **close)
        assert got.tokens == 2 * 19
        for half, expected_half in zip(got.halves, expected.halves, strict=True):
            assert half.weight == pytest.approx(expected_half.weight, rel=1e-5)
            torch.testing.assert_close(half.mean(), expected_half.mean(), **close)
        # Each row in a half of its own, whether it comes whole or in pieces.
        for half, of_row in zip(got.halves, torch.cat(got.token_weights).view(2, 19), strict=True):
            assert half.weight == pytest.approx(float(of_row.sum()), rel=1e-5)


def test_without_gradients() -> None:
    block = Block()
    hidden = torch.randn(2, 7, 4)
    with torch.no_grad():
        expected = block(hidden)
        block.mlp.longest = 0
        with chunked_positionwise(block, STRUCTURE):
            torch.testing.assert_close(block(hidden), expected)
        assert block.mlp.longest == 5
        block(hidden)
    assert block.mlp.longest == 7


def test_short_rows_are_not_touched() -> None:
    block = Block()
    with chunked_positionwise(block, STRUCTURE):
        block(torch.randn(1, 5, 4))
    assert block.mlp.longest == 5


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "cohere"])
def test_linears_and_experts_see_one_piece_after_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "shared_expert_intermediate_size": 32}
    config = CONFIG_MAPPING[kind](**sizes, **heads, **experts, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = StreamedModel(open_model(tmp_path / "model"), device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, 48, (2, 19), generator=torch.Generator().manual_seed(1))
    hidden = model.embed(tokens[:1]).repeat(2, 1, 1) + torch.randn(2, 19, 32)
    gradient = torch.randn(2, 19, 32)
    structure = model.structure(0)
    mixed = [group for group in structure.groups if group.expert is not None]

    def passes() -> tuple[Tensor, ExpertInputs, list[InputStatistics]]:
        before = torch.empty_like(hidden)
        with (
            model.block(0) as block,
            collect(block, structure, 19) as sums,
            collect_experts(block, structure, tokens.numel()) as seen,
            chunked_positionwise(block, structure),
        ):
            for row in range(2):
                own = hidden[row : row + 1].clone().requires_grad_()
                model.run_block(0, own, row).backward(gradient[row : row + 1])
                before[row : row + 1] = own.grad
                for each in sums:
                    each.end_batch()
        return before, seen, sums

    cut_before, cut_seen, cut_sums = passes()
    monkeypatch.setattr(positions, "CHUNK_POSITIONS", 100)
    before, seen, sums = passes()
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(cut_before, before, **close)
    torch.testing.assert_close(cut_seen.inputs, seen.inputs, **close)
    for stage in mixed:
        torch.testing.assert_close(cut_seen.sums[stage].weights, seen.sums[stage].weights, **close)
        torch.testing.assert_close(cut_seen.sums[stage].fisher, seen.sums[stage].fisher, **close)
    for got, expected in zip(cut_sums, sums, strict=True):
        torch.testing.assert_close(torch.cat(got.token_weights), torch.cat(expected.token_weights), **close)
        torch.testing.assert_close(got.fisher, expected.fisher, **close)
