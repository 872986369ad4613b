"""How much of a model's quality four ways of quantizing it to the same size keep.

    python benchmarks/quality.py MODEL
    python benchmarks/quality.py MODEL --bpw 4,3 --methods gptq,bpwise --rows 16

On the same calibration tokens, at the same decoder bits per weight with all overheads counted, the output head left
at 16 bits:

rtn     round to nearest: widths uniform over the model, grid searched, no error feedback, natural row order.
gptq    the same widths with error feedback and rows ordered by activity, blocks on quantized inputs.
mixes   fixed mixes of widths for each attention and MLP, chosen by the error of its output as ExLlamaV2 does
        (see block_mixes.py), then rounded as gptq.
bpwise  widths of row groups by predicted damage to the end loss, drift corrected while rounding: the defaults.

Mean KL divergence from the original on held-out text, and perplexity. Finished results are kept in the work
directory, and a run that was cut off goes on; delete ``results.jsonl`` in it after a change of the code.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from baselines import ReplacedWeights, round_to_nearest, uniform_plan
from block_mixes import mixed_plan, score_mixes
from bpwise.convert.checkpoint import Checkpoint, open_model
from bpwise.convert.files import atomic_file
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, OriginalRun, compare_with, evaluation_rows, run_original
from bpwise.measure.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import (
    MeasureConfig,
    calibration_rows,
    measure_to_file,
    measurement_provenance,
    resolve_device,
)
from bpwise.measure.tokenizer import load_tokenizer
from bpwise.quantize.plan import Plan, make_plan
from bpwise.quantize.rounding import RoundConfig, round_model
from torch import Tensor
from tqdm import tqdm

__all__ = ["METHODS", "Result", "main", "make_plans", "tables"]

METHODS = {
    "rtn": "round to nearest",
    "gptq": "GPTQ, uniform widths",
    "mixes": "GPTQ, fixed mixes",
    "bpwise": "bpwise",
}
OURS = "bpwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One method at one size.

    Attributes:
        method: Key of ``METHODS``.
        target_bpw: What was asked.
        bpw: Decoder bits per weight that the plan has, overheads included.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_standard_error: Its standard error; None with a single row.
        perplexity: The quantized model's.
        original_perplexity: The original's on the same tokens.
        seconds: Wall time of rounding and evaluating.
    """

    method: str
    target_bpw: float
    bpw: float
    kl_nats: float
    kl_standard_error: float | None
    perplexity: float
    original_perplexity: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Benchmark:
    """What all methods share.

    Attributes:
        checkpoint: The original.
        calibration: Rows to measure and round with.
        evaluation: Held-out rows.
        measurement: The measurement.
        config: How it was made.
        eval_config: How models are evaluated.
        work: Work directory.
    """

    checkpoint: Checkpoint
    calibration: CalibrationSet
    evaluation: CalibrationSet
    measurement: Measurement
    config: MeasureConfig
    eval_config: EvalConfig
    work: Path

    @property
    def identity(self) -> dict[str, Any]:
        """All that results depend on, as plain JSON."""
        return {"measurement": self.measurement.fingerprint, "evaluation": self.evaluation.fingerprint}


def prepare(model: str, config: MeasureConfig, eval_config: EvalConfig, work: Path) -> Benchmark:
    """Open the model, take rows, and measure unless the work directory holds this measurement."""
    checkpoint = open_model(model)
    calibration = calibration_rows(checkpoint, config.calibration)
    vocab_size = int(checkpoint.config["vocab_size"])
    kept = work / "measurement.safetensors"
    measurement = Measurement.load(kept) if kept.exists() else None
    if measurement is None or measurement.provenance != measurement_provenance(checkpoint, calibration, config):
        measurement = measure_to_file(
            model, kept, config, work=work / "measure", calibration=calibration, progress=progress_bar
        )
    return Benchmark(
        checkpoint=checkpoint,
        calibration=calibration,
        evaluation=evaluation_rows(load_tokenizer(checkpoint.directory), eval_config, vocab_size=vocab_size),
        measurement=measurement,
        config=config,
        eval_config=eval_config,
        work=work,
    )


