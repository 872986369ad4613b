import math
from collections.abc import Sequence

import pytest
import torch
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import SAMPLED_ROWS, measure_plain_types, measure_types, measured_types
from bpwise.convert.gguf.ggml.kernels import GgmlType, decode, encode, ggml_type
from torch import Tensor

from ...measured import group_of

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install 'bpwise[gguf]'")

KINDS = [ggml_type(name) for name in ("Q8_0", "Q4_K", "Q4_0")]


def gram_of(size: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * size, size, generator=rng) @ torch.randn(size, size, generator=rng)
    return inputs.T @ inputs / len(inputs)


def matrix(rows: int, columns: int) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def damage_of(weight: Tensor, gram: Tensor, fisher: Tensor, kinds: Sequence[GgmlType], *, damping: float) -> Tensor:
    (curves,) = measure_types(group_of([weight], gram, [fisher], damping=damping), kinds)
    assert curves.damping in (damping, math.inf)
    return curves.tensors["damage_nats"]


def plain_damage(weight: Tensor, gram: Tensor, row_weights: Tensor, name: str) -> float:
    """0.5 sum_r f_r dw_r H dw_r of ggml's own rounding, row by row in float64."""
    rounded = decode(encode(weight.T.contiguous(), ggml_type(name), gram.diagonal()), ggml_type(name))
    errors = (rounded - weight.T).double()
    return sum(0.5 * float(f) * float(e @ gram.double() @ e) for f, e in zip(row_weights, errors, strict=True))


def test_plain_damage_is_that_of_the_definition() -> None:
    weight, gram, fisher = matrix(96, 40), gram_of(96), torch.rand(40)
    found = measure_plain_types(weight, gram, fisher, KINDS, generalization_ratio=1.5).tolist()
    assert found[0] == pytest.approx(1.5 * plain_damage(weight, gram, fisher, "Q8_0"), rel=1e-4)
    assert found[1] == math.inf  # 96 inputs are no whole number of blocks of 256
    assert found[2] == pytest.approx(1.5 * plain_damage(weight, gram, fisher, "Q4_0"), rel=1e-4)


def test_feedback_costs_less_than_none() -> None:
    weight, gram, fisher = matrix(512, 40), gram_of(512), torch.rand(40)
    found = damage_of(weight, gram, fisher, KINDS, damping=0.01)
    assert bool((found < measure_plain_types(weight, gram, fisher, KINDS)).all())
    assert found[0] < found[1:].min()


def test_a_sample_of_rows_stands_for_all() -> None:
    weight, gram, fisher = matrix(64, 8 * SAMPLED_ROWS), gram_of(64), torch.rand(8 * SAMPLED_ROWS)
    found = measure_plain_types(weight, gram, fisher, KINDS)
    # 256 independent rows, each of 64 errors: the mean is good to a few percent.
    assert float(found[2]) == pytest.approx(plain_damage(weight, gram, fisher, "Q4_0"), rel=0.1)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    found = damage_of(matrix(256, 8), torch.zeros(256, 256), torch.ones(8), KINDS, damping=0.1)
    assert not found.any()
    found = damage_of(matrix(96, 8), torch.zeros(96, 96), torch.ones(8), KINDS, damping=0.1)
    assert found.tolist() == [0, math.inf, 0]  # 96 inputs are no whole number of blocks of 256


def test_every_measured_type_can_be_encoded() -> None:
    gram = gram_of(256)
    found = damage_of(matrix(256, 4), gram, torch.ones(4), measured_types(), damping=0.1)
    assert bool(found.isfinite().all())
    assert {"Q8_0", "Q4_K", "IQ1_S"} <= {kind.name for kind in measured_types()} and len(found) >= 18


def test_without_feedback_no_damping_is_given_up() -> None:
    # Of an output head that is the embedding table too; EXL2 rounds it with feedback, and with its damping.
    inputs = group_of([matrix(64, 8)], torch.zeros(64, 64), [torch.ones(8)], damping=0.1, with_feedback=False)
    (curves,) = GgufCurves(KINDS).linears(inputs)
    assert curves.damping == 0.1
