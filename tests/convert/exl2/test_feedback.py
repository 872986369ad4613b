import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.rounding import feedback
from bpwise.convert.exl2.rounding.feedback import errors_by_group, round_linear, round_linear_, row_kernel
from bpwise.convert.exl2.rounding.grid import WidthTables, search_grids
from bpwise.errors import BpwiseWarning
from bpwise.linalg.hessian import factor_hessian
from torch import Tensor

DAMPING = 0.02


class Problem:
    """A linear with correlated inputs whose powers differ, in a shuffled row order."""

    def __init__(self, rows: int, columns: int, *, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        mixing = torch.randn(rows, rows, generator=rng) * torch.logspace(0.5, -0.5, rows)
        inputs = torch.randn(4 * rows, rows, generator=rng) @ mixing
        self.weight = torch.randn(rows, columns, generator=rng) * 0.05
        self.gram = inputs.T @ inputs / len(inputs)
        self.order = torch.randperm(rows, generator=rng)
        self.column_weights = torch.rand(columns, generator=rng) + 0.1
        self.upper = factor_hessian(self.gram[self.order][:, self.order], DAMPING).upper

    @property
    def damped(self) -> Tensor:
        """H with its damping, in the order of the input features, float64."""
        gram = self.gram.double()
        return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)

    def round(self, groups: list[RowGroup]) -> tuple[QuantizedLinear, Tensor]:
        return round_linear(self.weight, self.upper, groups, self.order, self.column_weights)

    def column_errors(self, weight: Tensor) -> Tensor:
        """dW^T H dW of every column, H damped; ``weight`` in the order of input features, shape (K, out)."""
        delta = weight.double() - self.weight.double()
        return (delta * (self.damped @ delta)).sum(dim=0)


def reader_scales(linear: QuantizedLinear) -> Tensor:
    """Scale of every weight as the format document says, stored order, float64, shape (K, out)."""
    units = (linear.max_scales.float() / 256).half().float()
    scales = (units[:, None] * (linear.scale_codes.float() + 1) ** 2).half().double()
    return torch.cat([scales[i].expand(group.rows, -1) for i, group in enumerate(linear.groups)])


def reader_halves(linear: QuantizedLinear) -> Tensor:
    return torch.tensor([[2.0 ** (group.bits - 1)] for group in linear.groups for _ in range(group.rows)]).double()


def naive_gptq(problem: Problem, linear: QuantizedLinear) -> Tensor:
    """Optimal brain quantization by its definition, given the scales: no factor, an explicit inverse every row.

    Row by row: round, then move the rows that are still free so that the output changes least (Frantar et al.,
    arXiv 2210.17323, equation 2). Returns codes in stored order.
    """
    work = problem.weight[problem.order].double()
    hessian = problem.damped[problem.order][:, problem.order]
    scales, halves = reader_scales(linear), reader_halves(linear)
    codes = torch.empty(work.shape, dtype=torch.uint8)
    for k in range(len(work)):
        inverse = torch.linalg.inv(hessian[k:, k:])
        steps = torch.where(scales[k] > 0, work[k] / scales[k], 0.0).round().clamp(-halves[k], halves[k] - 1)
        codes[k] = (steps + halves[k]).to(torch.uint8)
        error = (work[k] - steps * scales[k]) / inverse[0, 0]
        work[k:] -= inverse[:, :1] * error
    return codes


MIXED = [RowGroup(8, 32), RowGroup(5, 64), RowGroup(3, 32), RowGroup(2, 16)]
LAYOUTS = [
    pytest.param([RowGroup(4, 64)], 24, id="one-group"),
    pytest.param([RowGroup(4, 64), RowGroup(4, 32)], 24, id="group-tail"),
    pytest.param(MIXED, 24, id="all-kinds-of-width"),
    pytest.param([RowGroup(6, 32), RowGroup(2, 32)], 1, id="one-column"),
    pytest.param([RowGroup(bits, 32) for bits in (8, 6, 5, 4, 3, 2)], 12, id="every-width"),
]


@pytest.mark.parametrize(("groups", "columns"), LAYOUTS)
def test_agrees_with_the_definition(groups: list[RowGroup], columns: int) -> None:
    problem = Problem(sum(group.rows for group in groups), columns)
    linear, _ = problem.round(groups)
    different = (linear.codes != naive_gptq(problem, linear)).any(dim=0)
    # Float32 against float64: a weight within 1e-6 of the middle between two codes may fall to the other side, once in
    # some 100000, and only then do the later rows of its column differ too.
    assert int(different.sum()) <= columns // 12


