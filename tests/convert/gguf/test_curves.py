import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measure_types, measured_types
from bpwise.convert.gguf.ggml.kernels import GgmlType, decode, encode, ggml_type
from bpwise.convert.gguf.ggml.rounding import round_to_type
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.numerics.tables import SAMPLED_ROWS
from bpwise.linalg.hessian import factor_hessian
from bpwise.measure.curves import TableInputs, TiedHead
from torch import Tensor

from ...measured import group_of, layout_of

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")

KINDS = [ggml_type(name) for name in ("Q8_0", "Q4_K", "Q4_0")]
CURVES = GgufCurves(KINDS, layout_of({}))


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


def table_of(weight: Tensor, uses: Tensor, fisher: Tensor, head: TiedHead | None = None) -> TableInputs:
    return TableInputs(embeddings=lambda rows: weight.T[rows], uses=uses, fisher=fisher, head=head)


def test_embeddings_cost_what_the_definition_says() -> None:
    weight, fisher, uses = matrix(96, 40), torch.rand(96), torch.rand(40)
    found = CURVES.table(table_of(weight, uses, fisher))["damage_nats"].tolist()
    assert found[0] == pytest.approx(plain_damage(weight, fisher.diag(), uses, "Q8_0"), rel=1e-4)
    assert found[1] == math.inf  # 96 inputs are no whole number of blocks of 256
    assert found[2] == pytest.approx(plain_damage(weight, fisher.diag(), uses, "Q4_0"), rel=1e-4)


def test_feedback_costs_less_than_none() -> None:
    weight, gram, fisher = matrix(512, 40), gram_of(512), torch.rand(40)
    found = damage_of(weight, gram, fisher, KINDS, damping=0.01).tolist()
    plain = [plain_damage(weight, gram, fisher, kind.name) for kind in KINDS]
    assert all(ours < theirs for ours, theirs in zip(found, plain, strict=True))
    assert found[0] < min(found[1:])


def test_a_sample_of_rows_stands_for_all() -> None:
    weight, fisher = matrix(64, 8 * SAMPLED_ROWS), torch.rand(64)
    uses = torch.rand(8 * SAMPLED_ROWS, generator=torch.Generator().manual_seed(2))
    found = CURVES.table(table_of(weight, uses, fisher))["damage_nats"]
    # 128 independent rows, each of 64 errors: the mean is good to a few percent.
    assert float(found[2]) == pytest.approx(plain_damage(weight, fisher.diag(), uses, "Q4_0"), rel=0.1)


@pytest.mark.parametrize("rows", [40, 8 * SAMPLED_ROWS])
def test_a_tied_table_costs_what_both_its_uses_do(rows: int) -> None:
    rng = torch.Generator().manual_seed(3)
    weight, gram = matrix(256, rows), gram_of(256) / 256
    uses, seen = torch.rand(rows, generator=rng) / rows, torch.rand(rows, generator=rng) ** 4
    fisher = 0.3 * rows * gram.diagonal() * (0.5 + torch.rand(256, generator=rng))
    head = TiedHead(gram=gram, fisher=seen, damping=1e-3, generalization_ratio=1.25)
    measured = CURVES.table(table_of(weight, uses, fisher, head))
    both, found = measured["gram"], measured["damage_nats"].tolist()
    assert torch.allclose(both, fisher.diag() + seen.sum() * gram, rtol=1e-5)
    upper = factor_hessian(both, head.damping).upper
    for kind, damage in zip(KINDS, found, strict=True):
        errors = (decode(round_to_type(weight, upper, kind, sweeps=0), kind) - weight.T).double()
        embedded = 0.5 * float(uses.double() @ errors.square() @ fisher.double())
        seen_by_head = 0.5 * float(((errors @ gram.double()) * errors).sum(1) @ seen.double())
        assert damage == pytest.approx(1.25 * seen_by_head + embedded, rel=0.1), kind


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


def file_of(tensors: dict[str, TensorRows], **shapes: tuple[int, ...]) -> Layout:
    stored = {name: StoredTensor(ggml_type("F16"), shapes[name]) for name in tensors}
    return Layout(stored, RowMap(tensors, {}), 4096)


def test_a_linear_in_place_costs_what_it_did() -> None:
    weights, gram, fishers = [matrix(256, 40), matrix(256, 24)], gram_of(256), [torch.rand(40), torch.rand(24)]
    inputs = group_of(weights, gram, fishers, damping=0.01)
    layout = layout_of({"l.0": (40, 256), "l.1": (24, 256)})
    for found, plain in zip(GgufCurves(KINDS, layout).linears(inputs), measure_types(inputs, KINDS), strict=True):
        assert torch.equal(found.tensors["damage_nats"], plain.tensors["damage_nats"][None])
        assert found.damping == plain.damping


def test_every_part_costs_what_its_rows_do() -> None:
    # Even outputs in one tensor, odd ones in another, each beside a second linear; the last output in none.
    weight, other, gram = matrix(256, 41), matrix(256, 8), gram_of(256)
    fishers = [torch.rand(41), torch.rand(8)]
    even, odd = np.arange(0, 40, 2), np.arange(1, 40, 2)
    pair = TensorRows(("l.1", "l.0"), np.repeat([0, 1], [8, 20]), np.concatenate([np.arange(8), odd]))
    layout = file_of(
        {"a": TensorRows(("l.0",), np.zeros(20, dtype=np.int64), even), "b": pair}, a=(20, 256), b=(28, 256)
    )
    inputs = group_of([weight, other], gram, fishers, damping=0.01)
    first, second = (x.tensors["damage_nats"] for x in GgufCurves(KINDS, layout).linears(inputs))
    assert first.shape == (2, 3)
    for found, rows in zip(first, (even, odd), strict=True):
        expected = damage_of(weight[:, rows], gram, fishers[0][rows], KINDS, damping=0.01)
        assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(second[0], damage_of(other, gram, fishers[1], KINDS, damping=0.01), rtol=1e-5)


def test_columns_are_measured_in_the_files_order() -> None:
    weight, gram, fisher = matrix(256, 40), gram_of(256), torch.rand(40)
    columns = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    rows = TensorRows(("l.0",), np.zeros(40, dtype=np.int64), np.arange(40), columns.numpy())
    inputs = group_of([weight], gram, [fisher], damping=0.01)
    (found,) = GgufCurves(KINDS, file_of({"a": rows}, a=(40, 256))).linears(inputs)
    ordered = gram[columns][:, columns]
    expected = damage_of(weight[columns], ordered, fisher, KINDS, damping=0.01)
    assert torch.allclose(found.tensors["damage_nats"][0], expected, rtol=1e-5)
    assert not torch.allclose(expected, damage_of(weight, gram, fisher, KINDS, damping=0.01), rtol=1e-3)


def test_a_linear_that_no_tensor_holds_costs_nothing() -> None:
    inputs = group_of([matrix(64, 8)], gram_of(64), [torch.ones(8)], damping=0.1)
    (curves,) = GgufCurves(KINDS, layout_of({"other": (8, 64)})).linears(inputs)
    assert curves.tensors["damage_nats"].shape == (0, 3)
    assert curves.damping == 0.1
