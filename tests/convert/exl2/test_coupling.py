import bpwise.linalg.outputs as outputs_module
import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.rounding.feedback import round_linear
from bpwise.linalg.hessian import factor_hessian
from bpwise.linalg.outputs import OutputFeedback
from torch import Tensor

DAMPING = 0.02
GROUPS = [RowGroup(4, 32), RowGroup(2, 32)]


class Problem:
    """A linear whose inputs correlate, and whose outputs act on the loss together."""

    def __init__(self, columns: int, *, rank: int = 3, seed: int = 0) -> None:
        rows = sum(group.rows for group in GROUPS)
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(3 * rows, rows, generator=rng) @ torch.randn(rows, rows, generator=rng)
        self.gram = inputs.T @ inputs / len(inputs)
        self.weight = torch.randn(rows, columns, generator=rng) * 0.05
        self.fisher = torch.rand(columns, generator=rng) + 0.1
        directions = torch.randn(columns, rank, generator=rng)
        self.coupling = 0.9 * directions / directions.norm(dim=1, keepdim=True)
        self.order = torch.randperm(rows, generator=rng)
        self.upper = factor_hessian(self.gram[self.order][:, self.order], DAMPING).upper

    @property
    def input_matrix(self) -> Tensor:
        """H with its damping, in stored order, float64."""
        gram = self.gram[self.order][:, self.order].double()
        return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)

    @property
    def output_matrix(self) -> Tensor:
        """G with its damping, float64."""
        factor = self.coupling.double() * self.fisher.double().sqrt()[:, None]
        matrix = factor @ factor.T
        matrix.diagonal().copy_(self.fisher.double() + outputs_module._DAMPING * self.fisher.double().mean())
        return matrix

    def round(self, *, coupled: bool) -> tuple[QuantizedLinear, Tensor]:
        outputs = OutputFeedback.of(self.fisher, self.coupling, 4) if coupled else None
        return round_linear(self.weight, self.upper, GROUPS, self.order, self.fisher, outputs)

    def damage(self, linear: QuantizedLinear) -> float:
        """tr(G dW^T H dW)."""
        delta = decoded(linear) - self.weight[self.order].double()
        return float((self.output_matrix * (delta.T @ self.input_matrix @ delta)).sum())


def steps(linear: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Scale and half range of every weight as the format document says, stored order, float64."""
    units = (linear.max_scales.float() / 256).half().float()
    scales = (units[:, None] * (linear.scale_codes.float() + 1) ** 2).half().double()
    halves = [torch.full((group.rows, scales.shape[1]), 2.0 ** (group.bits - 1)) for group in linear.groups]
    rows = torch.tensor([group.rows for group in linear.groups])
    return scales.repeat_interleave(rows, dim=0), torch.cat(halves).double()


def decoded(linear: QuantizedLinear) -> Tensor:
    scales, halves = steps(linear)
    return (linear.codes.double() - halves) * scales


def by_definition(problem: Problem, linear: QuantizedLinear) -> Tensor:
    """Codes by brute force: before every step, all weights still free go where tr(G dW^T H dW) is least.

    A step rounds one row of one set of outputs. Sets take every fourth output; row groups come first, then the
    sets inside a group, then its rows.
    """
    scales, halves = steps(linear)
    original = problem.weight[problem.order].double()
    rows, columns = original.shape
    metric = torch.kron(problem.input_matrix, problem.output_matrix)  # over (row, column) pairs
    error = torch.zeros(rows * columns, dtype=torch.float64)
    free = torch.ones(rows * columns, dtype=torch.bool)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    first = 0
    for group in linear.groups:
        for start in range(4):
            chosen = torch.arange(start, columns, 4)
            for row in range(first, first + group.rows):
                best = torch.linalg.solve(metric[free][:, free], -metric[free][:, ~free] @ error[~free])
                moved = error.clone()
                moved[free] = best
                wanted = original[row, chosen] + moved.view(rows, columns)[row, chosen]
                scale, half = scales[row, chosen], halves[row, chosen]
                rounded = (wanted / scale).round().clamp(-half, half - 1)
                codes[row, chosen] = (rounded + half).to(torch.uint8)
                error.view(rows, columns)[row, chosen] = rounded * scale - original[row, chosen]
                free.view(rows, columns)[row, chosen] = False
        first += group.rows
    return codes


@pytest.mark.parametrize("columns", [12, 14, 3])
def test_agrees_with_the_definition(columns: int) -> None:
    problem = Problem(columns)
    linear, _ = problem.round(coupled=True)
    assert torch.equal(linear.codes, by_definition(problem, linear))
    assert not torch.equal(linear.codes, problem.round(coupled=False)[0].codes)


def test_one_output_has_no_other_to_answer_to() -> None:
    problem = Problem(1)
    (together, _), (alone, _) = (problem.round(coupled=coupled) for coupled in (True, False))
    assert torch.equal(together.codes, alone.codes)


def test_lowers_the_damage_of_coupled_outputs() -> None:
    for seed in range(3):
        problem = Problem(60, seed=seed)
        alone, together = (problem.damage(problem.round(coupled=coupled)[0]) for coupled in (False, True))
        assert together < 0.9 * alone


def test_errors_sum_to_the_output_error_of_each_column() -> None:
    problem = Problem(30)
    linear, errors = problem.round(coupled=True)
    delta = decoded(linear) - problem.weight[problem.order].double()
    exact = (delta * (problem.input_matrix @ delta)).sum(dim=0)
    assert torch.allclose(errors.sum(dim=0).double(), exact, rtol=1e-3)


def test_result_follows_the_format() -> None:
    problem = Problem(31)
    linear, errors = problem.round(coupled=True)
    linear.validate("linear")
    assert torch.equal(linear.order, problem.order)
    assert errors.shape == (2, 31)
    # Each output keeps its place: it is still the best match of the weight that it stands for.
    distances = torch.cdist(decoded(linear).T, problem.weight[problem.order].double().T)
    assert torch.equal(distances.argmin(dim=1), torch.arange(31))


@pytest.mark.parametrize(
    ("fisher", "coupling"),
    [
        pytest.param(torch.ones(12), torch.zeros(12, 0), id="no-directions"),
        pytest.param(torch.zeros(12), torch.zeros(12, 2), id="no-gradient"),
    ],
)
def test_nothing_to_answer_to(fisher: Tensor, coupling: Tensor) -> None:
    assert OutputFeedback.of(fisher, coupling, 4) is None


def test_outputs_that_do_not_correlate_are_rounded_each_for_itself() -> None:
    problem = Problem(12)
    problem.coupling = torch.zeros(12, 2)
    (together, _), (alone, _) = (problem.round(coupled=coupled) for coupled in (True, False))
    assert torch.equal(together.codes, alone.codes)
    assert torch.equal(together.scale_codes, alone.scale_codes)
