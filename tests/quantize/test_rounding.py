import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.plan.plan import Plan, make_plan
from bpwise.convert.exl2.rounding import rounder as rounding
from bpwise.convert.exl2.rounding.rounder import RoundConfig, RoundedModel, round_model
from bpwise.measure.measurement import Measurement
from bpwise.measure.model import states, stream
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.rounding import drift, targets
from bpwise.quantize.rounding.drift import shifted
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from ..measured import order_of

VOCABULARY = 264
LAYERS = 4
CONFIG = RoundConfig(device="cpu")


def token_ids(rows: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 32), generator=torch.Generator().manual_seed(seed))


def calibration() -> CalibrationSet:
    ids = token_ids(24, seed=1)
    return CalibrationSet(tokens=ids, origins=("random",) * len(ids), description="random ids", adds_bos=False)


@dataclass
class Measured:
    directory: Path
    measurement: Measurement
    work: Path

    def plan(self, bpw: float, head_bits: int = 6) -> Plan:
        return make_plan(self.measurement, bpw=bpw, head_bits=head_bits)

    def round(self, plan: Plan, work: Path, config: RoundConfig = CONFIG, progress: Any = None) -> RoundedModel:
        extra = () if progress is None else (progress,)
        checkpoint = Checkpoint.open(self.directory)
        return round_model(checkpoint, self.measurement, plan, config, work, *extra)

    def dense(self, rounded: RoundedModel | None = None) -> Any:
        """The model as Transformers runs it, with its weights replaced by the decoded ones."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        for name in rounded.names if rounded else ():
            module = model.get_submodule(name)
            # A weight of its own: a quantized head is no longer tied to the embedding.
            module.weight = torch.nn.Parameter(rounded.linear(name).dequantize().float())
        return model


def measured_model(directory: Path, place: Path) -> Measured:
    config = MeasureConfig(device="cpu")
    work = place / "measuring"
    return Measured(
        directory, measure_checkpoint(Checkpoint.open(directory), calibration(), config, [Exl2Curves()], work), work
    )


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured_model(tiny_model, tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def deep(save_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Four blocks, so that there are some behind and some ahead of a break."""
    place = tmp_path_factory.mktemp("deep")
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return measured_model(save_model(place / "model", **sizes), place)


