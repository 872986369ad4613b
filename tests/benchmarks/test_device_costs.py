"""The forecast of a GPU's seconds: its fit, its formula, the shapes that it is made for; and, slowly, all of it."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("device_costs")


def sample(costs: ModuleType, hidden: int, inner: int, keys: int, rows: int, row_tokens: int) -> Any:
    sizes = {"hidden": hidden, "inner": inner, "queries": hidden, "keys": keys, "rows": rows, "row_tokens": row_tokens}
    return costs.Shape(batch_tokens=256, **sizes)


@pytest.mark.parametrize(
    ("name", "billions"),
    # All parameters but embeddings, heads and norms.
    [("Llama-3.2-1B", 0.973), ("Llama-3-8B", 6.979), ("27B (Gemma 2)", 26.047)],
)
def test_shapes_are_those_of_the_models(costs: ModuleType, name: str, billions: float) -> None:
    shape = costs.MODELS[name]
    assert shape.terms()["weights"] * shape.blocks / 1e9 == pytest.approx(billions, abs=1e-3)


def test_counts_that_are_sums_of_terms_are_found_again(costs: ModuleType) -> None:
    shapes = [sample(costs, *each) for each in costs.SAMPLES]

    # The last term is left out of every count: a fit must not lean on it.
    def counts(shape: Any) -> dict[tuple[str, str], float]:
        return {
            key: sum((i + 2.0) * shape.terms()[term] for i, term in enumerate(terms[:-1] or terms))
            for key, terms in costs.TERMS.items()
        }

    fit = costs.Fit.of([(shape, counts(shape)) for shape in shapes])
    unseen = sample(costs, *costs.UNSEEN)
    fit.hold_against(unseen, counts(unseen))
    assert max(fit.off.values()) < 1e-3


def test_seconds_are_work_and_launches(costs: ModuleType) -> None:
    shape, gpu = costs.MODELS["Llama-3-8B"], costs.Gpu("any", 1e12, 1e9, 1e-6)
    fit = costs.Fit()
    for (what, step), terms in costs.TERMS.items():
        amount = {"launches": 1000, "flops": 3e12, "bytes": 5e9 if step == "curves" else 1e9}.get(what, 1)
        fit.weights[what, step] = [amount / shape.terms()[terms[0]], *[0.0] * (len(terms) - 1)]
    seconds = costs.forecast(fit, shape, gpu)
    assert seconds["curves"] == pytest.approx((5.001, 0.001))
    assert seconds["rounding"] == pytest.approx((3.001, 0.001))
    # 16 sets of outputs, of which each takes the rows of 6 linears of 4096 channels and of one of 14336.
    with_kernels = costs.forecast(fit, shape, replace(gpu, row=1e-5))
    assert with_kernels["rounding"] == pytest.approx((3.001 + 16 * (6 * 4096 + 14336) * 1e-5, 0.001))
    assert with_kernels["forward"] == seconds["forward"]


@pytest.mark.slow
def test_the_fit_holds_for_a_block_that_it_has_not_seen() -> None:
    # In a process of its own: the device has its name once a process.
    command = [sys.executable, str(BENCHMARKS / "device_costs.py")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.startswith("Computed, not measured.")
    errors = [int(each) for line in run.stdout.splitlines()[1:3] for each in re.findall(r"(\d+)%,", line)]
    assert len(errors) == 2 * 5
    assert max(errors) <= 15
    assert run.stdout.count("| H100 SXM |") == 2 * 3