@pytest.mark.parametrize(("groups", "columns"), LAYOUTS)
def test_result_follows_the_format(groups: list[RowGroup], columns: int) -> None:
    problem = Problem(sum(group.rows for group in groups), columns)
    linear, errors = problem.round(groups)
    linear.validate("linear")
    assert linear.groups == tuple(groups)
    assert torch.equal(linear.order, problem.order)
    assert linear.bias is None
    assert errors.shape == (len(groups), columns)


@pytest.mark.parametrize(("groups", "columns"), LAYOUTS)
def test_errors_sum_to_the_output_error(groups: list[RowGroup], columns: int) -> None:
    problem = Problem(sum(group.rows for group in groups), columns)
    linear, errors = problem.round(groups)
    exact = torch.empty_like(problem.weight, dtype=torch.float64)
    exact[problem.order] = (linear.codes.double() - reader_halves(linear)) * reader_scales(linear)
    # The identity is exact; R and the recurrence are float32.
    assert torch.allclose(errors.sum(dim=0).double(), problem.column_errors(exact), rtol=1e-3)
    # dequantize() rounds every weight to float16 once more: 2^-12 of it, against steps of 2^-7 of the largest.
    decoded = problem.column_errors(linear.dequantize().T)
    assert float(errors.sum()) == pytest.approx(float(decoded.sum()), rel=0.01)


@pytest.mark.parametrize("group_rows", [[64], [32, 32], [64, 32]], ids=["one-group", "two-groups", "group-tail"])
def test_errors_by_group_are_those_of_rounding_at_one_width(group_rows: list[int]) -> None:
    problem = Problem(sum(group_rows), 20)
    widths = [8, 6, 5, 4, 3, 2]
    ordered = problem.weight[problem.order]
    table = errors_by_group(ordered, problem.upper, group_rows, widths, problem.column_weights)
    assert table.shape == (len(group_rows), len(widths))
    for position, bits in enumerate(widths):
        _, errors = problem.round([RowGroup(bits, rows) for rows in group_rows])
        expected = (errors * problem.column_weights).sum(dim=1)
        # The same sums over a batch of columns six times as wide: float32 in another order, where a tie may fall
        # to the other side.
        assert torch.allclose(table[:, position], expected, rtol=1e-3)


def test_widths_do_not_touch_each_other() -> None:
    problem = Problem(64, 20)
    ordered = problem.weight[problem.order]
    together = errors_by_group(ordered, problem.upper, [32, 32], [8, 2], problem.column_weights)
    alone = errors_by_group(ordered, problem.upper, [32, 32], [2], problem.column_weights)
    assert torch.allclose(together[:, 1:], alone, rtol=1e-3)  # as above


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_better_than_rounding_to_nearest(bits: int) -> None:
    problem = Problem(96, 32)
    groups = [RowGroup(bits, 32)] * 3
    linear, errors = problem.round(groups)
    scales, halves = reader_scales(linear), reader_halves(linear)
    stored = problem.weight[problem.order].double()
    nearest = torch.empty_like(stored)
    nearest[problem.order] = (stored / scales).round().clamp(-halves, halves - 1) * scales
    assert float(errors.sum()) < 0.7 * float(problem.column_errors(nearest).sum())


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    power = torch.logspace(0, 2, 64)
    upper = factor_hessian(power.diag(), DAMPING).upper
    groups = [RowGroup(4, 32), RowGroup(4, 32)]
    linear, _ = round_linear(weight, upper, groups, torch.arange(64), torch.ones(16))
    scales, halves = reader_scales(linear), reader_halves(linear)
    expected = (weight.double() / scales).round().clamp(-halves, halves - 1) + halves
    assert torch.equal(linear.codes.double(), expected)


def test_scales_fit_the_rows_that_matter() -> None:
    # Uncorrelated inputs, four of them strong: with 3 bits it pays to serve those and to clip the others.
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=rng)
    power = torch.full((64,), 0.01)
    power[::16] = 1.0
    weight[::16] *= 0.5
    upper = factor_hessian(power.diag(), DAMPING).upper
    _, errors = round_linear(weight, upper, [RowGroup(3, 64)], torch.arange(64), torch.ones(16))
    tables = WidthTables.of([3], weight.device)
    indifferent = search_grids(weight[None], torch.ones(64), torch.ones(16), tables)[0].scales
    rounded = (weight / indifferent).round().clamp(-4, 3) * indifferent
    damped = power + DAMPING * power.mean()
    assert float(errors.sum()) < 0.8 * float(((rounded - weight).square() * damped[:, None]).sum())


