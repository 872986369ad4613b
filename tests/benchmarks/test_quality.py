"""The quality benchmark on a tiny model: its table, and the plans that it compares with."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.language import WeightOverlay
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import padded_columns
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.eval.comparison import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.measure.statistics.inputs import InputStatistics
from bpwise.measure.text.calibration import CalibrationConfig
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from ..measured import group_of
from ..tiny_models import streamed_logits

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPARED = ("rtn", "uniform", "alike", "one-sided", "group-64", "no-drift", "bpwise")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality")


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("baselines")


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("m", hidden_size=128, intermediate_size=192, num_key_value_heads=4)


@pytest.fixture
def benchmark(quality: ModuleType, model: Path, tmp_path: Path) -> Any:
    config = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=64), device="cpu")
    return quality.prepare(str(model), config, EvalConfig(rows=2, row_tokens=64, device="cpu"), tmp_path / "work")


@pytest.fixture
def measurement(quality: ModuleType, benchmark: Any) -> Any:
    return quality.measured(benchmark, quality.VARIANTS["bpwise"])


def test_a_tied_models_replaced_head_is_run(make_model: Callable[..., Path]) -> None:
    tied = open_model(make_model("tied", tie_word_embeddings=True))
    head = torch.randn(tied.shape("model.embed_tokens.weight"), generator=torch.Generator().manual_seed(0))
    replaced = WeightOverlay(tied, {"lm_head": lambda: head})
    tokens = torch.arange(12).view(2, 6)
    model = AutoModelForCausalLM.from_pretrained(tied.directory, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(tokens).last_hidden_state
    torch.testing.assert_close(streamed_logits(replaced, tokens), states @ head.T, rtol=1e-4, atol=1e-4)
    unchanged = WeightOverlay(tied, {})
    torch.testing.assert_close(streamed_logits(unchanged, tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)


def run(quality: ModuleType, model: Path, work: Path) -> Result:
    options = ["--bpw", "6.5,3.5", "--rows", "4", "--row-tokens", "64", "--eval-rows", "4", "--eval-row-tokens", "64"]
    arguments = [str(model), *options, "--variants", ",".join(COMPARED), "--device", "cpu", "--work-dir", str(work)]
    return CliRunner().invoke(quality.main, arguments, catch_exceptions=False)


def cells(output: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_the_table_compares_all_variants_and_a_rerun_only_reads(
    quality: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(quality, model, tmp_path / "work")
    assert first.exit_code == 0, first.output
    header, _, *rows, predicted = cells(first.stdout)
    assert header == ["KL, nats/token", "6.5 bpw", "3.5 bpw", "minutes to round"]
    assert [row[0] for row in rows] == [quality.VARIANTS[key].title for key in COMPARED]
    divergences = {
        key: [float(cell.split(" ± ")[0]) for cell in row[1:3]] for key, row in zip(COMPARED, rows, strict=True)
    }
    # Three bits less cost a factor of 64 in squared error.
    assert all(0 < wide < narrow for wide, narrow in divergences.values())
    assert len({tuple(values) for values in divergences.values()}) == len(COMPARED)  # every variant does differ
    assert predicted[0] == "bpwise, as predicted by the plan"
    assert 0 < float(predicted[1]) < float(predicted[2])
    assert "evaluation part" in first.stdout

    kept = (tmp_path / "work" / "results.jsonl").read_text()
    assert len(kept.splitlines()) == 2 * len(COMPARED)
    monkeypatch.delattr(quality, "run_original")
    monkeypatch.delattr(quality, "measure_to_file")
    assert run(quality, model, tmp_path / "work").stdout == first.stdout
    assert (tmp_path / "work" / "results.jsonl").read_text() == kept


def test_alike_is_undone_afterwards(quality: ModuleType) -> None:
    def mean() -> float:
        sums = InputStatistics(1, 2, torch.device("cpu"))
        sums.see_inputs(torch.tensor([[[1.0], [2.0]]]))
        sums.see_gradient("a", torch.tensor([[[300.0], [0.0]]]))
        sums.end_batch()
        return float(sums.halves[0].mean())

    assert mean() == pytest.approx(1.0)
    with quality.changed_measuring(quality.VARIANTS["alike"]):
        assert mean() == pytest.approx((1 + 4) / 2)
    assert mean() == pytest.approx(1.0)


def test_rows_by_activity_are_undone_afterwards(quality: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=rng) * torch.linspace(0.1, 2, 64)
    weight = torch.randn(64, 8, generator=rng) * torch.linspace(2, 0.5, 64)[torch.randperm(64, generator=rng), None]
    gram = x.T @ x / 200

    def order() -> list[int]:
        (curve,) = Exl2Curves(32).linears(group_of([weight], gram, [torch.ones(8)], damping=0.02))
        found: list[int] = curve.tensors["order"].tolist()
        return found

    own, by_activity = order(), gram.diagonal().argsort(descending=True).tolist()
    assert own != by_activity
    with quality.changed_measuring(quality.VARIANTS["by-activity"]):
        assert order() == by_activity
    assert order() == own


@pytest.mark.parametrize("target", [6.5, 5.0, 3.71])
def test_uniform_plans_fill_the_budget_to_a_row_group(baselines: ModuleType, measurement: Any, target: float) -> None:
    plan: Exl2Plan = baselines.uniform_plan(measurement, target, 6)
    weights = sum(linear.weights for linear in plan.linears)
    step = max(max(p.group_rows) * padded_columns(p.out_features) * 2 for p in plan.linears)
    unspent = target * weights - sum(linear.stored_bits for linear in plan.linears)
    assert 0 <= unspent < step
    assert [p.name for p in plan.linears] == [linear.name for linear in measurement.linears]
    assert plan.head is not None
    assert set(plan.head.group_bits) == {6}


def test_uniform_plans_have_two_neighbouring_widths_in_equal_shares(baselines: ModuleType, measurement: Any) -> None:
    plan: Exl2Plan = baselines.uniform_plan(measurement, 5.2, 6)
    wide_groups, counts = [], []
    for linear in plan.linears:
        assert set(linear.group_bits) <= {4, 5}
        assert list(linear.group_bits) == sorted(linear.group_bits, reverse=True)
        wide_groups.append(linear.group_bits.count(5))
        counts.append(len(linear.group_bits))
    share = sum(wide_groups) / sum(counts)
    assert 0 < share < 1
    assert all(abs(wide - share * count) < 1.5 for wide, count in zip(wide_groups, counts, strict=True))


def test_targets_out_of_reach_are_named(quality: ModuleType, model: Path, tmp_path: Path) -> None:
    options = ["--bpw", "1.5", "--rows", "2", "--row-tokens", "32", "--variants", "uniform", "--eval-row-tokens", "64"]
    result = CliRunner().invoke(quality.main, [str(model), *options, "--work-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "1.5 bits per weight" in result.output


def test_rounding_to_nearest_is_close_at_8_bits(baselines: ModuleType, benchmark: Any, measurement: Any) -> None:
    plan = baselines.uniform_plan(measurement, 8.9, 6)
    linear = plan.linears[0]
    assert set(linear.group_bits) == {8}
    weight = benchmark.checkpoint.tensor(f"{linear.name}.weight")
    decoded = baselines.round_to_nearest(weight, linear, torch.device("cpu"))
    # A step is about 1/127 of a column's largest weight, near three standard deviations: 3 / 127 / sqrt(12) = 0.7 %.
    assert (decoded.float() - weight.float()).norm() / weight.float().norm() < 0.01


def test_replaced_weights_stream_like_a_checkpoint(benchmark: Any) -> None:
    source, name = benchmark.checkpoint, "model.layers.0.self_attn.q_proj"
    replaced = WeightOverlay(source, {name: lambda: torch.zeros(1)})
    assert torch.equal(replaced.tensor(f"{name}.weight"), torch.zeros(1))
    other = "model.norm.weight"
    assert torch.equal(replaced.tensor(other), source.tensor(other))
    assert (replaced.names, replaced.config, replaced.directory) == (source.names, source.config, source.directory)
    assert replaced.shape(other) == source.shape(other)
    assert replaced.fingerprint != source.fingerprint
