"""The stages by themselves: ``measure``, ``plan``, ``imatrix``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .group import cli
from .options import (
    EXISTING_FILE,
    FILE,
    FORCE_OPTION,
    HEAD_BITS_OPTION,
    KEEP_FP16_OPTION,
    MIB,
    OVERRIDE_OPTION,
    SIZE,
    calibration_options,
    open_original,
    original_options,
    progress_bar,
    read_head_bits,
    read_measure_config,
    say_shortened,
)
from .output import say

if TYPE_CHECKING:
    from ..convert.exl2.plan.plan import Plan
    from ..convert.gguf.plan import TypePlan

__all__ = ["imatrix", "measure", "plan"]


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, help="The measurement file to write (.safetensors).")
@FORCE_OPTION
@original_options
@calibration_options
def measure(model: str, output: Path, force: bool, **options: Any) -> None:
    """Measure MODEL (a directory or a Hub id) once, for any bitrate; for GGUF too where its extra is installed."""
    from ..checkpoint.source.original import open_model
    from ..measure.run import measure_model
    from ..quantize.curve_makers import curve_makers

    original = open_model(open_original(model, options))
    config, saved = read_measure_config(options)
    if saved is None:
        say_shortened(original, calibration=config.calibration.row_tokens)
    measurement = measure_model(
        original,
        output,
        config,
        curves=curve_makers(options["group_size"], types=True),
        work=options["work_dir"],
        calibration=saved,
        force=force,
        progress=progress_bar,
    )
    if measurement.experts_sentence is not None:
        say(f"experts: {measurement.experts_sentence}")
    say(f"{len(measurement.linears)} linears measured -> {output}")


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option("--format", "output_format", type=click.Choice(["exl2", "gguf"]), default="exl2", help="Kind of output.")
@click.option(
    "-b", "--bpw", type=float, help="Bits per weight: EXL2, of the decoder with overheads; GGUF, of all tensors."
)
@HEAD_BITS_OPTION
@click.option("--max-size", type=SIZE, help="Largest size of all tensors, as 5GB or 700MiB, instead of --bpw.")
@OVERRIDE_OPTION
@KEEP_FP16_OPTION
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="Where to save the plan.  [default: plan-BPW.json or plan.json beside MEASUREMENT]",
)
@click.option("--html", type=FILE, help="Write a page with the plans of all sizes, in both formats, to choose from.")
@FORCE_OPTION
def plan(
    measurement: Path,
    output_format: str,
    bpw: float | None,
    max_size: int | None,
    head_bits: str,
    override: tuple[str, ...],
    keep_fp16: tuple[str, ...],
    output: Path | None,
    html: Path | None,
    force: bool,
) -> None:
    """Choose the bits of every row group, or the type of every tensor, for a size; print and save the plan.

    It is made from MEASUREMENT alone.
    """
    from ..checkpoint.files.paths import check_file
    from ..convert.exl2.plan.plan import is_plan, make_plan, measured_limit
    from ..convert.exl2.plan.problem import WidthOverride
    from ..convert.gguf.plan import Override, make_type_plan
    from ..measure.measurement import Measurement
    from ..quantize.plan_page import is_plan_page

    if bpw is not None and max_size is not None:
        raise click.UsageError("--bpw and --max-size are two targets for one plan. Leave one of them out.")
    if bpw is None and max_size is None and html is None:
        raise click.UsageError("give --bpw or --max-size for one plan, or --html for a page with those of all sizes.")
    wanted = bpw is not None or max_size is not None
    output = output or measurement.with_name("plan.json" if bpw is None else f"plan-{bpw:g}.json")
    if wanted:
        check_file(output, is_plan, "a plan", read=measurement, force=force)
    if html is not None:
        check_file(html, is_plan_page, "a page of plans", read=measurement, force=force)
    measured = Measurement.load(measurement)
    gguf = output_format == "gguf"
    overrides = () if gguf else tuple(map(WidthOverride.parse, override))
    if wanted:
        if gguf:
            made = make_type_plan(
                measured, bpw=bpw, tensor_bytes=max_size, overrides=tuple(map(Override.parse, override))
            )
            made.save(output)
            _print_types(made, output)
        else:
            size = None if max_size is None else measured_limit(measured, max_size)
            bits = read_head_bits(head_bits)
            chosen = make_plan(measured, bpw=bpw, size=size, head_bits=bits, overrides=overrides, keep_fp16=keep_fp16)
            chosen.save(output)
            _print_widths(chosen, output)
    if html is not None:
        from ..quantize.plan_page import write_plan_page

        write_plan_page(
            measured,
            html,
            model=measurement.stem,
            head_bits=read_head_bits(head_bits),
            overrides=overrides,
            keep_fp16=keep_fp16,
        )
        say(f"plans of all sizes -> {html}")
    for name in measured.without_feedback:
        say(f"fallback: {name} was measured without error feedback", err=True)


def _print_widths(made: Plan, output: Path) -> None:
    from ..convert.exl2.plan.unquantized import unquantized_lines

    say(f"{'linear':44} {'bpw':>7} {'damage, nats/token':>19}")
    for linear in (*made.linears, *([made.head] if made.head else [])):
        say(f"{linear.name:44} {linear.bpw:7.3f} {linear.damage_nats:19.3e}")
    for kept in made.kept:
        say(f"{kept.name:44} {'float16':>7}")
    for line in unquantized_lines(made.kept, made.head_reason):
        say(f"in float16: {line}")
    shares = ", ".join(f"{bits} bits {100 * share:.1f} %" for bits, share in made.weights_per_width().items())
    say(f"decoder weights: {shares}")
    head_bpw = made.head.bpw if made.head else 16
    say(
        f"decoder {made.bpw:.4f} bpw, head {head_bpw:.4f} bpw, predicted damage {made.damage_nats:.6f} nats/token "
        f"({100 * made.gap:.3f} % above what is possible at most) -> {output}"
    )


def _print_types(made: TypePlan, output: Path) -> None:
    say(f"{'tensor':44} {'type':>8} {'bpw':>7} {'damage, nats/token':>19}")
    for tensor in made.tensors:
        say(f"{tensor.name:44} {tensor.type:>8} {tensor.kind.bits_per_weight:7.3f} {tensor.damage_nats:19.3e}")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in made.weights_per_type().items())
    say(f"weights: {shares}")
    say(
        f"{made.bpw:.4f} bpw, {made.stored_bytes / MIB:.1f} MiB, predicted damage {made.damage_nats:.6f} nats/token "
        f"({100 * made.gap:.3f} % above what is possible at most) -> {output}"
    )


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The file to write; the old format if it ends in .dat.")
@FORCE_OPTION
def imatrix(measurement: Path, output: Path, force: bool) -> None:
    """Write what MEASUREMENT says of the inputs as an importance matrix for llama.cpp."""
    from ..checkpoint.files.paths import check_file
    from ..convert.gguf.llama_cpp.imatrix import is_own_imatrix, write_imatrix
    from ..measure.measurement import Measurement
    from ..quantize.gguf_pipeline import importance_of

    check_file(output, is_own_imatrix, "an importance matrix", read=measurement, force=force)
    matrix = importance_of(Measurement.load(measurement))
    write_imatrix(output, matrix, legacy=output.suffix.lower() == ".dat")
    say(f"{len(matrix.sums)} tensors -> {output}")
