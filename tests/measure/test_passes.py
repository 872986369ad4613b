import itertools
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.rounding.feedback import round_linear
from bpwise.errors import ConfigError, NumericalError
from bpwise.linalg.row_groups import grouped_rows
from bpwise.measure import input_group
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.curves import CurveInputs, CurveMaker, LinearCurves, TableInputs
from bpwise.measure.device import resolve_device
from bpwise.measure.measurement import MeasuredLinear, Measurement
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.passes import MeasuringPasses
from bpwise.measure.run import MeasureConfig, measure_checkpoint, measure_to_file
from bpwise.measure.statistics import probes
from bpwise.measure.statistics.heldout import DAMPINGS, HeldOut
from bpwise.measure.statistics.sketch import COUPLING_RANK
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.progress import Progress, silent
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from ..measured import WIDTHS, Given, SeenCurves, damage_of, gguf_curves_of, order_of

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,  # groups of 64 rows leave a short one
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
CONFIG = MeasureConfig(device="cpu")
INNER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def save_model(directory: Path, config: PreTrainedConfig, change: Callable[[nn.Module], None] | None = None) -> Path:
    model = AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(1 + noise if "norm" in name else noise)
        if change is not None:
            change(model)
    model.save_pretrained(directory)
    return directory


def rows(count: int = 12) -> CalibrationSet:
    ids = torch.randint(0, SIZES["vocab_size"], (count, 32), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * count, description="random ids", adds_bos=False)


def measure(
    directory: Path, work: Path, progress: Progress = silent, curves: CurveMaker | None = None, **settings: Any
) -> Measurement:
    makers = [Exl2Curves(64), *gguf_curves_of(directory)] if curves is None else [curves]
    config = MeasureConfig(device="cpu", **settings)
    return measure_checkpoint(Checkpoint.open(directory), rows(), config, makers, work, progress)


@dataclass
class Expected:
    gram: dict[str, Tensor]
    halves: dict[str, list[Tensor]]
    fisher: dict[str, Tensor]
    token_weights: dict[str, Tensor]
    fisher_matrix: dict[str, Tensor]


def by_plain_backward(directory: Path, signs: Tensor) -> Expected:
    """Means over tokens of w x x^T and (dL/dy)^2 of every linear, by hooks on the whole model in float64.

    The first of these over even and over odd rows, too.

    w, the weight of a token, is the sum of (dL/dy)^2 over all outputs of a linear, of gate and up together, scaled to
    mean 1. What is propagated back from the logits is F p^-1/2 z, with their Fisher matrix F = diag(p) - p p^T and the
    signs z. The head's Fisher is its exact expectation p (1 - p) over the model's own predictions.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                inputs[name] = args[0].detach().flatten(0, 1)
                output.retain_grad()
                outputs[name] = output

            module.register_forward_hook(keep)
    logits = model(input_ids=rows().tokens, use_cache=False).logits.flatten(0, 1)
    probabilities = logits.detach().softmax(dim=-1)
    fishers = probabilities.diag_embed() - probabilities[:, :, None] * probabilities[:, None]
    logits.backward(torch.einsum("tij,tj->ti", fishers, probabilities.rsqrt() * signs))
    tokens = len(logits)
    squares = {name: output.grad.flatten(0, 1).square() for name, output in outputs.items()}
    squares["lm_head"] = probabilities * (1 - probabilities)
    weights: dict[str, Tensor] = {}
    for name in squares:
        pair = [name.replace("gate_proj", "up_proj"), name.replace("up_proj", "gate_proj")]
        shared = pair if name in pair and pair[0] != pair[1] else [name]
        total = sum(squares[other].sum(dim=1) for other in shared)
        weights[name] = total / total.mean()
    of_half = [torch.arange(tokens) // rows().tokens.shape[1] % 2 == parity for parity in range(2)]
    return Expected(
        halves={
            name: [(weights[name][half] * x[half].T) @ x[half] / weights[name][half].sum() for half in of_half]
            for name, x in inputs.items()
        },
        gram={name: (weights[name] * x.T) @ x / tokens for name, x in inputs.items()},
        fisher={name: square.sum(dim=0) / tokens for name, square in squares.items()},
        token_weights=weights,
        fisher_matrix={
            name: output.grad.flatten(0, 1).T @ output.grad.flatten(0, 1) / tokens for name, output in outputs.items()
        },
    )


@dataclass
class Run:
    directory: Path
    measurement: Measurement
    grams: list[Tensor]
    halves: list[list[Tensor]]
    expected: Expected

    def linear(self, name: str) -> MeasuredLinear:
        return next(x for x in (*self.measurement.linears, self.measurement.head) if x.name == name)


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One measurement in small micro-batches, with the Gram matrices and the signs that it made."""
    place = tmp_path_factory.mktemp("run")
    directory = save_model(place / "model", CONFIGS[request.param])
    seen = SeenCurves(64)
    halves: list[list[Tensor]] = []
    signs: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = probes._signs

        def spied_signs(*args: Any) -> Tensor:
            signs.append(draw(*args))
            return signs[-1]

        patch.setattr(probes, "_signs", spied_signs)
        patch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", 5 * 32)  # 5 + 5 + 2 rows

        def spied_halves(_weights: Sequence[Tensor], of_stage: Sequence[Tensor], *_: Any, **_options: Any) -> HeldOut:
            halves.append([gram.clone() for gram in of_stage])
            return HeldOut(0.02, 1.0)

        patch.setattr(input_group, "cross_validate_damping", spied_halves)
        for module in ("inputs", "sketch"):
            name = f"bpwise.measure.statistics.{module}.subsample_tokens"
            patch.setattr(name, lambda weights, _rng: (slice(None), weights))
        measurement = measure(directory, place / "work", curves=seen)
    assert len(signs) > 1  # 384 positions go through the head in more than one part
    yield Run(
        directory,
        measurement,
        [inputs.gram for inputs in seen.seen],
        halves,
        by_plain_backward(directory, torch.where(torch.cat(signs) < 0, -1.0, 1.0)),
    )


