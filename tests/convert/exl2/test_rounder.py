"""Rounding to EXL2, in whole models."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from transformers import Qwen2Config

from ...measured import order_of
from ...rounded import Measured, mean_divergence, measured_model, token_ids


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured_model(tiny_model, tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize("head_bits", [4, 16])
def test_linears_are_as_planned(measured: Measured, tmp_path: Path, head_bits: int) -> None:
    plan = measured.plan(4.5, head_bits)
    rounded = measured.round(plan, tmp_path)
    plans = [*plan.linears, *([plan.head] if plan.head else [])]
    assert list(rounded.names) == [p.name for p in plans]
    assert ("lm_head" in rounded.names) == (head_bits == 4)
    curves = {curve.name: curve for curve in (*measured.measurement.linears, measured.measurement.head)}
    for p in plans:
        linear = measured.linear(rounded, p.name)
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
        assert rounded.numbers("damping")[p.name] == pytest.approx(curves[p.name].damping)


def test_weights_stay_near_the_original(measured: Measured, tmp_path: Path) -> None:
    rounded = measured.round(measured.plan(8.0, 8), tmp_path)
    checkpoint = Checkpoint.open(measured.directory)
    for name in rounded.names:
        weight = checkpoint.tensor(f"{name}.weight").float()
        # 8 bits and their error feedback; a transposed or reordered weight would be off by sqrt(2).
        assert float((measured.linear(rounded, name).dequantize().float() - weight).norm() / weight.norm()) < 0.05, name


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
    assert rounded.numbers("damping")[name] == float("inf")
    assert rounded.numbers("damping")["model.layers.0.mlp.up_proj"] < 1
    assert not dead.linear(rounded, "model.layers.0.mlp.up_proj").dequantize().any()
    assert mean_divergence(dead.dense(), dead.dense(rounded), token_ids(8, seed=3)) < 0.5
