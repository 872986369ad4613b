"""The command line: one command a stage. Commands parse, call the library and print; no maths, no state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click
from click.core import ParameterSource

from .errors import BpwiseError
from .version import __version__

if TYPE_CHECKING:
    from .eval.comparison import EvalConfig
    from .measure.calibration import CalibrationSet
    from .measure.measurement import Measurement
    from .measure.run import MeasureConfig
    from .quantize.gguf_pipeline import GgufConfig
    from .quantize.pipeline import QuantizeConfig
    from .quantize.plan import HeadBits

__all__ = ["cli", "main"]

_MIB = 1 << 20
_Command = TypeVar("_Command", bound=Callable[..., Any])

_FILE = click.Path(dir_okay=False, path_type=Path)
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_EXISTING_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_EXISTING_PATH = click.Path(exists=True, path_type=Path)


class _Size(click.ParamType[int]):
    """A number of bytes, with a unit or without."""

    name = "size"
    _UNITS: ClassVar = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", str(value).lower())
        if match is None or match[2] not in self._UNITS:
            self.fail(f"{value!r} is no size, expected for example 5GB, 700MiB or a number of bytes.", param, ctx)
        return int(float(match[1]) * self._UNITS[match[2]])


class _Rates(click.ParamType[tuple[float, ...]]):
    """Bitrates, separated by commas."""

    name = "bpw[,bpw...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no bitrate, expected for example 4.5, or several as 8.0,6.0,4.5.", param, ctx)
        if len(set(rates)) < len(rates):
            self.fail(f"{value!r} names a bitrate twice.", param, ctx)
        return rates


_SIZE = _Size()
_RATES = _Rates()
_HEAD_BITS_OPTION = click.option(
    "-hb",
    "--head-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16", "auto"]),
    default="6",
    help="Bits of the output head; 16: unquantized; auto: as many as pay, out of --bpw for decoder and head together.",
)


class _Group(click.Group):
    """Turns the errors that a user can cause into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BpwiseError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="bpwise")
def cli() -> None:
    """Measure how much each bit matters to a language model, then quantize it to exactly the size you ask for."""


def main() -> None:
    """Entry point of the ``bpwise`` command."""
    cli()


def _progress_bar(items: Sequence[Any], stage: str) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=stage, unit="block", dynamic_ncols=True)
    return bar


def _calibration_options(command: _Command) -> _Command:
    for option in reversed(
        (
            click.option(
                "-c",
                "--calibration",
                help="Calibration text: .txt/.jsonl/.parquet/.arrow file or directory, Hub data set "
                "NAME[:CONFIG][:SPLIT], or a saved calibration set (.safetensors).  [default: Python's own text]",
            ),
            click.option("--column", help="Column of the data set that holds the text."),
            click.option("--chat-template", is_flag=True, help="Render chat turns with the model's chat template."),
            click.option("-r", "--rows", type=click.IntRange(1), default=32, help="Calibration rows."),
            click.option("-l", "--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row."),
            click.option("--seed", type=int, default=0, help="Seed of rows and of sampled targets."),
            click.option("--group-size", type=int, default=32, help="Input features that share a width and a scale."),
            click.option(
                "--damping",
                type=float,
                help="Damping of the Gram matrices, relative.  [default: chosen for each stage on held-out rows]",
            ),
            click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto."),
            click.option("--work-dir", type=_DIRECTORY, help="Where finished blocks are kept.  [default: OUTPUT.work]"),
        )
    ):
        command = option(command)
    return command


def _measure_config(options: dict[str, Any], *, types: bool) -> tuple[MeasureConfig, CalibrationSet | None]:
    from .measure.calibration import CalibrationConfig, CalibrationSet
    from .measure.run import MeasureConfig

    source = options["calibration"]
    saved = CalibrationSet.load(Path(source)) if source and source.endswith(".safetensors") else None
    calibration = CalibrationConfig(
        source=None if saved else source,
        column=options["column"],
        chat_template=options["chat_template"],
        rows=options["rows"],
        row_tokens=options["row_tokens"],
        seed=options["seed"],
    )
    config = MeasureConfig(
        calibration=calibration,
        group_size=options["group_size"],
        damping=options["damping"],
        seed=options["seed"],
        types=types,
        device=options["device"],
    )
    return config, saved


