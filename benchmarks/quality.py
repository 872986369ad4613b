"""What each decision of bpwise is worth, and how it compares with ExLlamaV2's own converter.

    python benchmarks/quality.py MODEL
    python benchmarks/quality.py MODEL --bpw 4,3 --variants bpwise,no-drift --rows 16
    python benchmarks/quality.py MODEL --exllamav2 build/exl/exllamav2

Every variant gets the same calibration tokens and the same bits: decoder bits per weight with all overheads counted,
and a head of 8 bits at 8 bpw and above, of 6 bits below. Reported is the mean KL divergence from the original on
held-out text. Measurements and finished results stay in the work directory, and a run that was cut off goes on; delete
the directory after a change of the code.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import exllamav2_peer
import numpy as np
from baselines import round_to_nearest
from bpwise.checkpoint.files.atomic import atomic_file
from bpwise.checkpoint.source.checkpoint import Checkpoint, TensorSource
from bpwise.checkpoint.source.language import WeightOverlay, language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder, rounded_linear, tune_rounded
from bpwise.convert.opening import verify_model
from bpwise.convert.rounding import Refinement
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, compare_with, evaluation_rows
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.device import resolve_device
from bpwise.measure.measurement import MeasuredLinear, Measurement
from bpwise.measure.run import MeasureConfig, measure_to_file, measurement_provenance
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.rounding.model import RoundConfig, round_model
from torch import Tensor
from tqdm import tqdm
from variants import OURS, PEER, VARIANTS, Variant, changed_measuring

__all__ = ["Benchmark", "Result", "main", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One variant at one size.

    Attributes:
        variant: Key of ``VARIANTS``.
        target_bpw: What was asked.
        bpw: Decoder bits per weight that it has, overheads included.
        head_bpw: The head's.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_standard_error: Its standard error; None with a single row.
        predicted_nats: What the plan said; None where nothing was predicted.
        perplexity: The quantized model's.
        original_perplexity: The original's on the same tokens.
        seconds: Wall time of rounding, measurement not included.
    """

    variant: str
    target_bpw: float
    bpw: float
    head_bpw: float
    kl_nats: float
    kl_standard_error: float | None
    predicted_nats: float | None
    perplexity: float
    original_perplexity: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Benchmark:
    """What all variants share.

    Attributes:
        model: Directory or Hub id of the original.
        checkpoint: The original.
        calibration: Rows to measure and round with.
        evaluation: Held-out rows.
        config: How to measure.
        eval_config: How models are evaluated.
        package: Where ExLlamaV2 is, if it takes part.
        work: Work directory.
    """

    model: str
    checkpoint: Checkpoint
    calibration: CalibrationSet
    evaluation: CalibrationSet
    config: MeasureConfig
    eval_config: EvalConfig
    package: Path | None
    work: Path

    @property
    def identity(self) -> dict[str, Any]:
        """All that results depend on beside the code, as plain JSON."""
        provenance = measurement_provenance(self.checkpoint, self.calibration, self.config, [])
        return {"measured": provenance, "evaluation": self.evaluation.fingerprint}


def prepare(
    model: str, config: MeasureConfig, eval_config: EvalConfig, work: Path, package: Path | None = None
) -> Benchmark:
    """Open the model and take the rows."""
    checkpoint = open_model(model)
    vocab_size = int(checkpoint.config["vocab_size"])
    return Benchmark(
        model=model,
        checkpoint=checkpoint,
        calibration=calibration_rows(checkpoint, config.calibration),
        evaluation=evaluation_rows(load_tokenizer(checkpoint.directory), eval_config, vocab_size=vocab_size),
        config=config,
        eval_config=eval_config,
        package=package,
        work=work,
    )


def measured(benchmark: Benchmark, variant: Variant) -> Measurement:
    """Return the measurement that a variant needs, made now unless the work directory holds it."""
    config = replace(benchmark.config, damping=variant.damping)
    exl2 = QuantizeConfig(options=Exl2Options(group_size=variant.group_size)).conversion(benchmark.checkpoint)
    kept = benchmark.work / f"measurement-{variant.measurement}.safetensors"
    measurement = Measurement.load(kept) if kept.exists() else None
    provenance = measurement_provenance(benchmark.checkpoint, benchmark.calibration, config, [exl2.curves()])
    if measurement is None or measurement.provenance != provenance:
        start = time.monotonic()
        with changed_measuring(variant):
            measurement = measure_to_file(
                benchmark.model,
                kept,
                config,
                formats={"exl2": exl2},
                work=benchmark.work / f"measure-{variant.measurement}",
                calibration=benchmark.calibration,
                progress=progress_bar,
            )
        click.echo(f"measurement {variant.measurement}: {(time.monotonic() - start) / 60:.1f} minutes", err=True)
    if not variant.tokens_alike:
        return measurement
    return replace(measurement, linears=tuple(map(_alike, measurement.linears)), head=_alike(measurement.head))


