"""GGUF files of bpwise against those of llama-quantize, at the same size.

    python benchmarks/gguf_quality.py MODEL
    python benchmarks/gguf_quality.py MODEL --types Q4_K_M,Q6_K --rows 16

For each of llama.cpp's mixtures: the file that llama-quantize makes (byte for byte: see the tests), with an importance
matrix from the calibration tokens (mean squares of every linear's inputs, all tokens alike, as llama-imatrix takes
them), and the file that bpwise makes of its measurement of the same tokens, no larger than the other. Reported is the
mean KL divergence from the original on held-out text. Finished results stay in the work directory; delete it after a
change of the code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from bpwise.checkpoint.files.atomic import atomic_file
from bpwise.checkpoint.model.families import HEAD
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix, write_imatrix
from bpwise.convert.gguf.model.names import gguf_name
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, compare_with, evaluation_rows
from bpwise.eval.models import vocab_size_of
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.measurement import Measurement
from bpwise.measure.model.batches import micro_batches
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig, measure_model
from bpwise.measure.statistics.inputs import tapped_inputs
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from torch import Tensor
from tqdm import tqdm

__all__ = ["Result", "input_mean_squares", "main", "table"]

MIXTURES = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One file.

    Attributes:
        mixture: The mixture that sets the size.
        maker: Who made the file.
        file_bytes: Its size.
        bpw: Bits per weight over all tensors.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_error: Its standard error.
        perplexity: Of the quantized model.
        predicted_nats: What the plan predicted; None for llama-quantize.
        seconds: Time to make the file, once measured.
    """

    mixture: str
    maker: str
    file_bytes: int
    bpw: float
    kl_nats: float
    kl_error: float
    perplexity: float
    predicted_nats: float | None
    seconds: float


@torch.no_grad()
def input_mean_squares(checkpoint: Checkpoint, tokens: Tensor) -> ImportanceMatrix:
    """Return what llama-imatrix collects: mean squares of the inputs of every linear, all tokens alike.

    Args:
        checkpoint: The model.
        tokens: Calibration rows, shape (rows, tokens).
    """
    model = StreamedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    hidden = model.embed(tokens)
    means: dict[str, Tensor] = {}
    for index in tqdm(range(model.block_count), desc="importance matrix"):
        output = torch.empty_like(hidden)
        firsts = [stage.linears[0] for stage in model.structure(index).groups]
        sums: dict[str, Tensor] = {}
        with model.block(index) as block, tapped_inputs(block, firsts) as taps:
            for batch in micro_batches(*tokens.shape):
                output[batch] = model.run_block(index, hidden[batch])
                for name in firsts:
                    square = taps[name].flatten(0, 1).double().square().sum(dim=0)
                    sums[name] = sums[name] + square if name in sums else square
        hidden = output
        for stage in model.structure(index).groups:
            for name in model.linear_names(index, stage):
                means[_name(name)] = (sums[stage.linears[0]] / tokens.numel()).float()
    if not model.source.tied_embeddings:
        with model.tail() as head, tapped_inputs(head, [""]) as taps:
            model.logits(hidden[:1])
            total = torch.zeros_like(taps[""][0, 0], dtype=torch.float64)
            for row in hidden:
                model.logits(row[None])
                total += taps[""].flatten(0, 1).double().square().sum(dim=0)
        means[_name(HEAD)] = (total / tokens.numel()).float()
    rows, row_tokens = tokens.shape
    return ImportanceMatrix.from_means(means, tokens.numel(), chunks=rows, chunk_tokens=row_tokens)


