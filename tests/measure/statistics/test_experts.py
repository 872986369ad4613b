"""Statistics of experts, beside plain autograd over a whole Mixtral in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.measure import input_group
from bpwise.measure.measurement import MeasuredLinear, Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.statistics import probes
from bpwise.measure.statistics.heldout import HeldOut
from bpwise.measure.text.calibration import CalibrationSet
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, MixtralConfig

from ...measured import SeenCurves, damage_of
from ...rounded import Measured

HIDDEN, NEURONS, BLOCKS, EXPERTS = 64, 96, 2, 5
UNCHOSEN = 4
ROW_TOKENS = 32
CONFIG = MixtralConfig(
    vocab_size=96,
    hidden_size=HIDDEN,
    intermediate_size=NEURONS,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral whose last expert is never chosen."""
    place = tmp_path_factory.mktemp("mixtral")
    model = AutoModelForCausalLM.from_config(CONFIG)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(1 + noise if "norm" in name else noise)
        for block in model.model.layers:
            # Of a row and its negative one is above the zero of the last expert, and two are chosen.
            router = block.mlp.gate.weight
            router[1], router[3], router[UNCHOSEN] = -router[0], -router[2], 0
    model.save_pretrained(place)
    return place


def calibration(rows: int) -> CalibrationSet:
    ids = torch.randint(0, CONFIG.vocab_size, (rows, ROW_TOKENS), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * rows, description="random ids", adds_bos=False)


@dataclass
class Seen:
    """What one expert saw in the whole model: of each token that chose it, by linear."""

    tokens: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def square_gradients(self, *names: str) -> list[Tensor]:
        gradients = [self.outputs[name].grad for name in names]
        return [torch.zeros(0, 1) if gradient is None else gradient.square() for gradient in gradients]


def by_plain_backward(directory: Path, tokens: Tensor, signs: Tensor) -> list[list[Seen]]:
    """Run the model forward and backward, its experts one by one; return what they saw, by block and expert.

    What is propagated back from the logits is F p^-1/2 z, with their Fisher matrix F = diag(p) - p p^T and the signs z.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    everything: list[list[Seen]] = []

    def experts_of(module: Any) -> Any:
        seen_here: list[Seen] = []
        everything.append(seen_here)

        def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            total = torch.zeros_like(hidden)
            for number in range(EXPERTS):
                mask = (chosen == number).any(dim=1)
                share = (weights * (chosen == number)).sum(dim=1)[mask]
                seen = Seen(mask.nonzero()[:, 0])
                seen_here.append(seen)
                gate, up = module.gate_up_proj[number].split(NEURONS)
                x = hidden[mask]
                seen.inputs["w1"] = seen.inputs["w3"] = x.detach()
                seen.outputs["w1"], seen.outputs["w3"] = linear(x, gate), linear(x, up)
                inner = silu(seen.outputs["w1"]) * seen.outputs["w3"]
                seen.inputs["w2"] = inner.detach()
                seen.outputs["w2"] = linear(inner, module.down_proj[number])
                for output in seen.outputs.values():
                    output.retain_grad()
                total[mask] += seen.outputs["w2"] * share[:, None]
            return total

        return forward

    for block in model.model.layers:
        block.mlp.experts.forward = experts_of(block.mlp.experts)
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    p = logits.detach().softmax(dim=-1)
    logits.backward(torch.einsum("tij,tj->ti", p.diag_embed() - p[:, :, None] * p[:, None], p.rsqrt() * signs))
    return everything


@dataclass
class Run:
    measurement: Measurement
    grams: dict[str, Tensor]
    expected: list[list[Seen]]

    def linear(self, block: int, expert: int, name: str) -> MeasuredLinear:
        full = f"model.layers.{block}.block_sparse_moe.experts.{expert}.{name}"
        return next(x for x in self.measurement.linears if x.name == full)

    def gram(self, block: int, expert: int, name: str) -> Tensor:
        return self.grams[f"model.layers.{block}.block_sparse_moe.experts.{expert}.{name}"]


def run_of(directory: Path, work: Path, rows: int, **settings: Any) -> Run:
    curves = SeenCurves(64)
    signs: list[Tensor] = []
    chosen = calibration(rows)
    with pytest.MonkeyPatch.context() as patch:
        draw = probes._signs

        def spied_signs(*args: Any) -> Tensor:
            signs.append(draw(*args))
            return signs[-1]

        patch.setattr(probes, "_signs", spied_signs)
        patch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", 5 * ROW_TOKENS)  # several micro-batches
        patch.setattr(input_group, "cross_validate_damping", lambda *_args, **_options: HeldOut(0.02, 1.0))
        config = MeasureConfig(device="cpu", **settings)
        measurement = measure_checkpoint(Checkpoint.open(directory), chosen, config, [curves], work)
    plain = torch.where(torch.cat(signs) < 0, -1.0, 1.0)
    grams = {name: inputs.gram for inputs in curves.seen for name in inputs.names}
    return Run(measurement, grams, by_plain_backward(directory, chosen.tokens, plain))


@pytest.fixture(scope="module")
def run(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Enough rows for every expert but one to see more tokens than its matrices have rows."""
    yield run_of(directory, tmp_path_factory.mktemp("run"), rows=20)


