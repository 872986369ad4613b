"""The quality benchmark on a tiny model: its table, and the plans that it compares with."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.layout import padded_columns
from bpwise.eval.comparison import EvalConfig
from bpwise.measure.calibration import CalibrationConfig
from bpwise.measure.run import MeasureConfig
from bpwise.quantize.plan import Plan
from click.testing import CliRunner, Result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality")


@pytest.fixture
def block_mixes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("block_mixes")


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


def run(quality: ModuleType, model: Path, work: Path) -> Result:
    options = ["--bpw", "6.5,3.5", "--rows", "4", "--row-tokens", "64", "--eval-rows", "4", "--eval-row-tokens", "64"]
    arguments = [str(model), *options, "--score-rows", "3", "--device", "cpu", "--work-dir", str(work)]
    return CliRunner().invoke(quality.main, arguments, catch_exceptions=False)


def cells(output: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]


def test_the_table_compares_all_methods_and_a_rerun_only_reads(
    quality: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(quality, model, tmp_path / "work")
    assert first.exit_code == 0, first.output
    header, _, wide, narrow, *perplexities = cells(first.stdout)
    assert header == ["KL, nats/token", *quality.METHODS.values(), "ratio to best other"]
    assert (wide[0], narrow[0]) == ("6.5 bpw", "3.5 bpw")
    divergences = [[float(cell.split(" ± ")[0]) for cell in row[1:5]] for row in (wide, narrow)]
    # Three bits less cost a factor of 64 in squared error.
    assert all(0 < more < less for more, less in zip(*divergences, strict=True))
    for row, values in zip((wide, narrow), divergences, strict=True):
        # The table shows four digits of each divergence and two decimals of the ratio.
        assert float(row[5]) == pytest.approx(values[3] / min(values[:3]), abs=0.01)
    assert [row[0] for row in perplexities] == ["perplexity", "---", "6.5 bpw", "3.5 bpw"]
    assert "evaluation part" in first.stdout

    kept = (tmp_path / "work" / "results.jsonl").read_text()
    assert len(kept.splitlines()) == 8
    monkeypatch.delattr(quality, "run_original")
    monkeypatch.delattr(quality, "measure_to_file")
    assert run(quality, model, tmp_path / "work").stdout == first.stdout
    assert (tmp_path / "work" / "results.jsonl").read_text() == kept


@pytest.mark.parametrize("method", ["rtn", "gptq", "mixes"])
def test_plans_fill_the_budget_to_a_row_group(quality: ModuleType, benchmark: Any, method: str) -> None:
    plans = quality.make_plans(benchmark, method, [6.5, 5.0, 3.71], score_rows=2)
    assert list(plans) == [6.5, 5.0, 3.71]
    for target, plan in plans.items():
        weights = sum(linear.weights for linear in plan.linears)
        step = max(max(p.group_rows) * padded_columns(p.out_features) * 2 for p in plan.linears)
        unspent = target * weights - sum(linear.stored_bits for linear in plan.linears)
        assert 0 <= unspent < step
        assert [p.name for p in plan.linears] == [linear.name for linear in benchmark.measurement.linears]
        assert plan.head is None


def test_uniform_plans_have_two_neighbouring_widths_in_equal_shares(baselines: ModuleType, benchmark: Any) -> None:
    plan: Plan = baselines.uniform_plan(benchmark.measurement, 5.2)
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
    options = ["--bpw", "1.5", "--rows", "2", "--row-tokens", "32", "--methods", "gptq", "--work-dir", str(tmp_path)]
    result = CliRunner().invoke(quality.main, [str(model), *options])
    assert result.exit_code == 1
    assert "1.5 bits per weight" in result.output


@pytest.mark.parametrize("rows", [32, 96, 576, 1536])
def test_mixes_make_groups_that_the_format_can_hold(block_mixes: ModuleType, rows: int) -> None:
    for mix in (*block_mixes.ATTENTION_MIXES, *block_mixes.MLP_MIXES):
        for shares in mix.values():
            groups = shares.groups(rows)
            assert sum(group.rows for group in groups) == rows
            assert all(group.rows % 32 == 0 and group.rows > 0 for group in groups)
            assert [g.bits for g in groups] == sorted((g.bits for g in groups), reverse=True)


def test_wider_mixes_have_smaller_errors(quality: ModuleType, block_mixes: ModuleType, benchmark: Any) -> None:
    parts = block_mixes.score_mixes(
        benchmark.checkpoint,
        benchmark.calibration,
        benchmark.measurement,
        benchmark.work,
        score_rows=2,
        damping=0.02,
        device=torch.device("cpu"),
    )
    assert [len(part.linears) for part in parts] == [4, 3, 4, 3]
    for part in parts:
        assert list(part.bits) == sorted(part.bits)
        # 2 bits against 8: a factor of 64 in the size of a step, less what the residual stream hides of it.
        assert 0 < part.errors[-1] < part.errors[0] / 10


def test_rounding_to_nearest_is_close_at_8_bits(baselines: ModuleType, benchmark: Any) -> None:
    plan = baselines.uniform_plan(benchmark.measurement, 8.9)
    linear = plan.linears[0]
    assert set(linear.group_bits) == {8}
    weight = benchmark.checkpoint.tensor(f"{linear.name}.weight")
    decoded = baselines.round_to_nearest(weight, linear, torch.device("cpu"))
    # A step is about 1/127 of a column's largest weight, near three standard deviations: 3 / 127 / sqrt(12) = 0.7 %.
    assert (decoded.float() - weight.float()).norm() / weight.float().norm() < 0.01


def test_replaced_weights_stream_like_a_checkpoint(baselines: ModuleType, benchmark: Any) -> None:
    source, name = benchmark.checkpoint, benchmark.measurement.linears[0].name
    replaced = baselines.ReplacedWeights(source, {name: lambda: torch.zeros(1)})
    assert torch.equal(replaced.tensor(f"{name}.weight"), torch.zeros(1))
    other = "model.norm.weight"
    assert torch.equal(replaced.tensor(other), source.tensor(other))
    assert (replaced.names, replaced.config, replaced.directory) == (source.names, source.config, source.directory)
    assert replaced.shape(other) == source.shape(other)
    assert replaced.fingerprint != source.fingerprint
