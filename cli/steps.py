"""Single steps: ``measure``, ``plan``, and what is exported of a measurement for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..convert.export.export import exporters
from ..convert.format import Export
from ..convert.registry import formats
from ..tables import Table, bytes_text
from .format_options import FormatChoice, format_options
from .group import WAIT_OPTION, cli
from .options import (
    FORCE_OPTION,
    MeasuringArguments,
    OriginalArguments,
    calibration_options,
    original_options,
)
from .output import JSON_OPTION, RunBar, say, say_json, say_shortened
from .types import DIRECTORY, EXISTING_FILE, FILE, PATH, RATES, SIZE, TOKENS, Names

if TYPE_CHECKING:
    from ..convert.plan import Plan

__all__ = ["export", "measure", "plan"]


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, help="Measurement file to write (.safetensors).")
@click.option(
    "--formats",
    "wanted",
    type=Names(list(formats())),
    help=f"Formats to measure for: {', '.join(formats())}.  [default: all that are installed]",
)
@click.option(
    "--keep-hessians",
    "hessians",
    type=DIRECTORY,
    help="Directory to keep the Hessian of every linear in, and the calibration rows, for exllamav3.",
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
    hessians: Path | None,
    force: bool,
    choice: FormatChoice,
    changes: OriginalArguments,
    measuring: MeasuringArguments,
) -> None:
    """Measure MODEL once, for every size and format.

    MODEL is a directory or a Hub id.
    """
    from ..checkpoint.source.original import open_model
    from ..quantize.run import measure_model

    source = open_model(changes.open(model))
    if measuring.saved is None:
        say_shortened(source, calibration=measuring.config.calibration.row_tokens)
    measurement = measure_model(
        source,
        output,
        formats=wanted,
        options=tuple(choice.all.values()),
        measure=measuring.config,
        calibration=measuring.saved,
        hessians=hessians,
        work=measuring.work_dir,
        force=force,
        progress=RunBar(),
    )
    if measurement.experts_sentence is not None:
        say(f"experts: {measurement.experts_sentence}")
    if hessians is not None:
        say(f"Hessians and calibration rows -> {hessians}")
    say(f"{len(measurement.linears)} linears measured for {', '.join(measurement.curves)} -> {output}")


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(list(formats())),
    help=f"Format to plan for.  [default: {next(iter(formats()))}]",
)
@click.option(
    "-b",
    "--bpw",
    type=RATES,
    help="Bits per weight, as for `bpwise quantize`. Several: 2,3,4.",
)
@click.option("--max-size", type=SIZE, help="Maximum size on disk, instead of --bpw: 5GB, 700MiB.")
@click.option("--vram", type=SIZE, help="GPU memory to fit into, context included, instead of --bpw: 8GB.")
@click.option(
    "--context",
    type=TOKENS,
    help="With --vram: context length in tokens, such as 32k.  [default: the model's maximum]",
)
@format_options("plan")
@click.option(
    "-o",
    "--output",
    "saved",
    type=PATH,
    help="File to save the plan in; a folder if there are several.  [default: plan-BPW.json or plan.json beside "
    "MEASUREMENT]",
)
@click.option("--html", type=FILE, help="Write a web page with the plans of all sizes and formats.")
@FORCE_OPTION
@JSON_OPTION
def plan(
    measurement: Path,
    bpw: tuple[float, ...] | None,
    max_size: int | None,
    vram: int | None,
    context: int | None,
    saved: Path | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    choice: FormatChoice,
) -> None:
    """Plan a size: show what each part of a model would get, and the predicted damage.

    Saves the plan as well. Takes a second, and needs only MEASUREMENT, not the model.
    """
    from ..checkpoint.files.paths import check_file
    from ..convert.registry import is_plan
    from ..measure.measurement import Measurement
    from ..quantize.planning.page import is_plan_page, write_plan_page
    from ..quantize.planning.plans import make_plan

    if sum(each is not None for each in (bpw, max_size, vram)) > 1:
        raise click.UsageError("give only one of --bpw, --max-size and --vram.")
    single = max_size is not None or vram is not None
    if not (bpw or single or html):
        raise click.UsageError("give --bpw, --max-size or --vram for a plan, or --html for a page with all sizes.")
    outputs = _plan_files(measurement, bpw or (), saved, single=single)
    for path in outputs:
        check_file(path, is_plan, "a plan", read=measurement, force=force)
    if html is not None:
        check_file(html, is_plan_page, "a page of plans", read=measurement, force=force)
    measured = Measurement.load(measurement)
    sizes = {"max_bytes": max_size, "vram_bytes": vram, "context_tokens": context}
    plans = {path: make_plan(measured, bpw=rate, **sizes, options=choice.options) for path, rate in outputs.items()}
    for path, made in plans.items():
        made.save(path)
    if html is not None:
        write_plan_page(measured, html, model=measurement.stem, options=choice.all)
    for name in measured.without_feedback:
        say(f"fallback: {name} was measured without error feedback", err=True)
    if as_json:
        contents = [{"path": str(path), **made.content()} for path, made in plans.items()]
        page = None if html is None else str(html)
        say_json("plan", {"measurement": str(measurement), "plans": contents, "html": page})
        return
    for line in _plan_lines(plans):
        say(line)
    if html is not None:
        say(f"plans of all sizes -> {html}")


def _plan_files(
    measurement: Path, rates: Sequence[float], saved: Path | None, *, single: bool
) -> dict[Path, float | None]:
    # The bits per weight of each plan; None where a size says them.
    if len(rates) > 1:
        if saved is not None and saved.is_file():
            raise click.UsageError(f"several plans need a folder, but {saved} is a file. Choose another --output.")
        folder = saved or measurement.parent
        return {folder / f"plan-{rate:g}.json": rate for rate in rates}
    if saved is not None and saved.is_dir():
        raise click.UsageError(f"{saved} is a directory. Expected a file for --output.")
    if single:
        return {saved or measurement.with_name("plan.json"): None}
    return {saved or measurement.with_name(f"plan-{rate:g}.json"): rate for rate in rates}


def _plan_lines(plans: Mapping[Path, Plan]) -> list[str]:
    # All of one plan; of several what tells them apart.
    if len(plans) == 1:
        ((path, made),) = plans.items()
        described = made.describe()
        above = "" if made.gap is None else f", at most {100 * made.gap:.3f} % above the best possible"
        return [*described.table.to_lines(), *described.facts, f"{made.bpw:.4f} bpw{above} -> {path}"]
    if not plans:
        return []
    rows = [
        (f"{made.bpw:.4f}", bytes_text(made.stored_bytes), f"{made.damage_nats or 0:.6f}", str(path))
        for path, made in plans.items()
    ]
    return Table.of(("bpw", "size", "damage, nats/token", "plan"), rows).to_lines()


@cli.command()
@click.argument("measurement", type=EXISTING_FILE)
@click.option("--for", "engine", type=click.Choice(list(exporters())), required=True, help="Program to export for.")
@click.option(
    "-b",
    "--bpw",
    type=float,
    help="Bits per weight: for llama-quantize and ik of all tensors, for others of all linears but the head.",
)
@click.option("--max-size", type=SIZE, help="Largest size of the model's files, instead of --bpw: 5GB, 700MiB.")
@click.option(
    "-o", "--output", type=FILE, help="File to write.  [default: MEASUREMENT-ENGINE-4bpw.SUFFIX beside MEASUREMENT]"
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@FORCE_OPTION
def export(
    measurement: Path,
    engine: str,
    bpw: float | None,
    max_size: int | None,
    output: Path | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Write a plan for another program that quantizes models.

    Prints the commands that take it. Needs MEASUREMENT alone, not the model.
    """
    from ..checkpoint.files.paths import check_file
    from ..convert.conversion import Target
    from ..convert.export.export import default_output, export_plan, is_export

    if (bpw is None) == (max_size is None):
        raise click.UsageError("an export needs one target. Give --bpw or --max-size.")
    path = output or default_output(measurement, engine, Target(bpw=bpw, max_bytes=max_size))
    if not dry_run:
        check_file(path, lambda file: is_export(file, engine), f"a plan for {engine}", read=measurement, force=force)
    made = export_plan(measurement, path, engine=engine, bpw=bpw, max_bytes=max_size, dry_run=dry_run)
    for line in (*made.facts, f"plan for {engine} -> {path}{', not written' if dry_run else ''}", *made.commands):
        say(line)


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