def make_plans(benchmark: Benchmark, method: str, targets: Sequence[float], score_rows: int) -> dict[float, Plan]:
    """Return a method's plan for every target, in decoder bits per weight."""
    measurement = benchmark.measurement
    make: Callable[[float], Plan]
    if method == OURS:
        make = partial(_our_plan, measurement)
    elif method == "mixes":
        parts = score_mixes(
            benchmark.checkpoint,
            benchmark.calibration,
            measurement,
            benchmark.work,
            score_rows=score_rows,
            damping=benchmark.config.damping,
            device=resolve_device(benchmark.config.device),
            progress=progress_bar,
        )
        make = partial(mixed_plan, measurement, parts)
    else:
        make = partial(uniform_plan, measurement)
    return {target: make(target) for target in targets}


def _our_plan(measurement: Measurement, bpw: float) -> Plan:
    return make_plan(measurement, bpw=bpw, head_bits=16)


def quantize(benchmark: Benchmark, method: str, plan: Plan, work: Path) -> ReplacedWeights:
    """Round the decoder by a method; the weights are in ``work``, or made when they are read."""
    checkpoint = benchmark.checkpoint
    device = resolve_device(benchmark.config.device)
    if method == "rtn":

        def nearest(name: str, index: int) -> Tensor:
            return round_to_nearest(checkpoint.tensor(f"{name}.weight"), plan.linears[index], device)

        return ReplacedWeights(checkpoint, {p.name: partial(nearest, p.name, i) for i, p in enumerate(plan.linears)})
    config = RoundConfig(damping=benchmark.config.damping, device=benchmark.config.device)
    if method != OURS:
        config = RoundConfig(damping=config.damping, device=config.device, drift_damping=math.inf)
    rounded = round_model(checkpoint, benchmark.calibration, benchmark.measurement, plan, config, work, progress_bar)

    def read(name: str) -> Tensor:
        return rounded.linear(name).dequantize()

    return ReplacedWeights(checkpoint, {name: partial(read, name) for name in rounded.names})


def run_method(benchmark: Benchmark, original: OriginalRun, method: str, plan: Plan) -> Result:
    """Round and evaluate one plan."""
    start = time.monotonic()
    work = benchmark.work / f"{method}-{plan.target_bpw:g}"
    summary = compare_with(original, quantize(benchmark, method, plan, work), progress_bar).summary
    shutil.rmtree(work, ignore_errors=True)
    return Result(
        method=method,
        target_bpw=plan.target_bpw,
        bpw=plan.bpw,
        kl_nats=summary.kl_nats.value,
        kl_standard_error=summary.kl_nats.standard_error,
        perplexity=summary.quantized_perplexity.value,
        original_perplexity=summary.original_perplexity.value,
        seconds=time.monotonic() - start,
    )


def load_results(path: Path, identity: Mapping[str, Any]) -> dict[tuple[str, float], Result]:
    """Read the finished results of runs with the same rows and measurement, by method and target."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry.pop("identity") == identity:
            result = Result(**entry)
            found[result.method, result.target_bpw] = result
    return found


def append_result(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Add a result to the file, which is whole at any moment."""
    before = path.read_text() if path.exists() else ""
    with atomic_file(path) as temporary:
        temporary.write_text(before + json.dumps({"identity": identity, **asdict(result)}) + "\n")


def tables(results: Mapping[tuple[str, float], Result], methods: Sequence[str], targets: Sequence[float]) -> str:
    """Return mean KL divergence and perplexity as two Markdown tables, a row for each target."""
    others = [method for method in methods if method != OURS]
    compare = OURS in methods and bool(others)
    titles = [METHODS[method] for method in methods]
    lines = [_row("KL, nats/token", *titles, *(["ratio to best other"] if compare else []))]
    lines.append(_row(*["---"] * (len(titles) + 1 + compare)))
    for target in targets:
        cells = [_divergence(results[method, target]) for method in methods]
        if compare:
            best = min(results[method, target].kl_nats for method in others)
            cells.append(f"{results[OURS, target].kl_nats / best:.2f}")
        lines.append(_row(f"{target:g} bpw", *cells))
    lines += ["", _row("perplexity", *titles), _row(*["---"] * (len(titles) + 1))]
    for target in targets:
        lines.append(_row(f"{target:g} bpw", *[f"{results[method, target].perplexity:.3f}" for method in methods]))
    return "\n".join(lines)