@cli.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["exl2", "gguf"]),
    help="[default: gguf if OUTPUT ends so, else exl2]",
)
@click.option(
    "-b",
    "--bpw",
    type=_RATES,
    help="Bits per weight: EXL2, of the decoder with overheads; GGUF, of all tensors. Several, as 8.0,6.0,4.5, make "
    "several outputs in the directory OUTPUT from one measurement.",
)
@_HEAD_BITS_OPTION
@click.option("--max-size", type=_SIZE, help="GGUF: largest size of the file, as 5GB or 700MiB, instead of --bpw.")
@click.option("--vram", type=_SIZE, help="GGUF: memory of a GPU to fit into, cache of --context included.")
@click.option("--context", type=click.IntRange(1), help="GGUF, with --vram: tokens of context.  [default: the model's]")
@click.option(
    "--type", "mixture", help="GGUF: one of llama.cpp's fixed mixtures, as Q4_K_M, exactly as llama-quantize makes it."
)
@click.option("--imatrix", type=_EXISTING_FILE, help="GGUF, with --type: an importance matrix.")
@click.option("--override", multiple=True, metavar="PATTERN=TYPE", help="GGUF: a type that tensors must have.")
@click.option(
    "--no-feedback",
    is_flag=True,
    help="GGUF: round by ggml alone, in seconds instead of minutes, at about twice the KL.",
)
@click.option(
    "--llama-cpp", type=_EXISTING_DIRECTORY, help="GGUF: llama.cpp or its converter.  [default: as `make` installs it]"
)
@click.option(
    "-m",
    "--measurement",
    type=_EXISTING_FILE,
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
@click.option("--dry-run", is_flag=True, help="EXL2: print size, bpw range and expected memory; write nothing.")
@_calibration_options
def quantize(model: str, output: Path, output_format: str | None, **options: Any) -> None:
    """Quantize MODEL (a directory or a Hub id) to OUTPUT, an EXL2 directory or a GGUF file, and compare the two.

    With several bitrates the outputs are OUTPUT/MODEL-8.0bpw-6hb-exl2 or OUTPUT/MODEL-8.0bpw.gguf and so on, beside a
    report over all. An output whose predictions turn out useless is marked by BROKEN.md, and the exit code is 1. The
    same command run again goes on where it was cut off.
    """
    from .eval.comparison import EvalConfig

    if options["measurement"]:
        _refuse_beside(
            "--measurement",
            ("calibration", "column", "chat_template", "rows", "row_tokens", "seed", "group_size", "damping"),
            "which brings its own calibration rows, group size and damping",
        )
    evaluate = EvalConfig(
        text=options["eval_text"],
        rows=options["eval_rows"],
        row_tokens=options["eval_row_tokens"],
        device=options["device"],
        allow_calibration_text=options["force_eval_text"],
    )
    run = _quantize_to_gguf if (output_format or output.suffix[1:]) == "gguf" else _quantize_to_exl2
    run(model, output, None if options["no_eval"] else evaluate, options)


def _quantize_to_exl2(model: str, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from .quantize.pipeline import QuantizeConfig, quantize_model

    _refuse_beside(
        "an EXL2 output",
        ("max_size", "vram", "context", "mixture", "imatrix", "override", "no_feedback", "llama_cpp", "card"),
        "it is for GGUF",
    )
    if options["bpw"] is None:
        raise click.UsageError("an EXL2 output needs --bpw.")
    measure_config, saved = _measure_config(options, types=False)
    config = QuantizeConfig(
        bpw=options["bpw"][0],
        head_bits=_head_bits(options["head_bits"]),
        measure=measure_config,
        evaluate=evaluate,
        shard_bytes=options["shard_size"] * _MIB,
        base_model=options["base_model"],
    )
    if options["dry_run"]:
        known = _config_of(options["measurement"]) if options["measurement"] else measure_config
        for bpw in options["bpw"]:
            _print_forecast(model, bpw, config.head_bits, known)
        return
    if len(options["bpw"]) > 1:
        _quantize_series(model, output, config, saved, options)
        return
    result = quantize_model(
        model,
        output,
        config,
        measurement=options["measurement"],
        calibration=saved,
        work=options["work_dir"],
        progress=_progress_bar,
    )
    for line in result.summary_lines():
        click.echo(line)


def _quantize_to_gguf(model: str, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from .quantize.gguf_pipeline import GgufConfig, quantize_to_gguf
    from .quantize.type_plan import Override

    _refuse_beside("a GGUF output", ("head_bits", "shard_size", "dry_run"), "it is for EXL2")
    if sum(options[target] is not None for target in ("bpw", "max_size", "vram", "mixture")) != 1:
        raise click.UsageError("a GGUF output needs one of --bpw, --max-size, --vram and --type.")
    if options["context"] and not options["vram"]:
        raise click.UsageError("--context goes with --vram.")
    if options["mixture"]:
        _convert_to_mixture(model, output, evaluate, options)
        return
    if options["imatrix"]:
        raise click.UsageError(
            "--imatrix goes with --type; with --bpw and --max-size the measurement says what matters."
        )
    measure_config, saved = _measure_config(options, types=True)
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
    if len(rates) > 1:
        _quantize_series(model, output, config, saved, options)
        return
    result = quantize_to_gguf(
        model,
        output,
        config,
        measurement=options["measurement"],
        calibration=saved,
        work=options["work_dir"],
        progress=_progress_bar,
    )
    for line in result.summary_lines():
        click.echo(line)


def _quantize_series(
    model: str,
    output: Path,
    config: QuantizeConfig | GgufConfig,
    calibration: CalibrationSet | None,
    options: dict[str, Any],
) -> None:
    from .quantize.series import quantize_series

    result = quantize_series(
        model,
        output,
        config,
        options["bpw"],
        measurement=options["measurement"],
        calibration=calibration,
        work=options["work_dir"],
        progress=_progress_bar,
    )
    for line in result.summary_lines():
        click.echo(line)


def _convert_to_mixture(model: str, output: Path, evaluate: EvalConfig | None, options: dict[str, Any]) -> None:
    from .convert.checkpoint import open_model
    from .eval.report import summary_lines, write_report
    from .quantize.gguf_pipeline import convert_to_mixture
    from .quantize.judge import Judge

    _refuse_beside("--type", ("measurement", "override", "no_feedback"), "llama.cpp's mixtures do not know it")
    written, warnings = convert_to_mixture(
        model,
        output,
        options["mixture"],
        imatrix=options["imatrix"],
        llama_cpp=options["llama_cpp"],
        progress=_progress_bar,
    )
    for warning in warnings:
        click.echo(f"warning     {warning}", err=True)
    click.echo(f"size        {written.file_bytes / _MIB:.1f} MiB; {written.bpw:.4f} bpw over all tensors -> {output}")
    if evaluate is not None:
        judge = Judge(open_model(model), evaluate, _progress_bar)
        comparison = judge.compare(output, predicted_nats=None)
        write_report(comparison, output.parent, prefix=f"{output.stem}.")
        judge.sentence(output, comparison, predicted_nats=None)
        for line in summary_lines(comparison):
            click.echo(line)


def _refuse_beside(what: str, others: Sequence[str], why: str) -> None:
    context = click.get_current_context()
    flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    for name in others:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flags[name]} cannot go with {what}: {why}. Leave one of the two out.")


def _config_of(measurement: Path) -> MeasureConfig:
    # What a forecast needs to know of how the measurement was made.
    from .measure.calibration import CalibrationConfig
    from .measure.measurement import Measurement
    from .measure.run import MeasureConfig

    measured = Measurement.load(measurement)
    rows, row_tokens = measured.tokens.shape
    calibration = CalibrationConfig(rows=rows, row_tokens=row_tokens)
    return MeasureConfig(calibration=calibration, group_size=measured.group_size)


def _head_bits(option: str) -> HeadBits:
    return "auto" if option == "auto" else int(option)


def _print_forecast(model: str, bpw: float, head_bits: HeadBits, config: MeasureConfig) -> None:
    from .convert.checkpoint import open_model
    from .quantize.forecast import forecast_run

    forecast = forecast_run(open_model(model), bpw=bpw, head_bits=head_bits, config=config)
    click.echo(f"original      {forecast.original_bytes / _MIB:10.1f} MiB")
    click.echo(f"quantized     {forecast.output_bytes / _MIB:10.1f} MiB at {bpw:g} bpw, head bits {head_bits}")
    click.echo(f"possible bpw  {forecast.lowest_bpw:10.4f} to {forecast.highest_bpw:.4f}")
    click.echo(f"memory        {forecast.memory_bytes / _MIB:10.0f} MiB at most, roughly")
    click.echo(f"work on disk  {forecast.disk_bytes / _MIB:10.0f} MiB at most, roughly")


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=_FILE, required=True, help="The measurement file to write (.safetensors).")
@_calibration_options
def measure(model: str, output: Path, **options: Any) -> None:
    """Measure MODEL (a directory or a Hub id) once, for any bitrate; for GGUF too where its extra is installed."""
    from .measure.run import measure_to_file

    config, saved = _measure_config(options, types=True)
    measurement = measure_to_file(
        model, output, config, work=options["work_dir"], calibration=saved, progress=_progress_bar
    )
    click.echo(f"{len(measurement.linears)} linears measured -> {output}")


@cli.command()
@click.argument("measurement", type=_EXISTING_FILE)
@click.option("--format", "output_format", type=click.Choice(["exl2", "gguf"]), default="exl2", help="Kind of output.")
@click.option(
    "-b", "--bpw", type=float, help="Bits per weight: EXL2, of the decoder with overheads; GGUF, of all tensors."
)
@_HEAD_BITS_OPTION
@click.option("--override", multiple=True, metavar="PATTERN=TYPE", help="GGUF: a type that tensors must have.")
@click.option("-o", "--output", type=_FILE, help="Where to save the plan.  [default: plan-BPW.json beside MEASUREMENT]")
@click.option("--html", type=_FILE, help="Write a page with the plans of all sizes, in both formats, to choose from.")
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
    from .measure.measurement import Measurement

    if bpw is None and html is None:
        raise click.UsageError("give --bpw for one plan, or --html for a page with those of all sizes.")
    measured = Measurement.load(measurement)
    if bpw is not None:
        output = output or measurement.with_name(f"plan-{bpw:g}.json")
        if output_format == "gguf":
            _refuse_beside("--format gguf", ("head_bits",), "the head is a tensor like any other")
            _plan_types(measured, bpw, override, output)
        else:
            _refuse_beside("--format exl2", ("override",), "it is for GGUF")
            _plan_widths(measured, bpw, _head_bits(head_bits), output)
    if html is not None:
        from .quantize.plan_page import write_plan_page

        write_plan_page(measured, html, model=measurement.stem, head_bits=_head_bits(head_bits))
        click.echo(f"plans of all sizes -> {html}")
    for name in measured.without_feedback:
        click.echo(f"fallback: {name} was measured without error feedback", err=True)


def _plan_widths(measured: Measurement, bpw: float, head_bits: HeadBits, output: Path) -> None:
    from .quantize.plan import make_plan

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
    from .quantize.type_plan import Override, make_type_plan

    made = make_type_plan(measured, bpw=bpw, overrides=tuple(map(Override.parse, override)))
    made.save(output)
    click.echo(f"{'tensor':44} {'type':>8} {'bpw':>7} {'damage, nats/token':>19}")
    for tensor in made.tensors:
        click.echo(f"{tensor.name:44} {tensor.type:>8} {tensor.kind.bits_per_weight:7.3f} {tensor.damage_nats:19.3e}")
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in made.weights_per_type().items())
    click.echo(f"weights: {shares}")
    click.echo(
        f"{made.bpw:.4f} bpw, {made.stored_bytes / _MIB:.1f} MiB, predicted damage {made.damage_nats:.6f} nats/token "
        f"({100 * made.gap:.3f} % above what is possible at most) -> {output}"
    )


