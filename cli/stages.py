"""The stages by themselves: ``measure``, ``plan``, ``imatrix``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .group import cli
from .options import (
    EXISTING_FILE,
    FILE,
    HEAD_BITS_OPTION,
    MIB,
    calibration_options,
    progress_bar,
    read_head_bits,
    read_measure_config,
    refuse_beside,
)

if TYPE_CHECKING:
    from ..measure.measurement import Measurement
    from ..quantize.plan import HeadBits

__all__ = ["imatrix", "measure", "plan"]


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, help="The measurement file to write (.safetensors).")
@calibration_options
def measure(model: str, output: Path, **options: Any) -> None:
    """Measure MODEL (a directory or a Hub id) once, for any bitrate; for GGUF too where its extra is installed."""
    from ..measure.run import measure_to_file

    config, saved = read_measure_config(options, types=True)
    measurement = measure_to_file(
        model, output, config, work=options["work_dir"], calibration=saved, progress=progress_bar
    )
    if measurement.experts_sentence is not None:
        click.echo(f"experts: {measurement.experts_sentence}")
    click.echo(f"{len(measurement.linears)} linears measured -> {output}")


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option("--format", "output_format", type=click.Choice(["exl2", "gguf"]), default="exl2", help="Kind of output.")
@click.option(
    "-b", "--bpw", type=float, help="Bits per weight: EXL2, of the decoder with overheads; GGUF, of all tensors."
)
@HEAD_BITS_OPTION
@click.option("--override", multiple=True, metavar="PATTERN=TYPE", help="GGUF: a type that tensors must have.")
@click.option("-o", "--output", type=FILE, help="Where to save the plan.  [default: plan-BPW.json beside MEASUREMENT]")
@click.option("--html", type=FILE, help="Write a page with the plans of all sizes, in both formats, to choose from.")
def plan(
    measurement: Path,
    output_format: str,
    bpw: float | None,
    head_bits: str,
    override: tuple[str, ...],
    output: Path | None,
    html: Path | None,
) -> None:
    """Choose the bits of every row group, or the type of every tensor, for a size; print and save the plan.

    It is made from MEASUREMENT alone.
    """
    from ..measure.measurement import Measurement

    if bpw is None and html is None:
        raise click.UsageError("give --bpw for one plan, or --html for a page with those of all sizes.")
    measured = Measurement.load(measurement)
    if bpw is not None:
        output = output or measurement.with_name(f"plan-{bpw:g}.json")
        if output_format == "gguf":
            refuse_beside("--format gguf", ("head_bits",), "the head is a tensor like any other")
            _plan_types(measured, bpw, override, output)
        else:
            refuse_beside("--format exl2", ("override",), "it is for GGUF")
            _plan_widths(measured, bpw, read_head_bits(head_bits), output)
    if html is not None:
        from ..quantize.plan_page import write_plan_page

        write_plan_page(measured, html, model=measurement.stem, head_bits=read_head_bits(head_bits))
        click.echo(f"plans of all sizes -> {html}")
    for name in measured.without_feedback:
        click.echo(f"fallback: {name} was measured without error feedback", err=True)


def _plan_widths(measured: Measurement, bpw: float, head_bits: HeadBits, output: Path) -> None:
    from ..quantize.plan import make_plan

    made = make_plan(measured, bpw=bpw, head_bits=head_bits)
    made.save(output)
    click.echo(f"{'linear':44} {'bpw':>7} {'damage, nats/token':>19}")
    for linear in (*made.linears, *([made.head] if made.head else [])):
        click.echo(f"{linear.name:44} {linear.bpw:7.3f} {linear.damage_nats:19.3e}")
    shares = ", ".join(f"{bits} bits {100 * share:.1f} %" for bits, share in made.weights_per_width().items())
    click.echo(f"decoder weights: {shares}")
    head_bpw = made.head.bpw if made.head else 16
    click.echo(
        f"decoder {made.bpw:.4f} bpw, head {head_bpw:.4f} bpw, predicted damage {made.damage_nats:.6f} nats/token "
        f"({100 * made.gap:.3f} % above what is possible at most) -> {output}"
    )


def _plan_types(measured: Measurement, bpw: float, override: Sequence[str], output: Path) -> None:
    from ..quantize.type_plan import Override, make_type_plan

    made = make_type_plan(measured, bpw=bpw, overrides=tuple(map(Override.parse, override)))
    made.save(output)
    click.echo(f"{'tensor':44} {'type':>8} {'bpw':>7} {'damage, nats/token':>19}")
    for tensor in made.tensors:
        click.echo(f"{tensor.name:44} {tensor.type:>8} {tensor.kind.bits_per_weight:7.3f} {tensor.damage_nats:19.3e}")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in made.weights_per_type().items())
    click.echo(f"weights: {shares}")
    click.echo(
        f"{made.bpw:.4f} bpw, {made.stored_bytes / MIB:.1f} MiB, predicted damage {made.damage_nats:.6f} nats/token "
        f"({100 * made.gap:.3f} % above what is possible at most) -> {output}"
    )


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The file to write; the old format if it ends in .dat.")
def imatrix(measurement: Path, output: Path) -> None:
    """Write what MEASUREMENT says of the inputs as an importance matrix for llama.cpp."""
    from ..convert.gguf.imatrix import write_imatrix
    from ..measure.measurement import Measurement
    from ..quantize.gguf_pipeline import importance_of

    matrix = importance_of(Measurement.load(measurement))
    write_imatrix(output, matrix, legacy=output.suffix == ".dat")
    click.echo(f"{len(matrix.sums)} tensors -> {output}")