def _divergence(result: Result) -> str:
    error = result.kl_standard_error
    return f"{result.kl_nats:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def progress_bar(items: Sequence[Any], stage: str) -> Iterable[Any]:
    """Show on stderr how far a stage is."""
    bar: Iterable[Any] = tqdm(items, desc=stage, unit="block", dynamic_ncols=True)
    return bar


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"expected numbers separated by commas, got {value!r}") from error


def _methods(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    asked = value.split(",")
    unknown = [method for method in asked if method not in METHODS]
    if unknown:
        raise click.BadParameter(f"unknown {', '.join(unknown)}, expected some of {', '.join(METHODS)}")
    return asked


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--bpw", "targets", default="8,6,4,3,2.5", callback=_numbers, help="Decoder bits per weight.")
@click.option("--methods", default=",".join(METHODS), callback=_methods, help="Which methods to compare.")
@click.option("--rows", type=click.IntRange(1), default=32, help="Calibration rows.")
@click.option("--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row.")
@click.option("--eval-rows", type=click.IntRange(1), default=16, help="Held-out rows to evaluate on.")
@click.option("--eval-row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each of them.")
@click.option(
    "--score-rows", type=click.IntRange(1), default=4, help="Calibration rows that fixed mixes are scored on."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses rows and sampled targets.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/quality"),
    help="Keeps the measurement and finished results.",
)
def main(
    model: str,
    targets: list[float],
    methods: list[str],
    rows: int,
    row_tokens: int,
    eval_rows: int,
    eval_row_tokens: int,
    score_rows: int,
    seed: int,
    device: str,
    work_dir: Path,
) -> None:
    """Compare ways of quantizing MODEL, a directory or a Hub id, at equal sizes."""
    try:
        calibration = CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
        config = MeasureConfig(calibration=calibration, seed=seed, device=device)
        eval_config = EvalConfig(rows=eval_rows, row_tokens=eval_row_tokens, seed=seed, device=device)
        benchmark = prepare(model, config, eval_config, work_dir)
        results = compare_all(benchmark, methods, targets, score_rows)
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(tables(results, methods, targets))
    original = results[methods[0], targets[0]].original_perplexity
    click.echo(f"\nOriginal perplexity {original:.3f}. Calibrated on {benchmark.calibration.description}.")
    click.echo(f"Evaluated on {benchmark.evaluation.description}.")


def compare_all(
    benchmark: Benchmark, methods: Sequence[str], targets: Sequence[float], score_rows: int
) -> dict[tuple[str, float], Result]:
    """Return the results of all methods at all targets; those that are finished are read, not made again."""
    path = benchmark.work / "results.jsonl"
    identity = benchmark.identity | {"score_rows": score_rows}
    results = load_results(path, identity)
    missing = {method: [t for t in targets if (method, t) not in results] for method in methods}
    # All plans first: a target that cannot be reached should show before hours of rounding.
    plans = {method: make_plans(benchmark, method, asked, score_rows) for method, asked in missing.items() if asked}
    if not plans:
        return results
    original = run_original(benchmark.checkpoint, benchmark.evaluation, benchmark.eval_config, progress_bar)
    for target in targets:
        for method in methods:
            plan = plans.get(method, {}).get(target)
            if plan is None:
                continue
            result = run_method(benchmark, original, method, plan)
            append_result(path, identity, result)
            results[method, target] = result
            click.echo(f"{METHODS[method]} at {result.bpw:.4f} bpw: KL {_divergence(result)}", err=True)
    return results


if __name__ == "__main__":
    main()
