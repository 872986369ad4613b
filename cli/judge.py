"""What was made: ``verify``, ``eval``, ``inspect``, ``dequantize``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import WorkDirectoryError, install_command
from ..tables import bytes_text
from .group import cli
from .options import (
    NO_CACHE_OPTION,
    OFFLOAD_OPTION,
    ROW_TOKENS_DEFAULT,
    Command,
    OriginalArguments,
    TaskArguments,
    extra_options,
    grouped,
    original_options,
)
from .output import JSON_OPTION, note, progress_bar, say, say_json, say_shortened
from .types import DIRECTORY, EXISTING_DIRECTORY, MODEL

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import TensorSource
    from ..convert.plan import LinearCost
    from ..eval.comparison import Comparison, EvalConfig
    from ..eval.tasks.benchmarks import LoadedTasks
    from ..eval.tasks.needle import NeedleConfig

__all__ = ["dequantize", "evaluate", "inspect", "verify"]


@cli.command()
@click.argument("model", type=MODEL)
@JSON_OPTION
def verify(model: Path | str, as_json: bool) -> None:
    """Read every tensor of MODEL back and check it.

    MODEL is an EXL2 directory, a GGUF file, or a model on the Hub: ORG/NAME-exl2@REVISION, ORG/NAME-GGUF:Q4_K_M.
    """
    from ..convert.opening import locate_model, verify_model
    from ..eval.publishing.mark import read_mark

    path = locate_model(model)
    reason = read_mark(path)
    if reason is not None:
        say(f"warning: {model} is marked as broken. {reason}", err=True)
    found = verify_model(path)
    for warning in found.warnings:
        say(f"warning: {warning}", err=True)
    if as_json:
        say_json("verify", {"model": str(model), "broken": reason, **found.to_dict()})
        return
    outcome = "exactly as written" if found.compared else "as finite, well-formed values (no hashes to compare with)"
    say(f"{model}: {found.quantized} quantized and {found.others} other tensors read back {outcome}.")
    rates = [f"{part} {bpw:.4f} bpw" for part, bpw in found.rates.items()]
    say(", ".join((*rates, *found.facts, bytes_text(found.file_bytes))))


def _config_options(command: Command) -> Command:
    # Options of the comparison; the command gets them as ``config``.
    declared = (
        click.option("--text", help="Evaluation text: a file, directory or Hub data set.  [default: built-in]"),
        click.option("--column", help="Column of the data set that contains the text."),
        click.option("-r", "--rows", type=click.IntRange(1), default=16, help="Number of evaluation sequences."),
        click.option(
            "-l", "--row-tokens", type=click.IntRange(2), help=f"Tokens in each sequence.  {ROW_TOKENS_DEFAULT}"
        ),
        click.option("--seed", type=int, default=0, help="Random seed: which sequences of the built-in text to use."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            help="Precision to compute in.",
        ),
        click.option("--device", default="auto", help="Device to compute on: cpu, cuda, cuda:N, mps or auto."),
        OFFLOAD_OPTION,
        click.option(
            "--prompt", help="Show every model's answer to this prompt.  [default: a short one, for chat models]"
        ),
        click.option(
            "--domains",
            flag_value="built-in",
            help="Measure chat, prose, code, non-Latin, long documents and tool calls one by one too, on texts of "
            "bpwise's own.",
        ),
        click.option(
            "--domains-mix", "domains", flag_value="mix", help="The same as --domains, on data sets of the Hub."
        ),
        click.option("--answers", is_flag=True, help="Count how far the answers of chat models to 24 chats agree."),
        click.option("--force-eval-text", is_flag=True, help="Allow text that QUANTIZED was calibrated on."),
    )
    names = (
        *("text", "column", "rows", "row_tokens", "seed", "dtype", "device"),
        *("offload_dir", "prompt", "domains", "answers", "force_eval_text"),
    )
    return grouped(command, declared, "config", names, _config)


def _config(*, force_eval_text: bool, **given: Any) -> EvalConfig:
    from ..eval.config import EvalConfig

    return EvalConfig(allow_calibration_text=force_eval_text, **given)


@cli.command(name="eval")
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True, type=MODEL)
@_config_options
@click.option(
    "--engine",
    type=click.Choice(["transformers", "llama.cpp"]),
    default="transformers",
    help="Program that runs the models. llama.cpp runs GGUF files and --base, on the CPU.",
)
@click.option("--base", type=MODEL, help="ORIGINAL as an unquantized GGUF file; needed with --engine llama.cpp.")
@click.option(
    "--llama-cpp",
    type=EXISTING_DIRECTORY,
    help="Build of llama.cpp to use.  [default: the one in the package xllamacpp]",
)
@click.option(
    "-o",
    "--output",
    type=DIRECTORY,
    help="Directory for the report.  [default: in or beside QUANTIZED; the current directory if there are several, or "
    "they are on the Hub]",
)
@original_options
@click.option("--plots", is_flag=True, help="Also write the charts as SVG files.")
@click.option("--png", is_flag=True, help=f"Also write the charts as PNG files ({install_command('png')}).")
@click.option(
    "--cache-dir",
    type=DIRECTORY,
    help="Cache for the original's results, which the next run on the same text reuses.  [default: ~/.cache/bpwise]",
)
@NO_CACHE_OPTION
@extra_options
def evaluate(
    original: str,
    quantized: tuple[Path | str, ...],
    output: Path | None,
    engine: str,
    base: Path | str | None,
    llama_cpp: Path | None,
    plots: bool,
    png: bool,
    cache_dir: Path | None,
    no_cache: bool,
    config: EvalConfig,
    changes: OriginalArguments,
    extra: TaskArguments,
) -> None:
    """Compare quantized models with ORIGINAL.

    Measures perplexity, KL divergence and agreement, and writes report.html, report.md, report.json and report.csv.
    QUANTIZED is one or more EXL2 directories, GGUF files, or models on the Hub: ORG/NAME-exl2@4.0bpw,
    ORG/NAME-GGUF:Q4_K_M, ORG/NAME-GGUF/FILE.gguf. Several models share one report. The report of MODEL.gguf is
    MODEL.report.html, or MODEL.llama.cpp.report.html with that engine.
    """
    from ..convert.opening import locate_model, open_any
    from ..eval.cache import OriginalCache, default_cache_directory
    from ..eval.comparison import evaluate_each
    from ..eval.engines.engine import open_for_engine
    from ..eval.report.drawings.png import check_png
    from ..eval.report.layers import find_plan, linear_costs
    from ..eval.tasks.needle import check_needle

    place, prefix = _report_place(quantized, output, engine)
    forms = [form for form, wanted in (("svg", plots), ("png", png)) if wanted]
    read = [Path(each) for each in (original, changes.lora) if each is not None and Path(each).is_dir()]
    _check_places(read, [output, cache_dir, config.offload_dir], place, prefix, forms)
    source = open_any(changes.open(original))
    if png:
        check_png()
    say_shortened(source, evaluation=config.row_tokens)
    loaded, needle = extra.benchmarks(config), extra.haystacks(config)
    models = [locate_model(each) for each in quantized]
    if needle is not None:
        check_needle(source, models, needle)
    # A damaged plan beside a model is found before the long work.
    costs = [linear_costs(open_for_engine(model), find_plan(model)) for model in models]
    if engine == "llama.cpp":
        comparisons = _compared_in_engine(source, models, config, base, llama_cpp)
    else:
        cache = None if no_cache else OriginalCache(cache_dir or default_cache_directory())
        comparisons = list(evaluate_each(source, models, config, progress_bar, cache=cache))
    _write_reports(source, comparisons, models, costs, loaded, needle, place, prefix, forms)


def _report_place(quantized: Sequence[Path | str], output: Path | None, engine: str) -> tuple[Path, str]:
    # The directory that the report goes into, and what its files' names begin with.
    from ..checkpoint.files.paths import companion
    from ..convert.names import REPORT_FILE

    only = quantized[0] if len(quantized) == 1 else None
    usual = companion(only, REPORT_FILE) if isinstance(only, Path) else Path(REPORT_FILE)
    prefix = usual.name.removesuffix(REPORT_FILE) + ("llama.cpp." if engine == "llama.cpp" else "")
    return output or usual.parent, prefix


def _check_places(
    read: Sequence[Path], places: Sequence[Path | None], report: Path, prefix: str, plots: Sequence[str]
) -> None:
    from ..checkpoint.files.paths import refuse_inputs, try_directory
    from ..eval.report.report import try_report

    for path in places:
        if path is not None:
            refuse_inputs(path, directories=read)
            try_directory(path)
    try_report(report, prefix=prefix, plots=plots)


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
        note(f"report so far: {report}")
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
    from ..eval.engines.engine import open_for_engine
    from ..eval.report.layers import predicted_damage
    from ..quantize.judge import reconsider_mark

    for path, comparison, each in zip(quantized, comparisons, costs, strict=True):
        if reconsider_mark(path, comparison, predicted_nats=predicted_damage(open_for_engine(path), each)):
            say(f"warning     {path} stays marked as broken", err=True)


def _compared_in_engine(
    source: TensorSource, quantized: Sequence[Path], config: EvalConfig, base: Path | str | None, llama_cpp: Path | None
) -> list[Comparison]:
    from ..convert.opening import locate_model
    from ..eval.engines.engine import evaluate_in_engine

    if base is None:
        raise click.UsageError("--engine llama.cpp needs --base: the original, unquantized, in llama.cpp's format.")
    file = locate_model(base)
    return [
        evaluate_in_engine(source, model, config, progress_bar, base=file, llama_cpp=llama_cpp) for model in quantized
    ]


@cli.command()
@click.argument("path", type=MODEL)
@JSON_OPTION
def inspect(path: Path | str, as_json: bool) -> None:
    """Show what is in a model, measurement, plan or calibration set.

    PATH is a model directory, a file of any of these kinds, or a model on the Hub.
    """
    from ..convert.opening import locate_model
    from ..quantize.inspect import inspect_path

    found = inspect_path(locate_model(path))
    if as_json:
        say_json("inspect", {"path": str(path), "kind": found.kind, **found.content})
        return
    say(f"{path}: {found.kind}")
    for fact in found.facts:
        say(f"  {fact}")
    for line in found.table.to_lines():
        say(line)


@cli.command()
@click.argument("model", type=MODEL)
@click.argument("output", type=DIRECTORY)
@click.option(
    "--original", type=MODEL, help="Model to copy the tokenizer from: it cannot be restored from a GGUF file."
)
def dequantize(model: Path | str, output: Path, original: Path | str | None) -> None:
    """Decode MODEL into a float16 checkpoint for Transformers.

    MODEL is an EXL2 directory, a GGUF file, or a model on the Hub.
    """
    from ..convert.dense import dequantize_model
    from ..convert.opening import locate_model

    beside = None if original is None else locate_model(original)
    if not dequantize_model(locate_model(model), output, original=beside):
        say("no tokenizer was written: give the original model with --original", err=True)
    say(f"dense float16 checkpoint -> {output}")