def block_names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{inner}" for inner in INNER]


def test_every_linear_in_model_order(run: Run) -> None:
    assert [x.name for x in run.measurement.linears] == block_names(0) + block_names(1)
    assert run.measurement.head.name == "lm_head"
    assert list(run.measurement.curves["exl2"].linears) == block_names(0) + block_names(1) + ["lm_head"]
    assert run.measurement.curves["exl2"].header == {"widths": [8, 6, 5, 4, 3, 2], "group_size": 64}


# The order in which the passes reach the stages: the head, then the blocks from the last to the first.
STAGES = ("lm_head", *(f"model.layers.{n}.{INNER[k]}" for n in (1, 0) for k in (0, 1, 2, 3, 4, 6)))


def test_halves_are_whole_rows(run: Run) -> None:
    # Eight rows go through the head together.
    for name, halves in zip(STAGES, run.halves, strict=True):
        for half, expected in zip(halves, run.expected.halves[name], strict=True):
            # As below.
            assert float((half - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name


def test_gram_matrices(run: Run) -> None:
    for name, gram in zip(STAGES, run.grams, strict=True):
        expected = run.expected.gram[name]
        # Weights are gradients in float32 through up to two blocks.
        assert float((gram - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name


def test_token_weights(run: Run) -> None:
    for linear in (*run.measurement.linears, run.measurement.head):
        expected = run.expected.token_weights[linear.name]
        assert linear.token_weights.shape == (12, 32)
        got = torch.from_numpy(linear.token_weights).double().flatten()
        # Kept in float16.
        assert float(((got - expected).abs() / expected.clamp(min=1e-3)).max()) < 2e-3, linear.name


def test_coupling(run: Run) -> None:
    few_outputs = [linear for linear in run.measurement.linears if linear.out_features <= 64]
    assert len(few_outputs) == 10  # of them the sketch sees all directions
    for linear in few_outputs:
        matrix = run.expected.fisher_matrix[linear.name]
        values, vectors = torch.linalg.eigh(matrix)
        leading = vectors[:, -COUPLING_RANK:] * values[-COUPLING_RANK:]
        expected = leading @ vectors[:, -COUPLING_RANK:].T
        factor = torch.from_numpy(linear.coupling).double() * torch.from_numpy(linear.fisher).double().sqrt()[:, None]
        # Float16, of a matrix of float32 gradients.
        assert float((factor @ factor.T - expected).abs().max()) < 5e-3 * float(matrix.diagonal().max()), linear.name
    assert run.measurement.head.coupling.shape == (SIZES["vocab_size"], 0)


def test_measurement_brings_its_rows(run: Run) -> None:
    again = measured_rows(run.measurement)
    assert again.fingerprint == rows().fingerprint
    assert again.description == "random ids"


def test_fisher(run: Run) -> None:
    assert len(run.measurement.linears) == 14
    for linear in (*run.measurement.linears, run.measurement.head):
        got, expected = torch.from_numpy(linear.fisher).double(), run.expected.fisher[linear.name]
        # Gradients in float32 through up to two blocks.
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.max()), linear.name


def test_input_powers(run: Run) -> None:
    for linear in (*run.measurement.linears, run.measurement.head):
        power = run.expected.gram[linear.name].diagonal().numpy()
        assert np.allclose(linear.input_power, power, rtol=1e-4)


def test_rows_are_grouped_by_what_errors_cost_and_by_their_weights(run: Run) -> None:
    source = Checkpoint.open(run.directory)
    for linear in (*run.measurement.linears, run.measurement.head):
        stored = f"{linear.name}.weight" if f"{linear.name}.weight" in source.names else "model.embed_tokens.weight"
        gram, fisher = run.expected.gram[linear.name], run.expected.fisher[linear.name]
        damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        costs = 1 / torch.linalg.inv(damped).diagonal()
        powers = fisher @ source.tensor(stored).double().square()
        expected = grouped_rows(costs.float(), powers.float(), 64)
        groups, wanted = (
            [set(part.tolist()) for part in order.split(64)]
            for order in (torch.from_numpy(order_of(run.measurement, linear.name)), expected)
        )
        assert groups == wanted, linear.name


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj", "lm_head"],
)
def test_damage_is_the_second_order_divergence(run: Run, name: str, bits: int) -> None:
    source = Checkpoint.open(run.directory)
    stored = f"{name}.weight" if f"{name}.weight" in source.names else "model.embed_tokens.weight"
    weight = source.tensor(stored).float()
    gram, fisher = run.expected.gram[name], run.expected.fisher[name]
    damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    order = torch.from_numpy(order_of(run.measurement, name)).long()
    upper = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)).float()
    groups = [RowGroup(bits, 64), *([RowGroup(bits, 32)] if len(gram) == 96 else [])]
    rounded, _ = round_linear(weight.T.contiguous(), upper, groups, order, fisher.float())
    delta = rounded.dequantize().double() - weight.double()
    expected = 0.5 * float((fisher * torch.einsum("ni,ij,nj->n", delta, damped, delta)).sum())
    got = float(damage_of(run.measurement, name)[:, WIDTHS.index(bits)].sum())
    # float16 rounding of the decoded weight (up to 1 % at 8 bits), and weights near the middle between two codes that
    # fall to the other side with a Gram matrix from another arithmetic.
    assert got == pytest.approx(expected, rel=0.02)