def assert_equal_linears(one: QuantizedLinear, other: QuantizedLinear) -> None:
    assert one.groups == other.groups
    for field in ("codes", "scale_codes", "max_scales", "order"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def mean_divergence(original: Any, quantized: Any, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(dim=-1) for model in (original, quantized))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("head_bits", [4, 16])
def test_linears_are_as_planned(measured: Measured, tmp_path: Path, head_bits: int) -> None:
    plan = measured.plan(4.5, head_bits)
    rounded = measured.round(plan, tmp_path)
    plans = [*plan.linears, *([plan.head] if plan.head else [])]
    assert list(rounded.names) == [p.name for p in plans]
    assert ("lm_head" in rounded.names) == (head_bits == 4)
    curves = {curve.name: curve for curve in (*measured.measurement.linears, measured.measurement.head)}
    for p in plans:
        linear = rounded.linear(p.name)
        linear.validate(p.name)
        assert linear.out_features == p.out_features
        assert linear.stored_bits == p.stored_bits
        # The group with the measured rows [32 g, 32 g + 32) has its width, wherever it is stored.
        first = 0
        for group, g in zip(linear.groups, p.stored_order, strict=True):
            assert (group.bits, group.rows) == (p.group_bits[g], p.group_rows[g])
            rows = linear.order[first : first + group.rows]
            order = order_of(measured.measurement, p.name)
            assert rows.tolist() == order[32 * g : 32 * g + group.rows].tolist()
            first += group.rows
        assert rounded.damping(p.name) == pytest.approx(curves[p.name].damping)


def test_weights_stay_near_the_original(measured: Measured, tmp_path: Path) -> None:
    rounded = measured.round(measured.plan(8.0, 8), tmp_path)
    checkpoint = Checkpoint.open(measured.directory)
    for name in rounded.names:
        weight = checkpoint.tensor(f"{name}.weight").float()
        # 8 bits and their error feedback; a transposed or reordered weight would be off by sqrt(2).
        assert float((rounded.linear(name).dequantize().float() - weight).norm() / weight.norm()) < 0.05, name


def test_divergence_falls_with_bits(measured: Measured, tmp_path: Path) -> None:
    original = measured.dense()
    held_out = token_ids(16, seed=99)
    divergences = []
    for bpw, head_bits in ((3.0, 3), (4.0, 4), (6.0, 6), (8.0, 8)):
        rounded = measured.round(measured.plan(bpw, head_bits), tmp_path)
        divergences.append(mean_divergence(original, measured.dense(rounded), held_out))
    ratios = [b / a for a, b in pairwise(divergences)]
    # Noise falls by a factor of four per bit in theory; half of that is asked for.
    assert ratios[0] < 0.5
    assert ratios[1] < 0.25
    assert ratios[2] < 0.25


def output_errors(original: Any, quantized: Any, ids: Tensor) -> list[float]:
    """Squared distance of the outputs of every block, averaged."""
    kept: list[list[Tensor]] = []
    for model in (original, quantized):
        kept.append([])
        handles = [
            layer.register_forward_hook(lambda _m, _a, output, kept=kept[-1]: kept.append(output))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
    return [float((a - b).square().mean()) for a, b in zip(*kept, strict=True)]


def test_drift_is_corrected(measured: Measured, tmp_path: Path) -> None:
    plan = measured.plan(3.0)
    original = measured.dense()
    corrected = measured.dense(measured.round(plan, tmp_path))
    ignored = measured.dense(measured.round(plan, tmp_path, RoundConfig(device="cpu", correct_drift=False)))
    with_correction = output_errors(original, corrected, calibration().tokens)
    without = output_errors(original, ignored, calibration().tokens)
    assert len(without) == 2
    assert all(a < b for a, b in zip(with_correction, without, strict=True))
    assert with_correction[-1] < 0.95 * without[-1]


def test_drift_is_reported(measured: Measured, tmp_path: Path) -> None:
    rounded = measured.round(measured.plan(3.0), tmp_path)
    ids = calibration().tokens
    states: list[list[Tensor]] = [[], []]
    for kept, model in zip(states, (measured.dense(), measured.dense(rounded)), strict=True):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _m, _a, output, kept=kept: kept.append(output))
        with torch.no_grad():
            model(input_ids=ids)
    assert len(rounded.drift()) == len(states[0]) == 2
    for found, original, quantized in zip(rounded.drift(), *states, strict=True):
        for got, tokens in ((found.first_token, slice(1)), (found.other_tokens, slice(1, None))):
            error = (quantized - original)[:, tokens]
            # The dense model has weights in the float16 that readers decode to, as the rounding pass has.
            assert got == pytest.approx(float(error.norm() / original[:, tokens].norm()), rel=1e-3)


def test_no_drift_means_plain_rounding(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = measured.plan(3.0, 16)
    ignored = measured.round(plan, tmp_path / "a", RoundConfig(device="cpu", correct_drift=False))
    monkeypatch.setattr(drift, "damped_solve", lambda _gram, target, _ridge: torch.zeros_like(target))
    zeroed = measured.round(plan, tmp_path / "b")
    for name in ignored.names:
        assert_equal_linears(zeroed.linear(name), ignored.linear(name))


class Killed(Exception):
    pass


def killing(after: int) -> Any:
    def progress(items: Sequence[Any], stage: str) -> Iterable[Any]:
        assert stage == "quantize: round"
        for number, item in enumerate(items):
            if number == after:
                raise Killed
            yield item

    return progress


@pytest.fixture
def loaded_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The blocks whose weights are loaded, in order."""
    loaded: list[int] = []
    block = StreamedModel.block

    def watched(self: StreamedModel, index: int) -> Any:
        loaded.append(index)
        return block(self, index)

    monkeypatch.setattr(StreamedModel, "block", watched)
    return loaded


@pytest.fixture(scope="module")
def deep_whole(deep: Measured, tmp_path_factory: pytest.TempPathFactory) -> RoundedModel:
    return deep.round(deep.plan(4.5), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("after", range(LAYERS))
def test_goes_on_where_it_was_cut_off(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, loaded_blocks: list[int], after: int
) -> None:
    plan = deep.plan(4.5)
    with pytest.raises(Killed):
        deep.round(plan, tmp_path, progress=killing(after))
    assert loaded_blocks == list(range(after))
    loaded_blocks.clear()
    resumed = deep.round(plan, tmp_path)
    assert loaded_blocks == list(range(after, LAYERS))
    for name in deep_whole.names:
        assert_equal_linears(resumed.linear(name), deep_whole.linear(name))


@pytest.mark.parametrize("piece", ["model.layers.0.mlp.up_proj", "drift-1", f"state-{LAYERS - 1}", "lm_head"])
def test_damaged_pieces_are_made_again(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, loaded_blocks: list[int], piece: str
) -> None:
    plan = deep.plan(4.5)
    deep.round(plan, tmp_path)
    loaded_blocks.clear()
    (file,) = tmp_path.glob(f"rounded-*/{piece}.safetensors")
    file.write_bytes(file.read_bytes()[:-2] + b"??")
    with pytest.warns(UserWarning, match="damaged. It is made again"):
        resumed = deep.round(plan, tmp_path)
    assert loaded_blocks == ([] if piece == "lm_head" else list(range(LAYERS)))
    assert resumed.drift() == deep_whole.drift()
    for name in deep_whole.names:
        assert_equal_linears(resumed.linear(name), deep_whole.linear(name))


@pytest.mark.parametrize("after", [1, 10, 7 * LAYERS], ids=lambda n: f"{n}-linears-done")
def test_goes_on_inside_a_block(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plan = deep.plan(4.5)
    round_linear = rounding.round_linear_
    calls: list[None] = []

    def dying(*args: Any) -> Any:
        if len(calls) >= after:
            raise Killed
        calls.append(None)
        return round_linear(*args)

    monkeypatch.setattr(rounding, "round_linear_", dying)
    with pytest.raises(Killed):
        deep.round(plan, tmp_path)
    monkeypatch.setattr(rounding, "round_linear_", round_linear)
    resumed = deep.round(plan, tmp_path)
    for name in deep_whole.names:
        assert_equal_linears(resumed.linear(name), deep_whole.linear(name))


def test_a_finished_run_is_only_read_again(deep: Measured, tmp_path: Path, loaded_blocks: list[int]) -> None:
    plan = deep.plan(4.5)
    deep.round(plan, tmp_path)
    loaded_blocks.clear()
    deep.round(plan, tmp_path)
    assert loaded_blocks == []


def test_other_options_do_not_take_over_pieces(deep: Measured, deep_whole: RoundedModel, tmp_path: Path) -> None:
    deep.round(deep.plan(6.0), tmp_path)
    deep.round(deep.plan(4.5), tmp_path, RoundConfig(device="cpu", couple_outputs=False))
    deep.round(deep.plan(4.5), tmp_path, RoundConfig(device="cpu", correct_drift=False))
    again = deep.round(deep.plan(4.5), tmp_path)
    for name in deep_whole.names:
        assert_equal_linears(again.linear(name), deep_whole.linear(name))


def test_micro_batches_do_not_matter(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpwise.measure.model.stream.MICRO_BATCH_TOKENS", 7 * 32)  # 7 + 7 + 7 + 3 rows
    parts = deep.round(deep.plan(4.5), tmp_path)
    ids = token_ids(8, seed=5)
    original = deep.dense()
    # Sums in another order move weights near the middle between two codes, so the models are equally good, not equal.
    one, other = (mean_divergence(original, deep.dense(rounded), ids) for rounded in (parts, deep_whole))
    assert one == pytest.approx(other, rel=0.2)


def test_biases_and_tied_embeddings(save_model: Any, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", kind=Qwen2Config, tie_word_embeddings=True)
    qwen = measured_model(directory, tmp_path)
    rounded = qwen.round(qwen.plan(6.0, 8), tmp_path / "work")
    held_out = token_ids(8, seed=7)
    divergence = mean_divergence(qwen.dense(), qwen.dense(rounded), held_out)
    # The mean divergence of the tied model from itself without its biases is far above 1.
    assert 0 < divergence < 0.05


def test_input_that_is_always_zero(save_model: Any, tmp_path: Path) -> None:
    def kill(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.zero_()

    dead = measured_model(save_model(tmp_path / "model", change=kill), tmp_path)
    name = "model.layers.0.mlp.down_proj"
    assert dead.measurement.without_feedback == (name,)
    rounded = dead.round(dead.plan(5.0), tmp_path / "work")
    assert rounded.damping(name) == float("inf")
    assert rounded.damping("model.layers.0.mlp.up_proj") < 1
    assert not rounded.linear("model.layers.0.mlp.up_proj").dequantize().any()
    assert mean_divergence(dead.dense(), dead.dense(rounded), token_ids(8, seed=3)) < 0.5


def test_states_that_measuring_left_behind_are_not_computed_again(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = measured.plan(4.0)
    fresh = measured.round(plan, tmp_path / "fresh")
    stopped = []
    run_until = targets.run_until
    monkeypatch.setattr(targets, "run_until", lambda *args: stopped.append(args) or run_until(*args))
    shutil.copytree(measured.work, tmp_path / "same")
    again = measured.round(plan, tmp_path / "same")
    assert fresh.names == again.names
    for name in fresh.names:
        assert_equal_linears(fresh.linear(name), again.linear(name))
    assert fresh.drift() == again.drift()
    assert stopped


def test_states_in_files_change_nothing(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path | None] = []

    def watched(shape: Any, dtype: torch.dtype, directory: Path | None) -> Tensor:
        made.append(directory)
        return states.new_state(shape, dtype, directory)

    monkeypatch.setattr(stream, "new_state", watched)
    files = tmp_path / "files"
    rounded = deep.round(deep.plan(4.5), tmp_path / "work", RoundConfig(device="cpu", offload_dir=files))
    assert made and set(made) == {files}
    assert not list(files.iterdir())
    for name in deep_whole.names:
        assert_equal_linears(rounded.linear(name), deep_whole.linear(name))


@pytest.mark.parametrize("joins", [True, False], ids=["joins-the-stream", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_weight_is_shifted_in_slices(joins: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_SLICE_OUTPUTS", 7)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 16, generator=rng).to(dtype)
    shift = torch.randn(16, 20 if joins else 16, generator=rng)
    plain = weight.double().T
    expected = plain + (shift.double() if joins else shift.double() @ plain)
    # float32 sums of 16 products around 1
    torch.testing.assert_close(shifted(weight, shift, joins=joins), expected.float(), rtol=1e-5, atol=1e-5)
    unmoved = shifted(weight, None, joins=joins)
    assert torch.equal(unmoved, plain.float())
    assert unmoved.is_contiguous()
    unmoved.zero_()
    assert bool(weight.any())  # it has memory of its own
