"""bpwise against llama-quantize, and against GGUF files of others, at equal sizes and on text of several kinds.

    python benchmarks/headtohead.py MODEL
    python benchmarks/headtohead.py MODEL --types Q4_K_M --text prose=c4.txt --text chat=benchmarks/texts/chat.txt
    python benchmarks/headtohead.py MODEL --types Q4_K_M --file theirs=model-Q4_K_M.gguf --device cuda

For each of llama.cpp's mixtures: the file that llama-quantize makes (byte for byte: see the tests), with an importance
matrix from the calibration tokens (mean squares of every linear's inputs, all tokens alike, as llama-imatrix takes
them), and the file that bpwise makes of its measurement of the same tokens, no larger than the other. Every file that
is given by path gets one of ours of its size as well. Reported is the mean KL divergence from the original on each
held-out text, and a plot of it against size.

Finished results stay in the work directory, so that a run that was cut off goes on; delete it after a change of the
code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import click
from bpwise.checkpoint.files.atomic import atomic_file, write_json
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.llama_cpp.imatrix import write_imatrix
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.errors import BpwiseError, ConfigError
from bpwise.eval.comparison import EvalConfig, compare_with, evaluation_rows
from bpwise.eval.metrics.overlap import CalibrationSpans, refuse_calibration_text
from bpwise.eval.models import vocab_size_of
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.run import measure_model, quantize_model
from importance import input_mean_squares
from tqdm import tqdm

__all__ = ["OURS", "Result", "main", "make_imatrix", "measured_once", "require_same", "table"]

MIXTURES = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")

OURS = "bpwise"
_LLAMA_QUANTIZE = "llama-quantize"

_BUILT_IN = "built-in"
"""Name of the built-in text, in its part that is never calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One file, on one text.

    Attributes:
        size_of: The mixture, or the name of the file given, that sets the size.
        maker: Who made the file.
        text: Name of the text.
        file_bytes: Size of the file.
        bpw: Bits per weight over all tensors.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_error: Its standard error.
        kl_median_nats: Median over tokens.
        perplexity: Of the quantized model.
        predicted_nats: What the plan predicted; None for files of others.
        seconds: Time to make the file, once measured.
    """

    size_of: str
    maker: str
    text: str
    file_bytes: int
    bpw: float
    kl_nats: float
    kl_error: float
    kl_median_nats: float
    perplexity: float
    predicted_nats: float | None
    seconds: float


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown, one row a size and text."""
    lines = [
        "| size of | bytes | text | theirs: KL | perplexity | bpwise: bytes | KL | perplexity | ratio of KL | "
        "predicted | seconds, theirs and ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = {(result.size_of, result.text): result for result in results if result.maker == OURS}
    for theirs in results:
        if theirs.maker == OURS:
            continue
        cells = [theirs.size_of, str(theirs.file_bytes), theirs.text, _kl(theirs), f"{theirs.perplexity:.3f}"]
        own = ours.get((theirs.size_of, theirs.text))
        if own is not None:
            ratio = f"{own.kl_nats / theirs.kl_nats:.2f}" if theirs.kl_nats else ""
            cells += [str(own.file_bytes), _kl(own), f"{own.perplexity:.3f}", ratio, f"{own.predicted_nats:.5f}"]
            cells.append(f"{theirs.seconds:.0f}, {own.seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kl(result: Result) -> str:
    return f"{result.kl_nats:.5f} ± {result.kl_error:.5f}"


class _Benchmark:
    """The files of one model; each is made once, judged on all texts, and deleted."""

    def __init__(self, checkpoint: Checkpoint, work: Path, measurement: Path, texts: Mapping[str, EvalConfig]) -> None:
        self.checkpoint = checkpoint
        self.work = work
        self.measurement = measurement
        self.texts = texts
        self.base = work / "base.gguf"
        self.imatrix = work / "imatrix.gguf"
        self._results = work / "results.jsonl"
        self._originals: dict[str, OriginalRun] = {}

    def results(self) -> list[Result]:
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def run_mixture(self, mixture: str) -> None:
        if self._left(mixture, _LLAMA_QUANTIZE):
            with self._file(f"{mixture}.gguf") as output:
                start = time.monotonic()
                options = GgufOptions(mixture=mixture, imatrix=self.imatrix, base=self.base)
                quantize_model(self.checkpoint, output, options=options, evaluate=False)
                self._judge(mixture, _LLAMA_QUANTIZE, output, None, time.monotonic() - start)
        self._run_ours(mixture)

    def run_file(self, name: str, path: Path) -> None:
        if self._left(name, name):
            self._judge(name, name, path, None, 0.0)
        self._run_ours(name)

    def _run_ours(self, size_of: str) -> None:
        if not self._left(size_of, OURS):
            return
        size = next(result.file_bytes for result in self.results() if result.size_of == size_of)
        with self._file(f"{size_of}-bpwise.gguf") as output:
            start = time.monotonic()
            measure = MeasureConfig(device=next(iter(self.texts.values())).device)
            made = quantize_model(
                self.checkpoint,
                output,
                max_bytes=size,
                measurement=self.measurement,
                options=GgufOptions(),
                measure=measure,
                evaluate=False,
                progress=tqdm,
            )
            self._judge(size_of, OURS, output, made.plan.damage_nats, time.monotonic() - start)

    def _left(self, size_of: str, maker: str) -> list[str]:
        # The texts on which a file is still to be judged.
        done = {result.text for result in self.results() if (result.size_of, result.maker) == (size_of, maker)}
        return [name for name in self.texts if name not in done]

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        # A run that is cut off leaves what it has rounded, and goes on there.
        path = self.work / name
        path.unlink(missing_ok=True)
        yield path
        for each in list(self.work.glob(f"{path.stem}.*")):  # work directory and recipe, too
            rmtree(each) if each.is_dir() else each.unlink()

    def refuse_calibration_text(self, tokens: CalibrationSet) -> None:
        spans = CalibrationSpans.of(tokens)
        for text in self.texts:
            refuse_calibration_text(self._rows(text), spans)

    def _rows(self, text: str) -> CalibrationSet:
        tokenizer = load_tokenizer(self.checkpoint.directory)
        return evaluation_rows(tokenizer, self.texts[text], vocab_size=vocab_size_of(self.checkpoint))

    def _original(self, text: str) -> OriginalRun:
        if text not in self._originals:
            self._originals[text] = run_original(self.checkpoint, self._rows(text), self.texts[text])
        return self._originals[text]

    def _judge(self, size_of: str, maker: str, path: Path, predicted: float | None, seconds: float) -> None:
        model = GgufModel.open(path)
        bits = 8 * sum(tensor.size_bytes for tensor in model.header.tensors.values())
        for text in self._left(size_of, maker):
            summary = compare_with(self._original(text), model.beside(self.checkpoint)).summary
            result = Result(
                size_of=size_of,
                maker=maker,
                text=text,
                file_bytes=model.file_bytes,
                bpw=bits / model.parameter_count,
                kl_nats=summary.kl_nats.value,
                kl_error=summary.kl_nats.standard_error or 0.0,
                kl_median_nats=summary.kl_median_nats,
                perplexity=summary.quantized_perplexity.value,
                predicted_nats=predicted,
                seconds=seconds,
            )
            with self._results.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            click.echo(f"{size_of} by {maker}, {text}: {result.bpw:.4f} bpw, KL {_kl(result)}, {seconds:.0f} s")


def _plot(results: Sequence[Result], output: Path) -> None:
    # Not pyplot: that would choose a window system.
    from matplotlib.figure import Figure  # noqa: PLC0415 - heavy, and the table does without

    texts = list(dict.fromkeys(result.text for result in results))
    figure = Figure(figsize=(5 * len(texts), 4), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        for maker in dict.fromkeys(result.maker for result in results):
            points = sorted((r.file_bytes / 1e6, r.kl_nats) for r in results if (r.maker, r.text) == (maker, text))
            axes.plot(*zip(*points, strict=True), marker="o", label=maker)
        axes.set_title(text)
        axes.set_yscale("log")
        axes.set_xlabel("size of the file, MB")
        axes.set_ylabel("mean KL divergence, nats per token")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.savefig(output)


def _named(option: str, pairs: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not (name and path) or name in named or name in {*MIXTURES, OURS, _LLAMA_QUANTIZE}:
            raise ConfigError(
                f"{option}: not usable. Got {pair!r}. Expected NAME=PATH, with a name of its own. Name it."
            )
        named[name] = path
    return named


def require_same(work: Path, options: dict[str, Any]) -> None:
    """Refuse a work directory with results of a run with other options.

    Args:
        work: The directory, which keeps the options of its first run.
        options: Those of this run, as plain JSON.

    Raises:
        ConfigError: The first run had others.
    """
    path = work / "options.json"
    if not path.exists():
        write_json(path, options)
    before = json.loads(path.read_text())
    changed = [key for key, value in options.items() if before.get(key) != value]
    if changed:
        raise ConfigError(
            f"{work}: results of another run. Got another {', '.join(changed)}. Expected the same. Name another folder."
        )


def measured_once(checkpoint: Checkpoint, work: Path, text: CalibrationConfig, device: str) -> Path:
    """Return the file in a work directory with a model's measurement for GGUF, which is made if it is not there."""
    measurement = work / "measurement.safetensors"
    if not measurement.exists():
        config = MeasureConfig(calibration=text, device=device)
        measure_model(checkpoint, measurement, formats=["gguf"], measure=config, progress=tqdm)
    return measurement


def make_imatrix(checkpoint: Checkpoint, imatrix: Path, tokens: CalibrationSet, device: str) -> None:
    """Write the importance matrix that llama-imatrix makes of calibration tokens, unless it is there."""
    if not imatrix.exists():
        with atomic_file(imatrix) as temporary:
            write_imatrix(temporary, input_mean_squares(checkpoint, tokens.tokens, device))


@click.command()
@click.argument("model")
@click.option("--types", default=",".join(MIXTURES), show_default=True, help="Mixtures whose sizes are taken.")
@click.option("--file", "files", multiple=True, help="GGUF file of somebody else, as NAME=PATH.")
@click.option("--text", "texts", multiple=True, help="Held-out text, as NAME=PATH.  [default: built-in]")
@click.option("--calibration", help="As `bpwise measure` takes it.")
@click.option("-r", "--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("-l", "--row-tokens", default=1024, show_default=True, help="Tokens in each.")
@click.option("--eval-rows", default=16, show_default=True, help="Held-out rows of each text.")
@click.option("--eval-row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("-m", "--measurement", type=click.Path(exists=True, path_type=Path), help="A measurement of MODEL.")
@click.option("--device", default="auto", show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/headtohead"), show_default=True)
def main(
    model: str,
    types: str,
    files: tuple[str, ...],
    texts: tuple[str, ...],
    calibration: str | None,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    eval_row_tokens: int,
    measurement: Path | None,
    device: str,
    work_dir: Path,
) -> None:
    """Compare MODEL's GGUF files."""
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        evaluate = EvalConfig(rows=eval_rows, row_tokens=eval_row_tokens, device=device)
        named, others = _named("--text", texts), _named("--file", files)
        judged = {name: replace(evaluate, text=path) for name, path in named.items()} or {_BUILT_IN: evaluate}
        checkpoint = open_model(model)
        checkpoint.prepare_fingerprint(tqdm)
        options = {
            "model": checkpoint.fingerprint,
            "calibration": [calibration, rows, row_tokens],
            "measurement": None if measurement is None else str(measurement),
            "evaluation": [eval_rows, eval_row_tokens],
        }
        require_same(work_dir, options)
        if measurement is None:
            text = CalibrationConfig(source=calibration, rows=rows, row_tokens=row_tokens)
            measurement = measured_once(checkpoint, work_dir, text, device)
        tokens: CalibrationSet = measured_rows(Measurement.load(measurement))
        benchmark = _Benchmark(checkpoint, work_dir, measurement, judged)
        benchmark.refuse_calibration_text(tokens)
        make_imatrix(checkpoint, benchmark.imatrix, tokens, device)
        if not benchmark.base.exists():
            make_base(checkpoint, benchmark.base)
        for mixture in filter(None, types.split(",")):
            benchmark.run_mixture(mixture)
        for name, path in others.items():
            benchmark.run_file(name, Path(path))
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(benchmark.results()))
    _plot(benchmark.results(), work_dir / "headtohead.png")


if __name__ == "__main__":
    main()