def _alike(linear: MeasuredLinear) -> MeasuredLinear:
    return replace(linear, token_weights=np.ones_like(linear.token_weights))


def head_bits_at(bpw: float) -> int:
    """Return the width of the head that goes with a decoder's bits per weight."""
    return 8 if bpw >= 8 else 6


def run_variant(benchmark: Benchmark, original: OriginalRun, key: str, bpw: float) -> Result:
    """Quantize one variant to one size, and evaluate it."""
    work = benchmark.work / f"{key}-{bpw:g}"
    variant = VARIANTS[key]
    predicted = None
    quantized: TensorSource
    if key == PEER:
        start = time.monotonic()
        _convert(benchmark, bpw, work)
        seconds = time.monotonic() - start
        written = verify_model(work)
        quantized, sizes = Exl2Model.open(work), (written.rates["decoder"], written.rates["head"])
    else:
        measurement = measured(benchmark, variant)
        plan = variant.plan(measurement, bpw, head_bits_at(bpw))
        start = time.monotonic()
        quantized = _round(benchmark, variant, measurement, plan, work)
        seconds = time.monotonic() - start
        assert plan.head is not None
        sizes = plan.bpw, plan.head.bpw
        predicted = None if math.isnan(plan.damage_nats) else plan.damage_nats
    summary = compare_with(original, quantized, progress_bar).summary
    shutil.rmtree(work, ignore_errors=True)
    return Result(
        variant=key,
        target_bpw=bpw,
        bpw=sizes[0],
        head_bpw=sizes[1],
        kl_nats=summary.kl_nats.value,
        kl_standard_error=summary.kl_nats.standard_error,
        predicted_nats=predicted,
        perplexity=summary.quantized_perplexity.value,
        original_perplexity=summary.original_perplexity.value,
        seconds=seconds,
    )


def _convert(benchmark: Benchmark, bpw: float, out: Path) -> None:
    assert benchmark.package is not None, "the command line checks this"
    if not out.exists():
        config = exllamav2_peer.PeerConfig(package=benchmark.package, bpw=bpw, head_bits=head_bits_at(bpw))
        exllamav2_peer.convert(benchmark.model, out, config, benchmark.calibration, benchmark.work / PEER)


def _round(
    benchmark: Benchmark, variant: Variant, measurement: Measurement, plan: Exl2Plan, work: Path
) -> WeightOverlay:
    checkpoint = benchmark.checkpoint
    device = resolve_device(benchmark.config.device)
    linears = {p.name: p for p in (*plan.linears, *([plan.head] if plan.head else []))}
    if not variant.feedback:

        def nearest(name: str) -> Tensor:
            tied = name == measurement.head.name and checkpoint.tied_embeddings
            stored = "model.embed_tokens" if tied else name
            return round_to_nearest(checkpoint.tensor(f"{stored}.weight"), linears[name], device)

        return WeightOverlay(checkpoint, {name: partial(nearest, name) for name in linears})
    config = RoundConfig(correct_drift=variant.correct_drift, device=benchmark.config.device)
    rounder = Exl2Rounder(plan, measurement, couple_outputs=variant.couple_outputs)
    rounded = round_model(checkpoint, measurement, plan, rounder, config, work, progress_bar)
    source = language_model(checkpoint)
    if variant.tunes_scales:
        how = Refinement(measurement=measurement, device=device, offload_dir=None, progress=progress_bar)
        tune_rounded(rounded, source, how)

    def read(name: str) -> Tensor:
        return rounded_linear(rounded, source, name, tuned=False).dequantize()

    return WeightOverlay(checkpoint, {name: partial(read, name) for name in rounded.names})


def load_results(path: Path, identity: Mapping[str, Any]) -> dict[tuple[str, float], Result]:
    """Read the finished results of runs with the same rows and options, by variant and target."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        if entry.pop("identity") == identity:
            result = Result(**entry)
            found[result.variant, result.target_bpw] = result
    return found


def append_result(path: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Add a result to the file, which is whole at any moment."""
    before = path.read_text() if path.exists() else ""
    with atomic_file(path) as temporary:
        temporary.write_text(before + json.dumps({"identity": identity, **asdict(result)}) + "\n")