@pytest.fixture(scope="module")
def short_run(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """So few rows that most experts see fewer tokens than their matrices have rows."""
    yield run_of(directory, tmp_path_factory.mktemp("run"), rows=3)


PLACES = [(block, expert) for block in range(BLOCKS) for expert in range(EXPERTS) if expert != UNCHOSEN]
STAGES = [("w1", "w3"), ("w2",)]


def test_the_test_tells_what_it_should(run: Run, short_run: Run) -> None:
    assert all(len(run.expected[block][expert].tokens) > NEURONS for block, expert in PLACES)
    few = [len(short_run.expected[block][expert].tokens) for block, expert in PLACES]
    assert min(few) > 0
    assert sum(count < HIDDEN for count in few) >= 4
    for made in (run, short_run):
        assert [len(made.expected[block][UNCHOSEN].tokens) for block in range(BLOCKS)] == [0, 0]


@pytest.mark.parametrize("stage", STAGES, ids="+".join)
def test_gram_matrix_over_the_tokens_that_chose_the_expert(run: Run, stage: tuple[str, ...]) -> None:
    for block, expert in PLACES:
        seen = run.expected[block][expert]
        weights = sum(square.sum(dim=1) for square in seen.square_gradients(*stage))
        inputs = seen.inputs[stage[0]]
        expected = (weights * inputs.T) @ inputs / weights.sum()
        for name in stage:
            got = run.gram(block, expert, name)
            # Weights are gradients in float32 through up to two blocks.
            assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("stage", STAGES, ids="+".join)
def test_token_weights_are_zero_where_another_expert_was_chosen(run: Run, stage: tuple[str, ...]) -> None:
    tokens = run.measurement.tokens.size
    for block, expert in PLACES:
        seen = run.expected[block][expert]
        expected = torch.zeros(tokens, dtype=torch.float64)
        expected[seen.tokens] = sum(square.sum(dim=1) for square in seen.square_gradients(*stage))
        expected /= expected.mean()
        for name in stage:
            got = torch.from_numpy(run.linear(block, expert, name).token_weights).double().flatten()
            assert torch.equal(got == 0, expected == 0)
            assert float(((got - expected).abs() / expected.clamp(min=1e-3)).max()) < 2e-3  # kept in float16


def expected_fisher(run: Run, block: int, expert: int, name: str) -> Tensor:
    """Mean over all tokens of the squared gradients, a token of the mean gradient of all experts counted in."""
    everywhere = torch.cat([seen.square_gradients(name)[0] for seen in run.expected[block] if len(seen.tokens)])
    seen = run.expected[block][expert]
    own = seen.square_gradients(name)[0].sum(dim=0) if len(seen.tokens) else 0
    return (own + everywhere.mean(dim=0)) / run.measurement.tokens.size


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_fisher(run: Run, short_run: Run, name: str) -> None:
    for made in (run, short_run):
        for block in range(BLOCKS):
            for expert in range(EXPERTS):
                got = torch.from_numpy(made.linear(block, expert, name).fisher).double()
                expected = expected_fisher(made, block, expert, name)
                assert float((got - expected).abs().max()) < 1e-4 * float(expected.max())


@pytest.mark.parametrize("stage", STAGES, ids="+".join)
def test_other_tokens_fill_up_what_a_matrix_lacks(short_run: Run, stage: tuple[str, ...]) -> None:
    width = HIDDEN if stage == STAGES[0] else NEURONS
    for block, expert in PLACES:
        seen = short_run.expected[block][expert]
        own = sum(square.sum(dim=1) for square in seen.square_gradients(*stage))
        got = torch.from_numpy(short_run.linear(block, expert, stage[0]).token_weights).double().flatten()
        chose = torch.zeros(len(got), dtype=torch.bool)
        chose[seen.tokens] = True
        assert int((got > 0).sum()) == max(len(own), min(width, len(got)))
        ratio = float(own.mean()) / float(got[chose].mean())
        assert torch.allclose(got[chose] * ratio, own, rtol=2e-3, atol=1e-3 * float(own.mean()))  # float16
        added = got[~chose & (got > 0)]  # none where enough chose it
        assert torch.allclose(added, 0.1 * got[chose].mean().expand_as(added), rtol=2e-3)


def test_all_tokens_count_if_asked(directory: Path, tmp_path: Path) -> None:
    made = run_of(directory, tmp_path, rows=3, moe_calibrate_all=True)
    for measured in made.measurement.linears:
        if ".experts." in measured.name:
            assert bool((measured.token_weights > 0).all())


def test_an_expert_that_no_token_chooses(directory: Path, run: Run, tmp_path: Path) -> None:
    made = Measured(directory, run.measurement, tmp_path)
    plan = made.plan(5.0)
    rounded = made.round(plan, tmp_path)
    source = language_model(Checkpoint.open(directory))
    for block in range(BLOCKS):
        for name in ("w1", "w2", "w3"):
            measured = run.linear(block, UNCHOSEN, name)
            damage = torch.from_numpy(damage_of(run.measurement, measured.name))
            assert bool((damage > 0).all())
            assert bool(damage.isfinite().all())
            weight = source.tensor(f"{measured.name}.weight").float()
            error = made.linear(rounded, measured.name).dequantize().float() - weight
            width = next(x for x in plan.linears if x.name == measured.name).bpw
            # Rounding to nearest makes an error of about 2 ** (1 - bits) of a normal weight's size.
            assert float(error.norm() / weight.norm()) < 2 ** (2 - width)


def test_how_many_tokens_chose_each_expert(run: Run, short_run: Run) -> None:
    for made in (run, short_run):
        for block in range(BLOCKS):
            for expert in range(EXPERTS):
                count = len(made.expected[block][expert].tokens)
                assert [made.linear(block, expert, name).chosen_tokens for name in ("w1", "w2", "w3")] == [count] * 3
        shared = [x for x in (*made.measurement.linears, made.measurement.head) if ".experts." not in x.name]
        assert len(shared) == 1 + 4 * BLOCKS
        assert {x.chosen_tokens for x in shared} == {None}


def test_what_is_said_of_experts(run: Run, short_run: Run) -> None:
    assert run.measurement.experts_sentence == (
        "2 of 10 were chosen by fewer than 100 tokens, least: model.layers.0.block_sparse_moe.experts.4 by 0"
    )
    assert short_run.measurement.experts_sentence.startswith("10 of 10 were chosen by fewer than 100 tokens")