@cli.command()
@click.argument("measurement", type=_EXISTING_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="The file to write; the old format if it ends in .dat.")
def imatrix(measurement: Path, output: Path) -> None:
    """Write what MEASUREMENT says of the inputs as an importance matrix for llama.cpp."""
    from .convert.gguf.imatrix import write_imatrix
    from .measure.measurement import Measurement
    from .quantize.gguf_pipeline import importance_of

    matrix = importance_of(Measurement.load(measurement))
    write_imatrix(output, matrix, legacy=output.suffix == ".dat")
    click.echo(f"{len(matrix.sums)} tensors -> {output}")


@cli.command()
@click.argument("model", type=_EXISTING_PATH)
def verify(model: Path) -> None:
    """Read every tensor of MODEL (an EXL2 directory or a GGUF file) back and compare it with what was meant."""
    from .convert.exl2.verify import verify_model
    from .convert.mark import read_mark

    reason = read_mark(model)
    if reason is not None:
        click.echo(f"warning: {model} is marked as broken. {reason}", err=True)
    if model.is_file():
        _verify_gguf(model)
        return
    found = verify_model(model)
    click.echo(
        f"{model}: {found.linears} quantized linears and {found.tensors} other tensors "
        + ("decode to what was meant." if found.had_manifest else "follow the format (no manifest to compare with).")
    )
    click.echo(f"decoder {found.decoder_bpw:.4f} bpw, head {found.head_bpw:.4f} bpw, {found.file_bytes / _MIB:.1f} MiB")


