import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.blocks import GRID_TYPES, unpack
from bpwise.convert.gguf.ggml.kernels import GgmlType, decode, encode, ggml_type
from bpwise.convert.gguf.ggml.rounding import expected_errors, round_to_type
from bpwise.errors import ShapeError
from bpwise.linalg.hessian import factor_hessian
from torch import Tensor

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")

DAMPING = 0.02


class Problem:
    """A linear with correlated inputs whose powers differ."""

    def __init__(self, rows: int, columns: int) -> None:
        rng = torch.Generator().manual_seed(0)
        mixing = torch.randn(rows, rows, generator=rng) * torch.logspace(0.5, -0.5, rows)
        inputs = torch.randn(4 * rows, rows, generator=rng) @ mixing
        self.weight = torch.randn(rows, columns, generator=rng) * 0.05
        gram = inputs.T @ inputs / len(inputs)
        self.upper = factor_hessian(gram, DAMPING).upper
        self.damped = gram.double() + DAMPING * gram.diagonal().mean() * torch.eye(rows, dtype=torch.float64)

    def errors(self, weight: Tensor) -> Tensor:
        """dW^T H dW of every output, H damped, for a weight of shape (out, K)."""
        delta = weight.T.double() - self.weight.double()
        return (delta * (self.damped @ delta)).sum(dim=0)


def by_definition(problem: Problem, kind: GgmlType) -> Tensor:
    """Encode a block, then move the inputs that are still free to where the output changes least.

    In types with a code for every weight, input after input: the nearest value that its scale offers, then the move.
    """
    work = problem.weight.double()
    result = torch.empty_like(work)
    importance = problem.upper.diagonal().square()
    for first in range(0, len(work), kind.block_weights):
        rows = slice(first, first + kind.block_weights)
        data = encode(work[rows].T.float().contiguous(), kind, importance[rows])
        if kind.name not in GRID_TYPES:
            settle(problem, work, result, rows, decode(data, kind).T.double())
            continue
        blocks = unpack(data, kind)
        for row in range(rows.start, rows.stop):
            sub = (row - first) // blocks.sub_weights
            offered = blocks.scales[:, sub, None].double() * blocks.levels.double() + blocks.offsets[:, sub, None]
            nearest = (offered - work[row][:, None]).abs().argmin(dim=1, keepdim=True)
            settle(problem, work, result, slice(row, row + 1), offered.gather(1, nearest).T)
    return result.T


def settle(problem: Problem, work: Tensor, result: Tensor, rows: slice, values: Tensor) -> None:
    result[rows] = values
    rest = slice(rows.stop, None)
    coupling = problem.damped[rest, rows] @ (values - work[rows])
    work[rest] -= torch.linalg.solve(problem.damped[rest, rest], coupling)


CASES = [
    pytest.param("Q4_0", 96, 24, id="small-blocks"),
    pytest.param("Q8_0", 64, 1, id="one-output"),
    pytest.param("Q4_K", 512, 8, id="large-blocks"),
    pytest.param("IQ3_S", 512, 8, id="codebook"),
    pytest.param("IQ2_XS", 256, 8, id="one-block-and-importance"),
]


@pytest.mark.parametrize(("name", "rows", "columns"), CASES)
def test_agrees_with_the_definition(name: str, rows: int, columns: int) -> None:
    problem = Problem(rows, columns)
    rounded = round_to_type(problem.weight, problem.upper, ggml_type(name))
    # Targets differ by float32 rounding, and now and then another code is nearest: the error is the same to 1 %.
    expected = problem.errors(by_definition(problem, ggml_type(name)))
    assert float(problem.errors(decode(rounded, ggml_type(name))).sum()) == pytest.approx(
        float(expected.sum()), rel=0.01
    )


@pytest.mark.parametrize(("name", "rows", "columns"), CASES)
def test_bytes_are_what_another_reader_decodes(name: str, rows: int, columns: int) -> None:
    problem = Problem(rows, columns)
    rounded = round_to_type(problem.weight, problem.upper, ggml_type(name), threads=2)
    read = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType[name])
    assert rounded.shape == (columns, ggml_type(name).row_bytes(rows))
    # The two multiply scales in another order: float32 rounding.
    assert np.allclose(read, decode(rounded, ggml_type(name)).numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL"])
def test_feedback_pays(name: str) -> None:
    problem, kind = Problem(256, 32), ggml_type(name)
    plain = decode(encode(problem.weight.T.contiguous(), kind, problem.damped.diagonal().float()), kind)
    rounded = round_to_type(problem.weight, problem.upper, kind)
    assert float(problem.errors(decode(rounded, ggml_type(name))).sum()) < 0.8 * float(problem.errors(plain).sum())


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q5_1", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XS"])
def test_what_is_expected_comes_true(name: str) -> None:
    problem, kind = Problem(512, 32), ggml_type(name)
    rounded = problem.errors(decode(round_to_type(problem.weight, problem.upper, kind), kind))
    expected = expected_errors(problem.weight, problem.upper, kind)
    # With 2 bits, what other blocks push over makes targets larger by some percent.
    assert float(expected.sum()) == pytest.approx(float(rounded.sum()), rel=0.1)


def test_refuses_a_row_of_part_blocks() -> None:
    problem = Problem(96, 4)
    with pytest.raises(ShapeError, match="Q4_K"):
        round_to_type(problem.weight, problem.upper, ggml_type("Q4_K"))
