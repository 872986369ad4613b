"""What was made: ``verify``, ``eval``, ``inspect``, ``dequantize``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import WorkDirectoryError, printable
from .group import cli
from .options import (
    DIRECTORY,
    EXISTING_DIRECTORY,
    EXISTING_FILE,
    EXISTING_PATH,
    MIB,
    OFFLOAD_OPTION,
    ROW_TOKENS_DEFAULT,
    TASK_OPTIONS,
    extra_options,
    open_original,
    original_options,
    progress_bar,
    say_shortened,
)
from .output import say

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import TensorSource
    from ..eval.comparison import Comparison, EvalConfig
    from ..eval.report.layers import LinearCost
    from ..eval.tasks.benchmarks import LoadedTasks
    from ..eval.tasks.needle import NeedleConfig

__all__ = ["dequantize", "evaluate", "inspect", "verify"]

_MOST_CELL_CHARACTERS = 200


@cli.command()
@click.argument("model", type=EXISTING_PATH)
def verify(model: Path) -> None:
    """Read every tensor of MODEL (an EXL2 directory or a GGUF file) back and compare it with what was meant."""
    from ..convert.exl2.file.verify import verify_model
    from ..convert.publishing.mark import read_mark

    reason = read_mark(model)
    if reason is not None:
        say(f"warning: {model} is marked as broken. {reason}", err=True)
    if model.is_file():
        _verify_gguf(model)
        return
    found = verify_model(model)
    say(
        f"{model}: {found.linears} quantized linears and {found.tensors} other tensors "
        + ("decode to what was meant." if found.had_manifest else "follow the format (no manifest to compare with).")
    )
    float16 = f" ({found.float16_linears} linears in float16)" if found.float16_linears else ""
    say(
        f"decoder {found.decoder_bpw:.4f} bpw{float16}, head {found.head_bpw:.4f} bpw, {found.file_bytes / MIB:.1f} MiB"
    )


def _verify_gguf(model: Path) -> None:
    from ..convert.gguf.file.verify import verify_gguf

    found = verify_gguf(model)
    types = ", ".join(f"{count} {name}" for name, count in found.tensors_by_type.items())
    say(f"{model}: {sum(found.tensors_by_type.values())} tensors decode to finite values ({types}).")
    if not found.known_architecture:
        say(f"architecture {found.architecture!r} is not known: names and shapes were not checked", err=True)
    say(f"{found.bpw:.4f} bpw over all tensors, {found.file_bytes / MIB:.1f} MiB")


@cli.command(name="eval")
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True, type=EXISTING_PATH)
@click.option("--text", help="Text to evaluate on: file, directory or Hub data set.  [default: Python's own text]")
@click.option("--column", help="Column of the data set that holds the text.")
@click.option("-r", "--rows", type=click.IntRange(1), default=16, help="Rows, each a window of its own.")
@click.option("-l", "--row-tokens", type=click.IntRange(2), help=f"Tokens in each row.  {ROW_TOKENS_DEFAULT}")
@click.option("--seed", type=int, default=0, help="Chooses the places that rows of Python's own text are taken from.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="Arithmetic.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto.")
@OFFLOAD_OPTION
@click.option("--force-eval-text", is_flag=True, help="Evaluate even on text that QUANTIZED was calibrated on.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "llama.cpp"]),
    default="transformers",
    help="What runs both models; llama.cpp: a GGUF file and --base, on the CPU.",
)
@click.option("--base", type=EXISTING_FILE, help="ORIGINAL as an unquantized GGUF file, for --engine llama.cpp.")
@click.option(
    "--llama-cpp", type=EXISTING_DIRECTORY, help="A built llama.cpp to run.  [default: the one in xllamacpp's wheel]"
)
@click.option(
    "-o",
    "--output",
    type=DIRECTORY,
    help="Where the report goes.  [default: in, or beside, QUANTIZED; of several the current directory]",
)
@original_options
@click.option("--plots", is_flag=True, help="Write the report's drawings as SVG files too.")
@click.option("--png", is_flag=True, help="Write the report's drawings as PNG files too (pip install 'bpwise[png]').")
@click.option(
    "--cache-dir",
    type=DIRECTORY,
    help="Where the original's side is kept for the next evaluation on the same text.  [default: ~/.cache/bpwise]",
)
@click.option("--no-cache", is_flag=True, help="Run the original, and keep nothing.")
@extra_options
def evaluate(
    original: str,
    quantized: tuple[Path, ...],
    output: Path | None,
    engine: str,
    base: Path | None,
    llama_cpp: Path | None,
    plots: bool,
    png: bool,
    cache_dir: Path | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Compare QUANTIZED (directories or GGUF files) with ORIGINAL: perplexity, KL divergence, agreement.

    Writes report.html, report.md, report.json and report.csv. Reports of a GGUF file MODEL.gguf are named
    MODEL.report.html and so on, of another engine MODEL.llama.cpp.report.html. Several models get one report.
    """
    from ..eval.cache import OriginalCache, default_cache_directory
    from ..eval.comparison import EvalConfig, evaluate_each
    from ..eval.models import open_any
    from ..eval.report.drawings.png import check_png
    from ..eval.report.layers import find_plan, linear_costs
    from ..eval.tasks.benchmarks import TaskConfig, load_tasks
    from ..eval.tasks.needle import NeedleConfig, check_needle

    place, prefix = _report_place(quantized, output, engine)
    forms = [form for form, wanted in (("svg", plots), ("png", png)) if wanted]
    _check_places(original, options, place, prefix, forms, given=[output, cache_dir])
    source = open_any(open_original(original, options))
    if png:
        check_png()
    lengths, samples = options.pop("needle"), options.pop("needle_samples")
    asked = {name: options.pop(name) for name in TASK_OPTIONS}
    config = EvalConfig(allow_calibration_text=options.pop("force_eval_text"), **options)
    say_shortened(source, evaluation=config.row_tokens)
    loaded, hidden = None, None
    if asked["tasks"]:
        loaded = load_tasks(TaskConfig(**asked, dtype=config.dtype, device=config.device))
    if lengths:
        hidden = NeedleConfig(
            lengths=lengths,
            samples=samples,
            text=config.text,
            column=config.column,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
        )
        check_needle(source, quantized, hidden)
    # A damaged plan beside a model is found before the long work.
    costs = [linear_costs(open_any(model), find_plan(model)) for model in quantized]
    if engine == "llama.cpp":
        comparisons = _compared_in_engine(source, quantized, config, base, llama_cpp)
    else:
        cache = None if no_cache else OriginalCache(cache_dir or default_cache_directory())
        comparisons = list(evaluate_each(source, quantized, config, progress_bar, cache=cache))
    _write_reports(source, comparisons, quantized, costs, loaded, hidden, place, prefix, forms)


