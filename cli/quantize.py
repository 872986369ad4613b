"""``bpwise quantize``: the whole line, to either format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
    SIZE,
    TOKENS,
    calibration_options,
    open_original,
    original_options,
    progress_bar,
    read_head_bits,
    read_measure_config,
    refuse_beside,
)

if TYPE_CHECKING:
    from ..convert.original import Original
    from ..eval.comparison import EvalConfig
    from ..measure.calibration import CalibrationSet
    from ..measure.run import MeasureConfig
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
@click.option("--eval-row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each of them.")
@click.option("--no-eval", is_flag=True, help="Leave the comparison with the original out.")
@click.option("--force-eval-text", is_flag=True, help="Evaluate even on text that is calibrated on.")
@click.option("--base-model", metavar="ORG/NAME", help="The original's Hub id, for the card.  [default: MODEL's]")
@click.option("--card", is_flag=True, help="GGUF: write a model card NAME.README.md too, as EXL2 outputs have one.")
@click.option("--force", is_flag=True, help="EXL2: quantize even what EXL2 readers do not know the architecture of.")
@click.option("--dry-run", is_flag=True, help="EXL2: print size, bpw range and expected memory; write nothing.")
@original_options
@calibration_options
def quantize(model: str, output: Path, output_format: str | None, **options: Any) -> None:
    """Quantize MODEL (a directory or a Hub id) to OUTPUT, an EXL2 directory or a GGUF file, and compare the two.

    With several bitrates the outputs are OUTPUT/MODEL-8.0bpw-6hb-exl2 or OUTPUT/MODEL-8.0bpw.gguf and so on, beside a
    report over all. An output whose predictions turn out useless is marked by BROKEN.md, and the exit code is 1. The
    same command run again goes on where it was cut off.
    """
    from ..eval.comparison import EvalConfig

    if options["measurement"]:
        refuse_beside(
            "--measurement",
            (
                "calibration",
                "column",
                "chat_template",
                "rows",
                "row_tokens",
                "seed",
                "group_size",
                "damping",
                "moe_calibrate_all",
            ),
            "which brings its own calibration rows, group size and damping",
        )
    evaluate = EvalConfig(
        text=options["eval_text"],
        rows=options["eval_rows"],
        row_tokens=options["eval_row_tokens"],
        device=options["device"],
        allow_calibration_text=options["force_eval_text"],
        offload_dir=options["offload_dir"],
    )
    run = _quantize_to_gguf if (output_format or output.suffix[1:]) == "gguf" else _quantize_to_exl2
    run(open_original(model, options), output, None if options["no_eval"] else evaluate, options)


def _quantize_to_exl2(model: Original, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..quantize.pipeline import QuantizeConfig, quantize_model
    from ..quantize.scope import WidthOverride

    refuse_beside(
        "an EXL2 output",
        ("mixture", "imatrix", "no_feedback", "llama_cpp", "card"),
        "it is for GGUF",
    )
    if sum(options[target] is not None for target in ("bpw", "max_size", "vram")) != 1:
        raise click.UsageError("an EXL2 output needs one of --bpw, --max-size and --vram.")
    _refuse_without_vram(options)
    measure_config, saved = read_measure_config(options, types=False)
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
        known = _config_of(options["measurement"]) if options["measurement"] else measure_config
        for bpw in rates or (None,):
            _print_forecast(model, replace(config, bpw=bpw, measure=known))
        return
    _run(quantize_model, model, output, config, saved, options)


def _quantize_to_gguf(model: Original, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..quantize.gguf_pipeline import GgufConfig, quantize_to_gguf
    from ..quantize.type_plan import Override

    refuse_beside(
        "a GGUF output",
        ("head_bits", "keep_fp16", "effort", "cache_bits", "shard_size", "dry_run", "force"),
        "it is for EXL2",
    )
    if sum(options[target] is not None for target in ("bpw", "max_size", "vram", "mixture")) != 1:
        raise click.UsageError("a GGUF output needs one of --bpw, --max-size, --vram and --type.")
    _refuse_without_vram(options)
    if options["mixture"]:
        _convert_to_mixture(model, output, evaluate, options)
        return
    if options["imatrix"]:
        raise click.UsageError(
            "--imatrix goes with --type; with --bpw and --max-size the measurement says what matters."
        )
    measure_config, saved = read_measure_config(options, types=True)
    rates = options["bpw"] or ()
    if len(rates) > 1 and output.suffix == ".gguf":
        raise click.UsageError("several bitrates make several files: name a directory, with --format gguf.")
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


def _refuse_without_vram(options: dict[str, Any]) -> None:
    if options["vram"] is None and (options["context"] is not None or options["cache_bits"] != "16"):
        raise click.UsageError("--context and --cache-bits go with --vram.")


def _run(
    quantize_one: Callable[..., QuantizeResult | GgufResult],
    model: Original,
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
    for line in run(model, output, config, **shared).summary_lines():
        click.echo(line)


def _convert_to_mixture(model: Original, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from ..convert.original import open_model
    from ..eval.report import summary_lines, write_report
    from ..quantize.gguf_pipeline import convert_to_mixture
    from ..quantize.judge import Judge

    refuse_beside("--type", ("measurement", "override", "no_feedback"), "llama.cpp's mixtures do not know it")
    written, warnings = convert_to_mixture(
        model,
        output,
        options["mixture"],
        imatrix=options["imatrix"],
        llama_cpp=options["llama_cpp"],
        progress=progress_bar,
    )
    for warning in warnings:
        click.echo(f"warning     {warning}", err=True)
    click.echo(f"size        {written.file_bytes / MIB:.1f} MiB; {written.bpw:.4f} bpw over all tensors -> {output}")
    if evaluate is not None:
        judge = Judge(open_model(model), evaluate, progress_bar)
        comparison = judge.compare(output, predicted_nats=None)
        write_report(comparison, output.parent, prefix=f"{output.stem}.")
        judge.sentence(output, comparison, predicted_nats=None)
        for line in summary_lines(comparison):
            click.echo(line)


def _config_of(measurement: Path) -> MeasureConfig:
    # What a forecast needs to know of how the measurement was made.
    from ..measure.calibration import CalibrationConfig
    from ..measure.measurement import Measurement
    from ..measure.run import MeasureConfig

    measured = Measurement.load(measurement)
    rows, row_tokens = measured.tokens.shape
    calibration = CalibrationConfig(rows=rows, row_tokens=row_tokens)
    return MeasureConfig(calibration=calibration, group_size=measured.group_size)


def _print_forecast(model: Original, config: QuantizeConfig) -> None:
    from ..convert.original import open_model
    from ..quantize.kept import kept_lines

    forecast = config.forecast(open_model(model))
    click.echo(f"original      {forecast.original_bytes / MIB:10.1f} MiB")
    click.echo(
        f"quantized     {forecast.output_bytes / MIB:10.1f} MiB at {forecast.bpw:g} bpw, head bits {config.head_bits}"
    )
    click.echo(f"possible bpw  {forecast.lowest_bpw:10.4f} to {forecast.highest_bpw:.4f}")
    for line in kept_lines(forecast.kept, forecast.head_reason):
        click.echo(f"float16       {line}")
    click.echo(f"memory        {forecast.memory_bytes / MIB:10.0f} MiB at most, roughly")
    click.echo(f"work on disk  {forecast.disk_bytes / MIB:10.0f} MiB at most, roughly")