@pytest.mark.parametrize("what", ["weight", "column", "row"])
def test_zeros(what: str) -> None:
    problem = Problem(64, 8)
    if what == "weight":
        problem.weight.zero_()
    elif what == "column":
        problem.weight[:, 3] = 0
    else:
        problem.weight[problem.order[0]] = 0
    linear, errors = problem.round([RowGroup(4, 32), RowGroup(2, 32)])
    linear.validate("linear")
    assert bool(torch.isfinite(errors).all())
    decoded = linear.dequantize()
    if what == "weight":
        assert not decoded.any()
        assert not errors.any()
    elif what == "column":
        assert not decoded[3].any()
        assert not errors[:, 3].any()
    else:  # the first row of the first group gets no feedback
        assert not decoded[:, problem.order[0]].any()


def test_dead_inputs_get_no_feedback() -> None:
    problem = Problem(64, 8)
    dead = problem.order[40]
    problem.gram[dead, :] = 0
    problem.gram[:, dead] = 0
    problem.upper = factor_hessian(problem.gram[problem.order][:, problem.order], DAMPING).upper
    linear, errors = problem.round([RowGroup(4, 32), RowGroup(4, 32)])
    scales, halves = reader_scales(linear)[40], reader_halves(linear)[40]
    expected = (problem.weight[dead].double() / scales).round().clamp(-halves, halves - 1) + halves
    assert torch.equal(linear.codes[40].double(), expected)
    assert bool(torch.isfinite(errors).all())


def test_chunks_of_columns_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(64, 20)
    groups = [RowGroup(4, 32), RowGroup(3, 32)]
    whole, _ = problem.round(groups)
    monkeypatch.setattr("bpwise.convert.exl2.rounding.feedback._CHUNK_COLUMNS", 7)
    monkeypatch.setattr(
        "bpwise.convert.exl2.rounding.grid._CHUNK_ELEMENTS", 8 * 32 * 6
    )  # six columns at eight trial scales
    parts, _ = problem.round(groups)
    assert torch.equal(parts.scale_codes, whole.scale_codes)
    # Kernels for fewer columns may sum in another order: as above, a tie at most.
    assert int((parts.codes != whole.codes).any(dim=0).sum()) <= 1


def test_arguments_are_left_alone() -> None:
    problem = Problem(64, 8)
    tensors = (problem.weight, problem.upper, problem.order, problem.column_weights)
    before = [tensor.clone() for tensor in tensors]
    problem.round([RowGroup(4, 64)])
    errors_by_group(problem.weight, problem.upper, [64], [4], problem.column_weights)
    assert all(map(torch.equal, tensors, before))


def test_rounds_in_the_memory_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(96, 40)
    groups = [RowGroup(6, 32), RowGroup(4, 64)]
    given = problem.weight.clone()
    at_once, errors = problem.round(groups)
    assert torch.equal(problem.weight, given)
    monkeypatch.setattr(feedback, "_CHUNK_COLUMNS", 7)  # columns in six slices, the last of them short
    sliced, sliced_errors = round_linear_(given, problem.upper, groups, problem.order, problem.column_weights)
    # Nothing of a column depends on the others but the group's largest scale, which all of them choose together.
    assert torch.equal(sliced.max_scales, at_once.max_scales)
    assert torch.equal(sliced.scale_codes, at_once.scale_codes)
    assert torch.equal(sliced.codes, at_once.codes)
    torch.testing.assert_close(sliced_errors, errors)
    assert not torch.equal(given, problem.weight)


CUDA = torch.device("cuda", 0)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Kernels are looked for anew."""
    feedback._kernels.cache_clear()
    yield
    feedback._kernels.cache_clear()


def kernels_that(try_out: object) -> SimpleNamespace:
    return SimpleNamespace(MOST_ROWS=128, round_rows="the kernel", try_out=try_out)


@pytest.mark.usefixtures("fresh")
def test_a_kernel_rounds_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(feedback, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda *_name: kernels_that(tried.append))
    found = [row_kernel(CUDA, rows) for rows in (16, 128, 160)]
    assert found == ["the kernel", "the kernel", None]
    assert tried == [CUDA]
    assert row_kernel(torch.device("cpu"), 32) is row_kernel(torch.device("mps"), 32) is None


@pytest.mark.usefixtures("fresh")
def test_the_loop_rounds_on_gpus_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "find_spec", lambda _name: None)
    assert row_kernel(CUDA, 32) is None


@pytest.mark.usefixtures("fresh")
def test_the_loop_rounds_where_triton_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(feedback, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda *_name: kernels_that(fails))
    with pytest.warns(BpwiseWarning, match=r"cuda:0: Triton does not work here\. Got 'Failed to find C compiler\.'"):
        assert row_kernel(CUDA, 32) is None
    assert row_kernel(CUDA, 32) is None  # and it is not said again