def test_damage_grows_as_bits_shrink(run: Run) -> None:
    for linear in (*run.measurement.linears, run.measurement.head):
        damage = damage_of(run.measurement, linear.name)
        assert damage.shape == (-(-linear.in_features // 64), 6)
        assert bool((np.diff(damage.sum(axis=0)) > 0).all()), linear.name


def test_damping_is_recorded(run: Run) -> None:
    for linear in (*run.measurement.linears, run.measurement.head):
        assert linear.damping == pytest.approx(0.02)


def test_damping_is_chosen_for_each_stage(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    measured = measure(directory, tmp_path / "work")
    assert all(min(abs(linear.damping - choice) for choice in DAMPINGS) < 1e-6 for linear in measured.linears)
    fixed = measure(directory, tmp_path / "fixed", damping=0.05)
    assert all(linear.damping == pytest.approx(0.05) for linear in (*fixed.linears, fixed.head))


def test_damage_is_that_on_held_out_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    made = []
    for generalization_ratio in (1.0, 2.5):
        monkeypatch.setattr(
            input_group,
            "cross_validate_damping",
            lambda *_args, held=generalization_ratio, **_options: HeldOut(0.02, held),
        )
        made.append(measure(directory, tmp_path / f"work-{generalization_ratio}"))
    for format_, linear in itertools.product(made[0].curves, made[0].linears):
        plain, inflated = (damage_of(each, linear.name, format_) for each in made)
        assert np.allclose(2.5 * plain, inflated)


def test_probes_have_the_fisher_matrix_of_the_logits_as_their_covariance() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.2, 0.05, 0.0], dtype=torch.float64)
    logits = probabilities.log().float().expand(40000, -1)
    rng = np.random.default_rng(0)
    drawn, (outputs, weights) = probes.probe_logits(logits, rng, None, torch.empty(logits.shape))
    expected = probabilities.diag() - probabilities[:, None] * probabilities
    # Products of two entries are below 1: standard errors below 1 / sqrt(40000) = 0.005.
    assert float((drawn.T @ drawn / len(drawn) - expected).abs().max()) < 0.01
    assert float(drawn.mean(dim=0).abs().max()) < 0.01
    assert torch.allclose(outputs / len(drawn), expected.diagonal().float(), rtol=1e-4)
    assert torch.allclose(weights, expected.diagonal().sum().float().expand(len(drawn)), rtol=1e-4)


def test_probes_where_the_model_is_nearly_sure_differ_little_in_size() -> None:
    rare = 0.001
    logits = torch.tensor([1 - rare, rare]).log().expand(1000, -1)
    drawn, _ = probes.probe_logits(logits, np.random.default_rng(0), None, torch.empty(logits.shape))
    sizes = drawn.square().sum(dim=1)
    mean = 2 * rare * (1 - rare)
    # Of a sampled target one in a thousand would have a thousand times the mean and the others nothing.
    assert bool(((sizes > 0.5 * mean) & (sizes < 2 * mean)).all())


def test_signs_are_those_of_fair_coins() -> None:
    signs = probes._signs(torch.Size((50, 1001)), np.random.default_rng(0))
    assert signs.shape == (50, 1001)
    negative = (signs < 0).double()
    # Standard errors: 0.5 / sqrt(50050) = 0.0022 of all, 0.5 / sqrt(50) = 0.07 of a column.
    assert abs(float(negative.mean()) - 0.5) < 0.011
    assert float((negative.mean(dim=0) - 0.5).abs().max()) < 0.36
    neighbours = torch.corrcoef(torch.stack([negative[:, :-1].flatten(), negative[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.025  # 1 / sqrt(50000) = 0.0045


class Killed(Exception):
    pass


@dataclass
class Whole:
    directory: Path
    image: bytes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A small model of three blocks, and what measuring it without a break gives."""
    place = tmp_path_factory.mktemp("whole")
    small = {**SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    directory = save_model(place / "model", LlamaConfig(**small))
    return Whole(directory, measure(directory, place / "work").to_bytes())


def killing(stage: str, after: int) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    """Progress that lets ``after`` blocks of a stage pass."""

    def progress(items: Sequence[Any], name: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if name == stage and number == after:
                raise Killed
            yield item

    return progress


@contextmanager
def watched_blocks(announced: list[int | None] | None = None) -> Iterator[list[int]]:
    """The blocks whose weights are loaded, in order; and which block each is said to be followed by."""
    loaded: list[int] = []
    original = StreamedModel.block
    with pytest.MonkeyPatch.context() as patch:

        def block(self: StreamedModel, index: int, then: int | None = None) -> Any:
            loaded.append(index)
            if announced is not None:
                announced.append(then)
            return original(self, index, then)

        patch.setattr(StreamedModel, "block", block)
        yield loaded


@pytest.mark.parametrize(
    ("stage", "after", "remaining"),
    [
        ("measure: forward", 0, [0, 1, 2, 2, 1, 0]),
        ("measure: forward", 2, [2, 2, 1, 0]),
        ("measure: backward, curves", 0, [2, 1, 0]),
        ("measure: backward, curves", 1, [1, 0]),
        ("measure: backward, curves", 2, [0]),
    ],
    ids=["at-once", "forward", "after-the-head", "backward", "last-block"],
)
def test_goes_on_where_it_was_cut_off(
    whole: Whole, tmp_path: Path, stage: str, after: int, remaining: list[int]
) -> None:
    with pytest.raises(Killed):
        measure(whole.directory, tmp_path / "work", killing(stage, after))
    announced: list[int | None] = []
    with watched_blocks(announced) as loaded:
        resumed = measure(whole.directory, tmp_path / "work")
    assert loaded == remaining
    # Nothing is read ahead that is not needed: each is followed by the next, except where the forward pass ends.
    assert announced == [None if then == index else then for index, then in itertools.pairwise([*loaded, None])]
    assert resumed.to_bytes() == whole.image


def test_a_finished_run_is_only_read_again(whole: Whole, tmp_path: Path) -> None:
    measure(whole.directory, tmp_path / "work")
    with watched_blocks() as loaded:
        assert measure(whole.directory, tmp_path / "work").to_bytes() == whole.image
    assert loaded == []


@pytest.mark.parametrize("cut", [False, True], ids=["at-once", "cut-off"])
def test_states_in_files_change_nothing(whole: Whole, tmp_path: Path, cut: bool) -> None:
    if cut:
        with pytest.raises(Killed):
            measure(whole.directory, tmp_path / "work", killing("measure: backward, curves", 1))
    files = tmp_path / "files"
    assert measure(whole.directory, tmp_path / "work", offload_dir=files).to_bytes() == whole.image
    assert not list(files.iterdir())


def test_a_cut_after_every_piece_does_not_show(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The finest grain: every run dies right after the first artifact that was not there, and before anything else
    # happens. (What belongs to one block is kept in two artifacts: a cut between them repeats the first.)
    save = ResumeStore.save
    saved: list[str] = []

    def save_and_die(self: ResumeStore, artifact: str, *args: Any) -> None:
        save(self, artifact, *args)
        if artifact not in saved:
            saved.append(artifact)
            raise Killed

    monkeypatch.setattr(ResumeStore, "save", save_and_die)
    for _ in range(30):
        try:
            resumed = measure(whole.directory, tmp_path / "work")
            break
        except Killed:
            continue
    assert resumed.to_bytes() == whole.image
    assert len(saved) >= 10  # inputs and gradients of the three blocks, and curves, at the least


@pytest.mark.parametrize(
    ("stage", "after", "artifacts"),
    [
        ("measure: forward", 2, ["input-1", "input-2"]),
        ("measure: backward, curves", 1, ["input-1", "curves-2", "gradient-2", "head"]),
        ("", 0, ["input-2", "head", "curves-0", "curves-2", "gradient-0", "embedding"]),
    ],
    ids=["forward", "backward", "finished"],
)
def test_damaged_pieces_are_made_again(
    whole: Whole, tmp_path: Path, stage: str, after: int, artifacts: list[str]
) -> None:
    work = tmp_path / "work"
    if stage:
        with pytest.raises(Killed):
            measure(whole.directory, work, killing(stage, after))
    else:
        measure(whole.directory, work)
    shutil.copytree(work, tmp_path / "cut-off")
    for number, artifact in enumerate(artifacts):  # each together with the one before it
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "cut-off", work)
        (directory,) = work.iterdir()
        (directory / f"{artifacts[number - 1]}.safetensors").unlink()
        file = directory / f"{artifact}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*damaged. It is made again")  # not of artifacts that are not needed
            assert measure(whole.directory, work).to_bytes() == whole.image, artifact


def test_other_options_do_not_take_over_pieces(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    first = measure(directory, tmp_path / "work", seed=0)
    other = measure(directory, tmp_path / "work", seed=1)
    assert not np.array_equal(first.linears[0].fisher, other.linears[0].fisher)
    assert other.to_bytes() == measure(directory, tmp_path / "alone", seed=1).to_bytes()


def test_measurement_does_not_depend_on_the_global_generator(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    torch.manual_seed(1)
    first = measure(directory, tmp_path / "a").to_bytes()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert measure(directory, tmp_path / "b").to_bytes() == first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("layer", [0, 1])
def test_infinity_names_the_block(tmp_path: Path, layer: int) -> None:
    def overflow(model: Any) -> None:
        model.model.layers[layer].mlp.down_proj.weight.mul_(1e38)

    directory = save_model(tmp_path / "model", CONFIGS["llama"], overflow)
    with pytest.raises(NumericalError, match=rf"^model\.layers\.{layer}: NaN or infinity"):
        measure(directory, tmp_path / "work")


def test_input_width_that_exl2_cannot_hold_is_measured(tmp_path: Path) -> None:
    # The plan leaves such a linear unquantized; GGUF has types for it.
    directory = save_model(tmp_path / "model", LlamaConfig(**{**SIZES, "intermediate_size": 80}))
    damage = damage_of(measure(directory, tmp_path / "work"), "model.layers.0.mlp.down_proj")
    assert damage.shape == (2, 6)  # rows of 64 and of 16
    assert bool((damage > 0).all())
    assert bool((np.diff(damage.sum(axis=0)) > 0).all())


def test_dead_inputs_are_measured(tmp_path: Path) -> None:
    def kill(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[:40] = 0  # so 40 inputs of down_proj are always zero

    directory = save_model(tmp_path / "model", CONFIGS["llama"], kill)
    measured = measure(directory, tmp_path / "work")
    assert sorted(order_of(measured, "model.layers.0.mlp.down_proj").tolist()) == list(range(96))
    assert all(np.isfinite(damage_of(measured, x.name)).all() for x in measured.linears)


def test_input_that_is_always_zero_costs_nothing(tmp_path: Path) -> None:
    def kill(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.zero_()

    directory = save_model(tmp_path / "model", CONFIGS["llama"], kill)
    measured = measure(directory, tmp_path / "work")
    down = next(x for x in measured.linears if x.name == "model.layers.0.mlp.down_proj")
    assert down.damping == float("inf")
    # dW^T H dW with H = 0: bits must not go to where no error can show.
    assert not damage_of(measured, down.name).any()


class Constant:
    """A format of another kind: each linear has a damage, one expert of it says, and a damping."""

    name = "constant"
    version = 7
    header = {"choices": ["all"]}  # noqa: RUF012 - as a format has it

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self.warm = False

    def warm_up(self) -> None:
        self.warm = True

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        assert self.warm
        return [LinearCurves(tensors={"damage_nats": torch.ones(1)}, damping=self.damping) for _ in inputs.names]

    def table(self, inputs: TableInputs) -> dict[str, Tensor]:
        assert inputs.embeddings(torch.tensor([3, 5])).shape == (2, 64)
        assert float(inputs.uses.sum()) == pytest.approx(1, abs=1e-4)
        return {"damage_nats": inputs.fisher.sum()[None]}


@pytest.mark.parametrize("damping", [0.001, 10.0, float("inf")])
def test_formats_are_measured_each_for_itself(tmp_path: Path, damping: float) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    checkpoint, own, other = Checkpoint.open(directory), Exl2Curves(64), Constant(damping)
    config = MeasureConfig(device="cpu", damping=0.02)
    alone = measure_checkpoint(checkpoint, rows(), config, [own], tmp_path / "alone")
    both = measure_checkpoint(checkpoint, rows(), config, [other, own], tmp_path / "both")
    assert list(both.curves) == ["constant", "exl2"]
    for linear, again in zip((*alone.linears, alone.head), (*both.linears, both.head), strict=True):
        assert np.array_equal(damage_of(alone, linear.name), damage_of(both, linear.name))
        assert np.array_equal(linear.fisher, again.fisher)
        assert linear.damping == pytest.approx(0.02)
        assert again.damping == pytest.approx(max(0.02, damping))  # the largest that a format took
    assert both.provenance["curves"].keys() == {"constant", "exl2"}
    assert both.provenance["curves"]["exl2"] == alone.provenance["curves"]["exl2"]
    assert both.curves["constant"].table["damage_nats"][0] == pytest.approx(float(both.embedding.importance.sum()))


def test_to_file(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", CONFIGS["llama"])
    output = tmp_path / "new" / "m.safetensors"
    formats = {each.name: Given(each) for each in (Exl2Curves(64), *gguf_curves_of(directory))}
    made = measure_to_file(directory, output, CONFIG, formats=formats, calibration=rows())
    assert Measurement.load(output).to_bytes() == made.to_bytes()
    assert made.to_bytes() == measure(directory, tmp_path / "work").to_bytes()
    assert [path.name for path in output.parent.iterdir()] == ["m.safetensors"]  # nothing of the work is left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping: not usable. Got 0.0"),
        ({"damping": 1.0}, "damping: not usable. Got 1.0"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_config_rejects(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeasureConfig(**settings)


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "cpu:x"])
def test_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device: cannot be used here .* Got '{name}'"):
        resolve_device(name)


def test_devices_that_are_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_precision_is_chosen_kept_and_part_of_what_a_measurement_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    seen: list[str] = []
    plain_pass = MeasuringPasses._forward_block
    monkeypatch.setattr(
        MeasuringPasses,
        "_forward_block",
        lambda self, *args: (plain_pass(self, *args), seen.append(self.precision)),
    )
    checkpoint = Checkpoint.open(save_model(tmp_path / "model", CONFIGS["llama"]))
    made = {
        asked: measure_checkpoint(
            checkpoint, rows(), MeasureConfig(device="cpu", precision=asked), [Exl2Curves(64)], tmp_path / "work"
        )
        for asked in ("auto", "float32")
    }
    assert {asked: each.precision for asked, each in made.items()} == {"auto": "bfloat16", "float32": "float32"}
    assert set(seen) == {"bfloat16", "float32"}  # nothing of the first was taken for the second
    with pytest.raises(ConfigError, match="precision: unknown name"):
        MeasureConfig(precision="half")