def table(results: Mapping[tuple[str, float], Result], variants: Sequence[str], targets: Sequence[float]) -> str:
    """Return mean KL divergences as a Markdown table, a row for each variant, a column for each size."""
    lines = [_row("KL, nats/token", *[f"{target:g} bpw" for target in targets], "minutes to round")]
    lines.append(_row(*["---"] * (len(targets) + 2)))
    for variant in variants:
        own = [results[variant, target] for target in targets]
        minutes = sum(result.seconds for result in own) / len(own) / 60
        lines.append(_row(VARIANTS[variant].title, *map(_divergence, own), f"{minutes:.1f}"))
    if OURS in variants:
        ours = [results[OURS, target] for target in targets]
        predicted = [f"{result.predicted_nats:.4g}" for result in ours if result.predicted_nats is not None]
        lines.append(_row("bpwise, as predicted by the plan", *predicted, ""))
        if PEER in variants:
            ratios = [one.kl_nats / results[PEER, one.target_bpw].kl_nats for one in ours]
            lines.append(_row("bpwise / ExLlamaV2", *[f"{ratio:.2f}" for ratio in ratios], ""))
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


def _variants(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    asked = None if value is None else value.split(",")
    unknown = [variant for variant in asked or [] if variant not in VARIANTS]
    if unknown:
        raise click.BadParameter(f"unknown {', '.join(unknown)}, expected some of {', '.join(VARIANTS)}")
    return asked


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--bpw", "targets", default="8,6,4,3,2.5", callback=_numbers, help="Decoder bits per weight.")
@click.option("--variants", callback=_variants, help="Which variants to compare.  [default: all]")
@click.option(
    "--exllamav2",
    "package",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The unpacked folder 'exllamav2', to have its own converter take part (see exllamav2_peer.py).",
)
@click.option("--rows", type=click.IntRange(1), default=32, help="Calibration rows.")
@click.option("--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row.")
@click.option("--eval-rows", type=click.IntRange(1), default=16, help="Held-out rows to evaluate on.")
@click.option("--eval-row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each of them.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses rows and probes.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/quality"),
    help="Keeps measurements and finished results.",
)
def main(
    model: str,
    targets: list[float],
    variants: list[str] | None,
    package: Path | None,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    eval_row_tokens: int,
    seed: int,
    device: str,
    work_dir: Path,
) -> None:
    """Compare ways of quantizing MODEL, a directory or a Hub id, at equal sizes."""
    variants = variants or [key for key in VARIANTS if key != PEER or package is not None]
    if PEER in variants and package is None:
        raise click.UsageError("the variant exllamav2 needs --exllamav2. Name its folder or leave the variant out.")
    try:
        calibration = CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
        config = MeasureConfig(calibration=calibration, seed=seed, device=device)
        eval_config = EvalConfig(rows=eval_rows, row_tokens=eval_row_tokens, seed=seed, device=device)
        benchmark = prepare(model, config, eval_config, work_dir, package)
        results = compare_all(benchmark, variants, targets)
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(results, variants, targets))
    original = results[variants[0], targets[0]].original_perplexity
    click.echo(f"\nOriginal perplexity {original:.3f}. Calibrated on {benchmark.calibration.description}.")
    click.echo(f"Evaluated on {benchmark.evaluation.description}.")


def compare_all(
    benchmark: Benchmark, variants: Sequence[str], targets: Sequence[float]
) -> dict[tuple[str, float], Result]:
    """Return the results of all variants at all targets; those that are finished are read, not made again."""
    path = benchmark.work / "results.jsonl"
    results = load_results(path, benchmark.identity)
    missing = [(key, bpw) for bpw in targets for key in variants if (key, bpw) not in results]
    if not missing:
        return results
    original = run_original(benchmark.checkpoint, benchmark.evaluation, benchmark.eval_config, progress_bar)
    for key, bpw in missing:
        result = run_variant(benchmark, original, key, bpw)
        append_result(path, benchmark.identity, result)
        results[key, bpw] = result
        click.echo(f"{VARIANTS[key].title} at {result.bpw:.4f} bpw: KL {_divergence(result)}", err=True)
    return results


if __name__ == "__main__":
    main()