def _name(module: str) -> str:
    name = gguf_name(f"{module}.weight")
    assert name is not None
    return name


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown, one row a mixture."""
    lines = [
        "| size of | bytes | llama-quantize: KL | perplexity | bpwise: bytes | KL | perplexity | ratio of KL | "
        "predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {(result.mixture, result.maker): result for result in results}
    for mixture in dict.fromkeys(result.mixture for result in results):
        theirs, ours = found[mixture, "llama-quantize"], found.get((mixture, "bpwise"))
        cells = [mixture, str(theirs.file_bytes), _kl(theirs), f"{theirs.perplexity:.3f}"]
        if ours is not None:
            ratio = f"{ours.kl_nats / theirs.kl_nats:.2f}"
            cells += [str(ours.file_bytes), _kl(ours), f"{ours.perplexity:.3f}", ratio, f"{ours.predicted_nats:.5f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kl(result: Result) -> str:
    return f"{result.kl_nats:.5f} ± {result.kl_error:.5f}"


class _Benchmark:
    def __init__(self, model: str, work: Path, measurement: Path, evaluate: EvalConfig) -> None:
        self.checkpoint = open_model(model)
        self.work = work
        self.measurement = measurement
        self.evaluate = evaluate
        self.path = work / "gguf-results.jsonl"
        self.original: OriginalRun | None = None

    def results(self) -> list[Result]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def run(self, mixture: str, imatrix: Path, base: Path) -> None:
        done = {(result.mixture, result.maker): result for result in self.results()}
        if (mixture, "llama-quantize") not in done:
            with self._file(f"{mixture}.gguf") as output:
                start = time.monotonic()
                options = GgufOptions(mixture=mixture, imatrix=imatrix, base=base)
                quantize_model(self.checkpoint, output, QuantizeConfig(options=options, evaluate=None))
                done[mixture, "llama-quantize"] = self._judge(mixture, "llama-quantize", output, None, start)
        if (mixture, "bpwise") not in done:
            size = done[mixture, "llama-quantize"].file_bytes
            with self._file(f"{mixture}-bpwise.gguf") as output:
                start = time.monotonic()
                config = QuantizeConfig(target=Target(max_bytes=size), options=GgufOptions(base=base), evaluate=None)
                made = quantize_model(self.checkpoint, output, config, measurement=self.measurement, progress=tqdm)
                self._judge(mixture, "bpwise", output, made.plan.damage_nats, start)

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        path = self.work / name
        path.unlink(missing_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _judge(self, mixture: str, maker: str, path: Path, predicted: float | None, start: float) -> Result:
        seconds = time.monotonic() - start
        if self.original is None:
            tokenizer = load_tokenizer(self.checkpoint.directory)
            rows = evaluation_rows(tokenizer, self.evaluate, vocab_size=vocab_size_of(self.checkpoint))
            self.original = run_original(self.checkpoint, rows, self.evaluate)
        model = GgufModel.open(path)
        summary = compare_with(self.original, model.beside(self.checkpoint)).summary
        bits = 8 * sum(tensor.size_bytes for tensor in model.header.tensors.values())
        result = Result(
            mixture=mixture,
            maker=maker,
            file_bytes=model.file_bytes,
            bpw=bits / model.parameter_count,
            kl_nats=summary.kl_nats.value,
            kl_error=summary.kl_nats.standard_error or 0.0,
            perplexity=summary.quantized_perplexity.value,
            predicted_nats=predicted,
            seconds=seconds,
        )
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        click.echo(f"{mixture} by {maker}: {result.bpw:.4f} bpw, KL {_kl(result)}, {seconds:.0f} s")
        return result


@click.command()
@click.argument("model")
@click.option("--types", default=",".join(MIXTURES), show_default=True, help="Mixtures whose sizes are taken.")
@click.option("-r", "--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("-l", "--row-tokens", default=1024, show_default=True, help="Tokens in each.")
@click.option("--eval-rows", default=16, show_default=True, help="Held-out rows.")
@click.option("--eval-row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("-m", "--measurement", type=click.Path(exists=True, path_type=Path), help="A measurement of MODEL.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/gguf"), show_default=True)
def main(model: str, types: str, work_dir: Path, measurement: Path | None, **numbers: Any) -> None:
    """Compare MODEL's GGUF files."""
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = open_model(model)
        if measurement is None:
            measurement = work_dir / "measurement.safetensors"
            if not measurement.exists():
                calibration = CalibrationConfig(rows=numbers["rows"], row_tokens=numbers["row_tokens"])
                formats = {"gguf": QuantizeConfig(options=GgufOptions()).conversion(checkpoint)}
                config = MeasureConfig(calibration=calibration)
                measure_model(checkpoint, measurement, config, formats=formats, progress=tqdm)
        tokens: CalibrationSet = measured_rows(Measurement.load(measurement))
        imatrix, base = work_dir / "imatrix.gguf", work_dir / "base.gguf"
        if not imatrix.exists():
            with atomic_file(imatrix) as temporary:
                write_imatrix(temporary, input_mean_squares(checkpoint, tokens.tokens))
        if not base.exists():
            make_base(checkpoint, base)
        evaluate = EvalConfig(rows=numbers["eval_rows"], row_tokens=numbers["eval_row_tokens"])
        benchmark = _Benchmark(model, work_dir, measurement, evaluate)
        for mixture in types.split(","):
            benchmark.run(mixture, imatrix, base)
        click.echo(table(benchmark.results()))
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
