"""Single steps: ``measure``, ``plan``, and what formats export of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..convert.format import Export
from ..convert.registry import formats
from .format_options import FormatChoice, format_options
from .group import WAIT_OPTION, cli
from .options import (
    FORCE_OPTION,
    MeasuringArguments,
    OriginalArguments,
    calibration_options,
    original_options,
    say_shortened,
)
from .output import JSON_OPTION, RunBar, say, say_json
from .types import EXISTING_FILE, FILE, SIZE, Names

__all__ = ["measure", "plan"]


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, help="The measurement file to write (.safetensors).")
@click.option(
    "--formats",
    "wanted",
    type=Names(list(formats())),
    help=f"Formats to measure for: {', '.join(formats())}.  [default: all whose extras are installed]",
)
@FORCE_OPTION
@format_options("measure")
@original_options
@calibration_options
@WAIT_OPTION
def measure(
    model: str,
    output: Path,
    wanted: tuple[str, ...] | None,
    force: bool,
    choice: FormatChoice,
    changes: OriginalArguments,
    measuring: MeasuringArguments,
) -> None:
    """Measure MODEL once, for every size and format.

    MODEL is a directory or a Hub id.
    """
    from ..checkpoint.files.paths import work_beside
    from ..checkpoint.source.original import open_model
    from ..measure.run import measure_model
    from ..quantize.times import measuring_forecast

    source = open_model(changes.open(model))
    if measuring.saved is None:
        say_shortened(source, calibration=measuring.config.calibration.row_tokens)
    conversions = {name: formats()[name].conversion(source, choice.all[name]) for name in wanted or formats()}
    work = measuring.work_dir or work_beside(output)
    progress = RunBar(lambda: measuring_forecast(conversions, measuring.config, output, work, rows=measuring.saved))
    measurement = measure_model(
        source,
        output,
        measuring.config,
        formats=conversions,
        every_format=bool(wanted),
        work=work,
        calibration=measuring.saved,
        force=force,
        progress=progress,
    )
    if measurement.experts_sentence is not None:
        say(f"experts: {measurement.experts_sentence}")
    say(f"{len(measurement.linears)} linears measured for {', '.join(measurement.curves)} -> {output}")


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(list(formats())),
    help=f"Format to plan for.  [default: {next(iter(formats()))}]",
)
@click.option("-b", "--bpw", type=float, help="Bits per weight, counted as in `bpwise quantize`.")
@click.option("--max-size", type=SIZE, help="Largest size of all tensors, instead of --bpw: 5GB, 700MiB.")
@format_options("plan")
@click.option(
    "-o",
    "--output",
    "saved",
    type=FILE,
    help="Where to save the plan.  [default: plan-BPW.json or plan.json beside MEASUREMENT]",
)
@click.option("--html", type=FILE, help="Write a page with the plans of all sizes and formats to choose from.")
@FORCE_OPTION
@JSON_OPTION
def plan(
    measurement: Path,
    bpw: float | None,
    max_size: int | None,
    saved: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    choice: FormatChoice,
) -> None:
    """Show what each part of a model would get at some size.

    Prints the predicted damage as well, and saves the plan. Takes a second and needs MEASUREMENT alone, not the model.
    """
    from ..checkpoint.files.paths import check_file
    from ..convert.registry import is_plan
    from ..measure.measurement import Measurement
    from ..quantize.planning.page import is_plan_page, write_plan_page
    from ..quantize.planning.plans import make_plan

    if bpw is not None and max_size is not None:
        raise click.UsageError("--bpw and --max-size are two targets for one plan. Leave one of them out.")
    if bpw is None and max_size is None and html is None:
        raise click.UsageError("give --bpw or --max-size for one plan, or --html for a page with those of all sizes.")
    single = bpw is not None or max_size is not None
    output = saved or measurement.with_name("plan.json" if bpw is None else f"plan-{bpw:g}.json")
    if single:
        check_file(output, is_plan, "a plan", read=measurement, force=force)
    if html is not None:
        check_file(html, is_plan_page, "a page of plans", read=measurement, force=force)
    measured = Measurement.load(measurement)
    plans = []
    if single:
        made = make_plan(measured, bpw=bpw, max_bytes=max_size, options=choice.options)
        made.save(output)
        plans.append({"path": str(output), **made.content()})
    if html is not None:
        write_plan_page(measured, html, model=measurement.stem, options=choice.all)
    for name in measured.without_feedback:
        say(f"fallback: {name} was measured without error feedback", err=True)
    if as_json:
        page = None if html is None else str(html)
        say_json("plan", {"measurement": str(measurement), "plans": plans, "html": page})
        return
    if single:
        described = made.describe()
        for line in (*described.table.to_lines(), *described.facts):
            say(line)
        above = "" if made.gap is None else f", at most {100 * made.gap:.3f} % above the best possible"
        say(f"{made.bpw:.4f} bpw{above} -> {output}")
    if html is not None:
        say(f"plans of all sizes -> {html}")


def _export_command(export: Export) -> Callable[..., None]:
    @cli.command(name=export.name, help=export.help)
    @click.argument("measurement", type=EXISTING_FILE)
    @click.option("-o", "--output", type=FILE, required=True, help=export.output_help)
    @FORCE_OPTION
    def run(measurement: Path, output: Path, force: bool) -> None:
        from ..checkpoint.files.paths import check_file
        from ..measure.measurement import Measurement

        check_file(output, export.is_own, export.kind, read=measurement, force=force)
        say(f"{export.write(Measurement.load(measurement), output)} tensors -> {output}")

    return run


for _format in formats().values():
    for _export in _format.exports:
        _export_command(_export)