def _report_place(quantized: Sequence[Path], output: Path | None, engine: str) -> tuple[Path, str]:
    # The directory that the report goes into, and what its files' names begin with.
    first, alone = quantized[0], len(quantized) == 1
    prefix = f"{first.stem}." if alone and first.is_file() else ""
    prefix += "llama.cpp." if engine == "llama.cpp" else ""
    beside = first.parent if first.is_file() else first
    return output or (beside if alone else Path()), prefix


def _check_places(
    original: str,
    options: dict[str, Any],
    place: Path,
    prefix: str,
    plots: Sequence[str],
    *,
    given: Sequence[Path | None],
) -> None:
    from ..checkpoint.files.paths import refuse_inputs, try_directory
    from ..eval.report.report import try_report

    read = [path for path in (Path(original), options["lora"]) if path is not None and path.is_dir()]
    places = [path for path in (*given, options["offload_dir"]) if path is not None]
    for path in places:
        refuse_inputs(path, directories=read)
        try_directory(path)
    try_report(place, prefix=prefix, plots=plots)


def _write_reports(
    source: TensorSource,
    comparisons: Sequence[Comparison],
    quantized: Sequence[Path],
    costs: Sequence[tuple[LinearCost, ...]],
    tasks: LoadedTasks | None,
    needle: NeedleConfig | None,
    place: Path,
    prefix: str,
    plots: Sequence[str],
) -> None:
    # The comparisons first: what follows may take hours, and nothing before it is to be lost with it.
    from ..eval.report.content import Report
    from ..eval.report.extras import Extras, extras_lines
    from ..eval.report.markdown import joint_lines, summary_lines
    from ..eval.report.report import earlier_details, write_report
    from ..eval.tasks.benchmarks import evaluate_tasks
    from ..eval.tasks.needle import evaluate_needle

    details = earlier_details(place, comparisons[0], prefix=prefix) if len(quantized) == 1 else {}

    def written(extras: Extras) -> Path:
        shown = Report(comparisons=tuple(comparisons), costs=tuple(costs), details=details, extras=extras)
        return write_report(shown, place, prefix=prefix, plots=plots).html

    extras = Extras()
    lines = joint_lines(comparisons) if len(quantized) > 1 else summary_lines(comparisons[0])
    try:
        report = written(extras)
    except WorkDirectoryError:  # the place has changed since it was tried: the numbers are not lost with it
        for line in lines:
            say(line)
        raise
    _reconsider_marks(quantized, comparisons, costs)
    if tasks is not None or needle is not None:
        say(f"report so far: {report}", err=True)
    if tasks is not None:
        extras = replace(extras, tasks=evaluate_tasks(source, quantized, tasks, progress_bar))
        report = written(extras)
    if needle is not None:
        extras = replace(extras, needle=evaluate_needle(source, quantized, needle, progress_bar))
        report = written(extras)
    for line in (*lines, *extras_lines(extras)):
        say(line)
    say(f"report      {report}")


