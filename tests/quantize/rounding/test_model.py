"""The rounding pass, with EXL2's rounder: drift, what is resumed, and where states are kept."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.rounding import rounder as rounding
from bpwise.convert.rounding import RoundedModel
from bpwise.measure.model import states, stream
from bpwise.measure.model.stream import StreamedModel
from bpwise.quantize.rounding import drift, targets
from torch import Tensor

from ...rounded import Measured, calibration, mean_divergence, measured_model, token_ids

LAYERS = 4


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured_model(tiny_model, tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def deep(save_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Four blocks, so that there are some behind and some ahead of a break."""
    place = tmp_path_factory.mktemp("deep")
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return measured_model(save_model(place / "model", **sizes), place)


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
    ignored = measured.dense(measured.round(plan, tmp_path, correct_drift=False))
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
    ignored = measured.round(plan, tmp_path / "a", correct_drift=False)
    monkeypatch.setattr(drift, "damped_solve", lambda _gram, target, _ridge: torch.zeros_like(target))
    zeroed = measured.round(plan, tmp_path / "b")
    measured.assert_same(zeroed, ignored)


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
    """The blocks whose weights are loaded, in order; each is said to be followed by the next."""
    loaded: list[int] = []
    block = StreamedModel.block

    def watched(self: StreamedModel, index: int, then: int | None = None) -> Any:
        loaded.append(index)
        assert then == index + 1
        return block(self, index, then)

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
    deep.assert_same(resumed, deep_whole)


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
    deep.assert_same(resumed, deep_whole)


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
    deep.assert_same(resumed, deep_whole)


def test_a_finished_run_is_only_read_again(deep: Measured, tmp_path: Path, loaded_blocks: list[int]) -> None:
    plan = deep.plan(4.5)
    deep.round(plan, tmp_path)
    loaded_blocks.clear()
    deep.round(plan, tmp_path)
    assert loaded_blocks == []


def test_other_options_do_not_take_over_pieces(deep: Measured, deep_whole: RoundedModel, tmp_path: Path) -> None:
    deep.round(deep.plan(6.0), tmp_path)
    deep.round(deep.plan(4.5), tmp_path, couple_outputs=False)
    deep.round(deep.plan(4.5), tmp_path, correct_drift=False)
    again = deep.round(deep.plan(4.5), tmp_path)
    deep.assert_same(again, deep_whole)


def test_micro_batches_do_not_matter(
    deep: Measured, deep_whole: RoundedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", 7 * 32)  # 7 + 7 + 7 + 3 rows
    parts = deep.round(deep.plan(4.5), tmp_path)
    ids = token_ids(8, seed=5)
    original = deep.dense()
    # Sums in another order move weights near the middle between two codes, so the models are equally good, not equal.
    one, other = (mean_divergence(original, deep.dense(rounded), ids) for rounded in (parts, deep_whole))
    assert one == pytest.approx(other, rel=0.2)


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
    measured.assert_same(fresh, again)
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
    rounded = deep.round(deep.plan(4.5), tmp_path / "work", offload_dir=files)
    assert made and set(made) == {files}
    assert not list(files.iterdir())
    deep.assert_same(rounded, deep_whole)
