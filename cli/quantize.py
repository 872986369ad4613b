"""``bpwise quantize``: the whole line, to either format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .effects import is_gguf_output
from .group import cli
from .options import (
    EXISTING_DIRECTORY,
    EXISTING_FILE,
    HEAD_BITS_OPTION,
    KEEP_FP16_OPTION,
    MIB,
    OVERRIDE_OPTION,
    PATH,
    RATES,
    ROW_TOKENS_DEFAULT,
    SIZE,
    TOKENS,
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
    from ..checkpoint.source.checkpoint import Checkpoint
    from ..eval.comparison import EvalConfig
    from ..measure.run import MeasureConfig
    from ..measure.text.calibration import CalibrationSet
    from ..quantize.gguf_pipeline import GgufConfig, GgufResult
    from ..quantize.pipeline import QuantizeConfig, QuantizeResult

__all__ = ["quantize"]


@cli.command()
@click.argument("model")
@click.argument("output", type=PATH)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["exl2", "gguf"]),
    help="[default: gguf if OUTPUT ends so, else exl2]",
)
@click.option(
    "-b",
    "--bpw",
    type=RATES,
    help="Bits per weight: EXL2, of the decoder with overheads; GGUF, of all tensors. Several, as 8.0,6.0,4.5, make "
    "several outputs in the directory OUTPUT from one measurement.",
)
@HEAD_BITS_OPTION
@click.option("--max-size", type=SIZE, help="Largest size of the file or files, as 5GB or 700MiB, instead of --bpw.")
@click.option("--vram", type=SIZE, help="Memory of a GPU to fit into, cache of --context included, instead of --bpw.")
@click.option("--context", type=TOKENS, help="With --vram: tokens of context, as 32k.  [default: the model's]")
@click.option(
    "--cache-bits",
    type=click.Choice(["16", "8", "6", "4"]),
    default="16",
    help="EXL2, with --vram: which of ExLlamaV2's caches the context is kept in.",
)
@click.option(
    "--type", "mixture", help="GGUF: one of llama.cpp's fixed mixtures, as Q4_K_M, exactly as llama-quantize makes it."
)
@click.option("--imatrix", type=EXISTING_FILE, help="GGUF, with --type: an importance matrix.")
@OVERRIDE_OPTION
@KEEP_FP16_OPTION
@click.option(
    "--effort",
    type=click.Choice(["normal", "high"]),
    default="normal",
    help="EXL2: high: after rounding, fit the decoder's scales to what the original predicts; pays at 3 bits and less.",
)
@click.option(
    "--no-feedback",
    is_flag=True,
    help="GGUF: round by ggml alone, in seconds instead of minutes, at two to three times the KL.",
)
@click.option(
    "--llama-cpp", type=EXISTING_DIRECTORY, help="GGUF: llama.cpp or its converter.  [default: as `make` installs it]"
)
@click.option(
    "-m",
    "--measurement",
    type=EXISTING_FILE,
    help="A measurement of this model, with its calibration rows: do not measure again.",
)
@click.option("-ss", "--shard-size", type=click.IntRange(1), default=8192, help="EXL2: largest output file, MiB.")
@click.option("--eval-text", help="Text to evaluate on, as --calibration.  [default: Python's text, another part]")
@click.option("--eval-rows", type=click.IntRange(1), default=16, help="Rows to evaluate on.")
@click.option("--eval-row-tokens", type=click.IntRange(2), help=f"Tokens in each of them.  {ROW_TOKENS_DEFAULT}")
@click.option("--no-eval", is_flag=True, help="Leave the comparison with the original out.")
@click.option("--force-eval-text", is_flag=True, help="Evaluate even on text that is calibrated on.")
@click.option("--base-model", metavar="ORG/NAME", help="The original's Hub id, for the card.  [default: MODEL's]")
@click.option("--card", is_flag=True, help="GGUF: write a model card NAME.README.md too, as EXL2 outputs have one.")
@click.option("--force", is_flag=True, help="EXL2: quantize even what EXL2 readers do not know or compute otherwise.")
@click.option("--dry-run", is_flag=True, help="EXL2: print size, bpw range and expected memory; write nothing.")
@original_options
@calibration_options
def quantize(model: str, output: Path, output_format: str | None, **options: Any) -> None:
    """Quantize MODEL (a directory or a Hub id) to OUTPUT, an EXL2 directory or a GGUF file, and compare the two.

    With several bitrates the outputs are OUTPUT/MODEL-8.0bpw-6hb-exl2 or OUTPUT/MODEL-8.0bpw.gguf and so on, beside a
    report over all. An output whose predictions turn out useless is marked by BROKEN.md, and the exit code is 1. The
    same command run again goes on where it was cut off.
    """
    from ..checkpoint.source.original import open_model
    from ..eval.comparison import EvalConfig

    gguf = is_gguf_output({"output_format": output_format, "output": output})
    _check_usage(output, gguf, options)
    evaluate = EvalConfig(
        text=options["eval_text"],
        rows=options["eval_rows"],
        row_tokens=options["eval_row_tokens"],
        device=options["device"],
        allow_calibration_text=options["force_eval_text"],
        offload_dir=options["offload_dir"],
    )
    source = open_model(open_original(model, options))
    if not options["no_eval"]:
        say_shortened(source, evaluation=evaluate.row_tokens)
    run = _quantize_to_gguf if gguf else _quantize_to_exl2
    run(source, output, None if options["no_eval"] else evaluate, options)


def _check_usage(output: Path, gguf: bool, options: dict[str, Any]) -> None:
    # One target, and an OUTPUT that is named as what it is.
    targets = ("bpw", "max_size", "vram", *(("mixture",) if gguf else ()))
    if sum(options[target] is not None for target in targets) != 1:
        known = "a GGUF output needs one of --bpw, --max-size, --vram and --type."
        raise click.UsageError(known if gguf else "an EXL2 output needs one of --bpw, --max-size and --vram.")
    named_file = output.suffix.lower() == ".gguf"
    if named_file and not gguf:
        raise click.UsageError(
            f"{output} is named as a GGUF file, but --format exl2 makes a directory. Name it otherwise."
        )
    if named_file and len(options["bpw"] or ()) > 1:
        raise click.UsageError("several bitrates make several files: name a directory, with --format gguf.")


def _quantize_to_exl2(model: Checkpoint, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..convert.exl2.plan.problem import WidthOverride
    from ..eval.models import model_name
    from ..quantize.pipeline import QuantizeConfig, quantize_model
    from ..quantize.series import output_paths

    measure_config, saved = _measuring(model, options, types=False)
    rates = options["bpw"] or ()
    config = QuantizeConfig(
        bpw=rates[0] if rates else None,
        max_bytes=options["max_size"],
        vram_bytes=options["vram"],
        context_tokens=options["context"],
        cache_bits=int(options["cache_bits"]),
        head_bits=read_head_bits(options["head_bits"]),
        overrides=tuple(map(WidthOverride.parse, options["override"])),
        keep_fp16=options["keep_fp16"],
        effort=options["effort"],
        measure=measure_config,
        evaluate=evaluate,
        shard_bytes=options["shard_size"] * MIB,
        base_model=options["base_model"],
        force=options["force"],
    )
    if options["dry_run"]:
        _print_warnings(config.reader_warnings(model))
        if len(rates) > 1:
            paths = output_paths(config.base_model or model_name(model), output, config, rates)
            outputs = {path: replace(config, bpw=bpw) for bpw, path in paths.items()}
        else:
            outputs = {output: config}
        _print_forecasts(model, outputs, saved, options["measurement"])
        return
    _run(quantize_model, model, output, config, saved, options)


def _quantize_to_gguf(model: Checkpoint, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..convert.gguf.plan import Override
    from ..quantize.gguf_pipeline import GgufConfig, quantize_to_gguf

    if options["mixture"]:
        _convert_to_mixture(model, output, evaluate, options)
        return
    measure_config, saved = _measuring(model, options, types=True)
    rates = options["bpw"] or ()
    config = GgufConfig(
        bpw=rates[0] if rates else None,
        max_bytes=options["max_size"],
        vram_bytes=options["vram"],
        context_tokens=options["context"],
        overrides=tuple(map(Override.parse, options["override"])),
        feedback=not options["no_feedback"],
        llama_cpp=options["llama_cpp"],
        measure=measure_config,
        evaluate=evaluate,
        card=options["card"],
        base_model=options["base_model"],
    )
    _run(quantize_to_gguf, model, output, config, saved, options)


def _measuring(
    model: Checkpoint, options: dict[str, Any], *, types: bool
) -> tuple[MeasureConfig, CalibrationSet | None]:
    config, saved = read_measure_config(options, types=types)
    if saved is None and options["measurement"] is None:
        say_shortened(model, calibration=config.calibration.row_tokens)
    return config, saved


def _run(
    quantize_one: Callable[..., QuantizeResult | GgufResult],
    model: Checkpoint,
    output: Path,
    config: QuantizeConfig | GgufConfig,
    calibration: CalibrationSet | None,
    options: dict[str, Any],
) -> None:
    # One output, or one for each of several rates.
    from ..quantize.series import quantize_series

    shared = {
        "measurement": options["measurement"],
        "calibration": calibration,
        "work": options["work_dir"],
        "progress": progress_bar,
    }
    rates = options["bpw"] or ()
    run = partial(quantize_series, rates=rates) if len(rates) > 1 else quantize_one
    _print_warnings(config.reader_warnings(model))
    for line in run(model, output, config, **shared).summary_lines():
        say(line)


def _convert_to_mixture(model: Checkpoint, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..convert.gguf.llama_cpp.readers import require_llama_cpp
    from ..eval.report.content import Report
    from ..eval.report.markdown import summary_lines
    from ..eval.report.report import try_report, write_report
    from ..quantize.gguf_pipeline import convert_to_mixture
    from ..quantize.judge import Judge

    limits = require_llama_cpp(model.config)
    _print_warnings(limits)
    if evaluate is not None:
        try_report(output.parent, prefix=f"{output.stem}.")
    judge = None if evaluate is None else Judge(model, evaluate, progress_bar)
    written, warnings = convert_to_mixture(
        model,
        output,
        options["mixture"],
        imatrix=options["imatrix"],
        llama_cpp=options["llama_cpp"],
        judge=judge,
        progress=progress_bar,
    )
    _print_warnings(warning for warning in warnings if warning not in limits)
    say(f"size        {written.file_bytes / MIB:.1f} MiB; {written.bpw:.4f} bpw over all tensors -> {output}")
    if judge is not None:
        comparison = judge.compare(output, predicted_nats=None)
        write_report(Report(comparisons=(comparison,)), output.parent, prefix=f"{output.stem}.")
        judge.mark_if_broken(output, comparison, predicted_nats=None)
        for line in summary_lines(comparison):
            say(line)


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        say(f"warning     {warning}", err=True)


def _print_forecasts(
    model: Checkpoint, outputs: Mapping[Path, QuantizeConfig], rows: CalibrationSet | None, measurement: Path | None
) -> None:
    from ..convert.exl2.plan.problem import shown_range
    from ..convert.exl2.plan.unquantized import unquantized_lines
    from ..quantize.measuring import load_measurement
    from ..quantize.support import require_exl2

    measured = None if measurement is None else load_measurement(measurement, model, progress_bar)
    for output, forecast in require_exl2(model, outputs, measured=measured, rows=rows).items():
        bits = outputs[output].head_bits
        say(f"original      {forecast.original_bytes / MIB:10.1f} MiB")
        say(f"quantized     {forecast.output_bytes / MIB:10.1f} MiB at {forecast.bpw:g} bpw, head bits {bits}")
        say(f"possible bpw  {shown_range(forecast.lowest_bpw, forecast.highest_bpw):>20}")
        for line in unquantized_lines(forecast.kept, forecast.head_reason):
            say(f"float16       {line}")
        say(f"memory        {forecast.memory_bytes / MIB:10.0f} MiB at most, roughly")
        say(f"work on disk  {forecast.disk_bytes / MIB:10.0f} MiB at most, roughly")
