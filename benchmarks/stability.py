"""How much of a plan is chance: plans from measurements with other calibration rows and other probes.

    python benchmarks/stability.py MODEL
    python benchmarks/stability.py MODEL --rows 4,16 --seeds 3 --bpw 3

For every number of rows the model is measured several times, each with a seed of its own. Then every linear gets the
size that one measurement's plan gives it, and another measurement's curves say what that costs, compared with the
plan of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.errors import BpwiseError
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.run import measure_model
from quality import progress_bar

__all__ = ["Stability", "compare", "main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """How far plans from several measurements agree.

    Attributes:
        excess: Damage with the sizes that another measurement gives each linear over that with its own, minus 1, by
            its own curves; mean over all pairs.
        size_difference: Difference of a linear's bits per weight between two plans, root mean square over linears,
            weighted by their size, and over all pairs.
        predicted_nats: Predicted damage of each measurement's plan, nats per token.
    """

    excess: float
    size_difference: float
    predicted_nats: tuple[float, ...]


def compare(measurements: Sequence[Measurement], bpw: float) -> Stability:
    """Compare the plans of several measurements of one model at one size."""
    plans = [make_exl2_plan(measurement, bpw=bpw, head_bits=16) for measurement in measurements]
    excesses, differences = [], []
    for (own, plan), (_, other) in itertools.permutations(zip(measurements, plans, strict=True), 2):
        excesses.append(_damage_with_sizes_of(own, other) / plan.decoder_damage_nats - 1)
        weights = np.array([linear.weights for linear in plan.linears])
        gaps = np.array([a.bpw - b.bpw for a, b in zip(plan.linears, other.linears, strict=True)])
        differences.append((weights * gaps**2).sum() / weights.sum())
    return Stability(
        excess=float(np.mean(excesses)),
        size_difference=float(np.sqrt(np.mean(differences))),
        predicted_nats=tuple(plan.decoder_damage_nats for plan in plans),
    )


def _damage_with_sizes_of(measurement: Measurement, other: Exl2Plan) -> float:
    # Groups are cut in each measurement's own row order, so only whole linears can be given another plan's size.
    total = 0.0
    for linear, sizes in zip(measurement.linears, other.linears, strict=True):
        alone = replace(measurement, linears=(linear,))
        total += make_exl2_plan(alone, bpw=sizes.bpw + 1e-9, head_bits=16).decoder_damage_nats
    return total


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--rows", default="4,8,16", help="Numbers of calibration rows.")
@click.option("--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row.")
@click.option("--seeds", type=click.IntRange(2), default=2, help="Measurements for each number of rows.")
@click.option("--bpw", type=float, default=4.0, help="Size of the plans, decoder bits per weight.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/stability"),
    help="Keeps measurements; delete it after a change of the code.",
)
def main(model: str, rows: str, row_tokens: int, seeds: int, bpw: float, device: str, work_dir: Path) -> None:
    """Say how far plans for MODEL, a directory or a Hub id, depend on the calibration rows."""
    click.echo("| rows | damage with another's sizes | bpw of a linear differs by | predicted, nats/token |")
    click.echo("| --- | --- | --- | --- |")
    try:
        for count in map(int, rows.split(",")):
            measurements = [_measured(model, count, row_tokens, seed, device, work_dir) for seed in range(seeds)]
            found = compare(measurements, bpw)
            predicted = ", ".join(f"{value:.4g}" for value in found.predicted_nats)
            click.echo(f"| {count} | {found.excess:+.1%} | {found.size_difference:.3f} | {predicted} |")
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error


def _measured(model: str, rows: int, row_tokens: int, seed: int, device: str, work_dir: Path) -> Measurement:
    kept = work_dir / f"{rows}-{row_tokens}-{seed}.safetensors"
    if kept.exists():
        return Measurement.load(kept)
    calibration = CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
    config = MeasureConfig(calibration=calibration, seed=seed, device=device)
    return measure_model(open_model(model), kept, formats=["exl2"], measure=config, progress=progress_bar)


if __name__ == "__main__":
    main()
