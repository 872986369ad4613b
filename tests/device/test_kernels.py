"""The kernel of GPUs that rounds row groups, in Triton's interpreter and as its compiler makes it; no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.rounding.feedback import errors_by_group
from torch import Tensor

from ..convert.exl2.test_coupling import Problem as CoupledProblem
from ..convert.exl2.test_coupling import by_definition
from ..convert.exl2.test_feedback import Problem, naive_gptq
from .row_kernel import same_sums

triton = pytest.importorskip("triton", reason="Triton is not installed: there are wheels for Linux")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, as `make test` sets it, from the start"
)

WIDTHS = (8, 6, 5, 4, 3, 2)


@pytest.fixture
def kernel() -> Callable[..., Tensor]:
    from bpwise.convert.exl2.rounding import kernels

    round_rows: Callable[..., Tensor] = kernels.round_rows
    return round_rows


def both(round_: Callable[[], Any], kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What the loop makes of something, and what the kernel does."""
    loop = round_()
    monkeypatch.setattr("bpwise.convert.exl2.rounding.feedback.row_kernel", lambda _device, _rows: kernel)
    return loop, round_()


def assert_same(loop: tuple[QuantizedLinear, Tensor], found: tuple[QuantizedLinear, Tensor]) -> None:
    """All is equal: no weight of these problems lies so near to a tie that the order of sums shows."""
    for name in ("codes", "scale_codes", "max_scales"):
        assert torch.equal(getattr(found[0], name), getattr(loop[0], name)), name
    assert torch.equal(found[0].dequantize(), loop[0].dequantize())
    assert torch.equal(found[1], loop[1])


@interpreted
@pytest.mark.parametrize(
    ("groups", "columns"),
    [
        pytest.param([RowGroup(bits, 32) for bits in WIDTHS], 33, id="every-width"),
        pytest.param([RowGroup(5, 96), RowGroup(2, 48)], 7, id="rows-no-power-of-two"),
        pytest.param([RowGroup(3, 128), RowGroup(3, 32)], 1, id="one-column"),
    ],
)
def test_rounds_as_the_loop(
    groups: list[RowGroup], columns: int, kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(sum(group.rows for group in groups), columns)
    assert_same(*both(lambda: problem.round(groups), kernel, monkeypatch))


@interpreted
@pytest.mark.parametrize("columns", [30, 5, 3], ids=["sets-of-two-lengths", "almost-no-columns", "an-empty-set"])
def test_rounds_coupled_outputs_as_the_loop(
    columns: int, kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CoupledProblem(columns, rank=5)
    assert_same(*both(lambda: problem.round(coupled=True), kernel, monkeypatch))


@interpreted
def test_measures_all_widths_as_the_loop(kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(80, 11)
    ordered = problem.weight[problem.order]
    loop, found = both(
        lambda: errors_by_group(ordered, problem.upper, [32, 48], WIDTHS, problem.column_weights), kernel, monkeypatch
    )
    assert torch.equal(found, loop)


@interpreted
def test_agrees_with_the_definition(kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(64, 24)
    _, (linear, _) = both(lambda: problem.round([RowGroup(4, 32), RowGroup(2, 32)]), kernel, monkeypatch)
    assert torch.equal(linear.codes, naive_gptq(problem, linear))


@interpreted
def test_agrees_with_the_definition_of_coupled_outputs(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CoupledProblem(14)
    _, (linear, _) = both(lambda: problem.round(coupled=True), kernel, monkeypatch)
    assert torch.equal(linear.codes, by_definition(problem, linear))


@interpreted
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_sums_in_its_own_order(rank: int, kernel: Callable[..., Tensor]) -> None:
    rng = torch.Generator().manual_seed(rank)
    rows, columns = 19, 37
    halves = torch.tensor(WIDTHS * 7)[:columns].sub(1).exp2()
    steps = torch.randn(rows, columns, generator=rng) * halves / 2
    feedback = (torch.randn(rows, rows, generator=rng) / 4).tril(-1)
    seen, gains = torch.randn(rows, rank, generator=rng), torch.randn(rank, columns, generator=rng)
    assert torch.equal(kernel(steps, feedback, halves, seen, gains), same_sums(steps, feedback, halves, seen, gains))


@interpreted
def test_ties_go_to_even(kernel: Callable[..., Tensor]) -> None:
    steps = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 125.5, 1e9, -1e9]])
    nothing = torch.zeros(1, 0)
    codes = kernel(steps, torch.zeros(1, 1), torch.full((10,), 128.0), nothing, steps[:0])
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2, 126, 126, 127, -128]]


def test_compiles_for_gpus(tmp_path: Path) -> None:
    # In a process of its own: in this one Triton interprets.
    code = """
import sys
from bpwise.convert.exl2.rounding import kernels
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kinds = dict.fromkeys(("steps", "feedback", "halves", "seen", "gains", "codes"), "*fp32")
kinds |= dict.fromkeys(("rows", "columns", "rank"), "i32") | dict.fromkeys(("ROWS", "COLUMNS"), "constexpr")
for capability, rows in ((75, 32), (90, kernels.MOST_ROWS)):
    constants = {"ROWS": rows, "COLUMNS": kernels._COLUMNS}
    source = ASTSource(fn=kernels._round_rows, signature=kinds, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=kernels._OPTIONS)
    print(made.asm["ptx"], flush=True)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    products = re.findall(r"\b(mul|fma)\.(?:rn\.)?f32\b", run.stdout)
    # Two loops, a product for each of the rows in registers; a fused one would round once where two are to round twice.
    assert products == ["mul"] * (2 * 32 + 2 * 128)