def _verify_gguf(model: Path) -> None:
    from .convert.gguf.verify import verify_gguf

    found = verify_gguf(model)
    types = ", ".join(f"{count} {name}" for name, count in found.tensors_by_type.items())
    click.echo(f"{model}: {sum(found.tensors_by_type.values())} tensors decode to finite values ({types}).")
    if not found.known_architecture:
        click.echo(f"architecture {found.architecture!r} is not known: names and shapes were not checked", err=True)
    click.echo(f"{found.bpw:.4f} bpw over all tensors, {found.file_bytes / _MIB:.1f} MiB")


@cli.command(name="eval")
@click.argument("original")
@click.argument("quantized", nargs=-1, required=True, type=_EXISTING_PATH)
@click.option("--text", help="Text to evaluate on: file, directory or Hub data set.  [default: Python's own text]")
@click.option("--column", help="Column of the data set that holds the text.")
@click.option("-r", "--rows", type=click.IntRange(1), default=16, help="Rows, each a window of its own.")
@click.option("-l", "--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row.")
@click.option("--seed", type=int, default=0, help="Chooses the places that rows of Python's own text are taken from.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="Arithmetic.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto.")
@click.option("--force-eval-text", is_flag=True, help="Evaluate even on text that QUANTIZED was calibrated on.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "llama.cpp"]),
    default="transformers",
    help="What runs both models; llama.cpp: a GGUF file and --base, on the CPU, whatever --dtype and --device.",
)
@click.option("--base", type=_EXISTING_FILE, help="ORIGINAL as an unquantized GGUF file, for --engine llama.cpp.")
@click.option(
    "--llama-cpp", type=_EXISTING_DIRECTORY, help="A built llama.cpp to run.  [default: the one in xllamacpp's wheel]"
)
@click.option(
    "-o",
    "--output",
    type=_DIRECTORY,
    help="Where the report goes.  [default: in, or beside, QUANTIZED; of several the current directory]",
)
@click.option("--plots", is_flag=True, help="Write the report's drawings as SVG files too.")
@click.option(
    "--cache-dir",
    type=_DIRECTORY,
    help="Where the original's side is kept for the next evaluation on the same text.  [default: ~/.cache/bpwise]",
)
@click.option("--no-cache", is_flag=True, help="Run the original, and keep nothing.")
def evaluate(
    original: str,
    quantized: tuple[Path, ...],
    output: Path | None,
    engine: str,
    base: Path | None,
    llama_cpp: Path | None,
    plots: bool,
    cache_dir: Path | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Compare QUANTIZED (directories or GGUF files) with ORIGINAL: perplexity, KL divergence, agreement.

    Writes report.html, report.md, report.json and report.csv. Reports of a GGUF file MODEL.gguf are named
    MODEL.report.html and so on, of another engine MODEL.llama.cpp.report.html. Several models get one report.
    """
    from .eval.cache import OriginalCache, default_cache_directory
    from .eval.comparison import EvalConfig, evaluate_each, open_any
    from .eval.layers import linear_costs, plan_beside
    from .eval.report import joint_lines, summary_lines, write_joint_report, write_report

    config = EvalConfig(allow_calibration_text=options.pop("force_eval_text"), **options)
    first, prefix = quantized[0], ""
    if len(quantized) == 1 and first.is_file():
        prefix = f"{first.stem}."
    if engine == "llama.cpp":
        from .eval.engine import evaluate_in_engine

        if base is None:
            raise click.UsageError("--engine llama.cpp needs --base: the original as an unquantized GGUF file.")
        comparisons = [
            evaluate_in_engine(original, model, config, _progress_bar, base=base, llama_cpp=llama_cpp)
            for model in quantized
        ]
        prefix += "llama.cpp."
    elif base or llama_cpp:
        raise click.UsageError("--base and --llama-cpp belong to --engine llama.cpp.")
    else:
        cache = None if no_cache else OriginalCache(cache_dir or default_cache_directory())
        comparisons = list(evaluate_each(original, quantized, config, _progress_bar, cache=cache))
    costs = [linear_costs(open_any(model), plan_beside(model)) for model in quantized]
    if len(quantized) > 1:
        files = write_joint_report(comparisons, output or Path(), costs=costs, prefix=prefix, plots=plots)
        lines = joint_lines(comparisons)
    else:
        folder = output or (first.parent if first.is_file() else first)
        files = write_report(comparisons[0], folder, costs=costs[0], prefix=prefix, plots=plots)
        lines = summary_lines(comparisons[0])
    for line in lines:
        click.echo(line)
    click.echo(f"report      {files.html}")


@cli.command()
@click.argument("model", type=_EXISTING_PATH)
@click.option("--original", help="Directory or Hub id of the original: its licence, language and card are taken over.")
@click.option("--base-model", metavar="ORG/NAME", help="The original's Hub id.  [default: --original's, if it has one]")
def card(model: Path, original: str | None, base_model: str | None) -> None:
    """Write the model card of MODEL, an EXL2 directory (README.md) or a GGUF file (NAME.README.md beside it).

    The numbers are those of its report, which `bpwise eval` writes.
    """
    from .quantize.cards import write_card

    if original is None:
        click.echo("no --original: licence, language and the original's card are not carried over", err=True)
    click.echo(f"card -> {write_card(model, original=original, base_model=base_model)}")


@cli.command()
@click.argument("output", type=_EXISTING_PATH)
@click.argument("target", metavar="ORG/[NAME]")
@click.option("--branch", is_flag=True, help="One repository with a branch for each bitrate, instead of one for each.")
@click.option("--public", is_flag=True, help="Make new repositories public, and allow to write to public ones.")
@click.option("--dry-run", is_flag=True, help="Verify, print what would be uploaded, and upload nothing.")
def push(output: Path, target: str, branch: bool, public: bool, dry_run: bool) -> None:
    """Upload OUTPUT, a quantized model or a folder of several, to the Hugging Face Hub, privately.

    Without NAME it is called by convention, as ORG/Llama-3.2-1B-8.0bpw-8hb-exl2. Models that are marked as broken, or
    that cannot be verified, are refused.
    """
    from .convert.publish import find_outputs, plan_uploads
    from .convert.publish import push as upload

    for planned in plan_uploads(find_outputs(output), target, by_branch=branch):
        if dry_run:
            for line in planned.summary_lines():
                click.echo(line)
        else:
            click.echo(f"{planned.output} -> {upload(planned, public=public)}")


@cli.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def inspect(path: Path) -> None:
    """Show what is in PATH: an EXL2 or checkpoint directory, a GGUF file, a measurement, calibration set or plan."""
    from .quantize.inspect import inspect_path

    found = inspect_path(path)
    click.echo(f"{path}: {found.kind}")
    for fact in found.facts:
        click.echo(f"  {fact}")
    widths = [max(map(len, column)) for column in zip(found.header, *found.rows, strict=True)]
    for row in (found.header, *found.rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@cli.command()
@click.argument("model", type=_EXISTING_PATH)
@click.argument("output", type=_DIRECTORY)
@click.option(
    "--original", type=_EXISTING_DIRECTORY, help="Where to copy the tokenizer from: a GGUF file cannot give it back."
)
def dequantize(model: Path, output: Path, original: Path | None) -> None:
    """Turn MODEL (an EXL2 directory or a GGUF file) back into a plain float16 checkpoint OUTPUT.

    Transformers loads it anywhere.
    """
    from .convert.exl2.dense import dequantize_model
    from .convert.gguf.dense import dequantize_gguf

    if model.is_file():
        dequantize_gguf(model, output, original=original)
        if original is None:
            click.echo("no tokenizer was written: name the original model's directory with --original", err=True)
    elif original is not None:
        raise click.UsageError("--original is for GGUF files; an EXL2 directory has its tokenizer.")
    else:
        dequantize_model(model, output)
    click.echo(f"dense float16 checkpoint -> {output}")