def _reconsider_marks(
    quantized: Sequence[Path], comparisons: Sequence[Comparison], costs: Sequence[tuple[LinearCost, ...]]
) -> None:
    from ..eval.models import open_any
    from ..quantize.judge import predicted_damage, reconsider_mark

    for path, comparison, each in zip(quantized, comparisons, costs, strict=True):
        if reconsider_mark(path, comparison, predicted_nats=predicted_damage(open_any(path), each)):
            say(f"warning     {path} stays marked as broken", err=True)


def _compared_in_engine(
    source: TensorSource, quantized: Sequence[Path], config: EvalConfig, base: Path | None, llama_cpp: Path | None
) -> list[Comparison]:
    from ..eval.engines.engine import evaluate_in_engine

    if base is None:
        raise click.UsageError("--engine llama.cpp needs --base: the original as an unquantized GGUF file.")
    return [
        evaluate_in_engine(source, model, config, progress_bar, base=base, llama_cpp=llama_cpp) for model in quantized
    ]


@cli.command()
@click.argument("path", type=EXISTING_PATH)
def inspect(path: Path) -> None:
    """Show what is in PATH: an EXL2 or checkpoint directory, a GGUF file, a measurement, calibration set or plan."""
    from ..quantize.inspect import inspect_path

    found = inspect_path(path)
    say(f"{path}: {found.kind}")
    for fact in found.facts:
        say(f"  {fact}")
    rows = [[printable(cell, _MOST_CELL_CHARACTERS) for cell in row] for row in (found.header, *found.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@cli.command()
@click.argument("model", type=EXISTING_PATH)
@click.argument("output", type=DIRECTORY)
@click.option(
    "--original", type=EXISTING_DIRECTORY, help="Where to copy the tokenizer from: a GGUF file cannot give it back."
)
def dequantize(model: Path, output: Path, original: Path | None) -> None:
    """Turn MODEL (an EXL2 directory or a GGUF file) back into a plain float16 checkpoint OUTPUT.

    Transformers loads it anywhere.
    """
    from ..convert.dense import dequantize_model
    from ..convert.gguf.dense import dequantize_gguf

    if model.is_file():
        dequantize_gguf(model, output, original=original)
        if original is None:
            say("no tokenizer was written: name the original model's directory with --original", err=True)
    else:
        dequantize_model(model, output)
    say(f"dense float16 checkpoint -> {output}")
