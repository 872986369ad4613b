"""How predictions and gains fare as more blocks are rounded, and as a model gets wider.

    python benchmarks/depth_and_width.py MODEL
    python benchmarks/depth_and_width.py MODEL --widths 256,384

The first 1, 2, 4, ... blocks of MODEL, and of what is cut out of it by ``narrow_model.py``, are rounded; the others and
both ends of the model stay as they are. Each model is measured once, and three files of it are made: bpwise's, one with
the same types rounded by ggml's encoder alone (with the measurement's importances), and llama-quantize's with an
importance matrix of the same tokens, whose blocks together are no smaller than bpwise's. All blocks have the types that
the plan of the whole model gives them, and none is rounded with a look at those after it: the first blocks of a file
are as if only these were rounded. Reported are the mean KL divergences from the original on the held-out part of the
built-in text, and what the plan predicted of these blocks.

Finished results stay in the work directory, so that a run that was cut off goes on; delete it after a change of the
code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import click
from bpwise.checkpoint.source.checkpoint import Checkpoint, TensorSource
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.views import SourceView
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.roles import layer_of
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.convert.plan import Plan
from bpwise.convert.registry import load_plan
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, compare_with, evaluation_rows
from bpwise.eval.models import vocab_size_of
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.calibrated import measured_rows
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.run import quantize_model
from headtohead import make_imatrix, measured_once, require_same
from narrow_model import write_narrowed
from torch import Tensor
from tqdm import tqdm

__all__ = ["ENCODER", "LLAMA_QUANTIZE", "OURS", "FirstBlocks", "Result", "depths", "main", "table"]

OURS, ENCODER, LLAMA_QUANTIZE = "bpwise", "ggml's encoder", "llama-quantize"

_UNQUANTIZED = "F16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The first blocks of one file, on the held-out text.

    Attributes:
        channels: Width of the model's residual stream.
        blocks: Number of blocks that are rounded.
        maker: Who rounded them.
        bpw: Bits per weight of these blocks.
        kl_nats: Mean KL divergence from the original, nats per token.
        kl_error: Its standard error.
        predicted_nats: What the plan predicted of these blocks; None for llama-quantize.
    """

    channels: int
    blocks: int
    maker: str
    bpw: float
    kl_nats: float
    kl_error: float
    predicted_nats: float | None


def table(results: Sequence[Result]) -> str:
    """Return the results as Markdown, one row a width and number of blocks that all makers are done with."""
    lines = [
        "| channels | blocks rounded | bpw | bpwise: KL | predicted | measured over predicted | ggml's encoder, same "
        "types: KL | ratio | llama-quantize: bpw | KL | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for channels, blocks in sorted({(result.channels, result.blocks) for result in results}):
        of = {each.maker: each for each in results if (each.channels, each.blocks) == (channels, blocks)}
        if len(of) < 3:
            continue
        ours, encoder, theirs = of[OURS], of[ENCODER], of[LLAMA_QUANTIZE]
        assert ours.predicted_nats is not None
        cells = [str(channels), str(blocks), f"{ours.bpw:.3f}", _kl(ours), f"{ours.predicted_nats:.5f}"]
        cells += [_ratio(ours.kl_nats, ours.predicted_nats)]
        cells += [_kl(encoder), _ratio(ours.kl_nats, encoder.kl_nats)]
        cells += [f"{theirs.bpw:.3f}", _kl(theirs), _ratio(ours.kl_nats, theirs.kl_nats)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kl(result: Result) -> str:
    return f"{result.kl_nats:.5f} ± {result.kl_error:.5f}"


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else ""


def depths(blocks: int) -> list[int]:
    """Return the powers of two below a number of blocks, and that number."""
    return [*takewhile(lambda depth: depth < blocks, (2**power for power in range(blocks))), blocks]


class FirstBlocks(SourceView):
    """An original whose first blocks are those of a quantized model."""

    def __init__(self, original: Checkpoint, quantized: TensorSource, blocks: int) -> None:
        """Look at both.

        Args:
            original: The original.
            quantized: What became of it, with tensors of the same names.
            blocks: Number of blocks that are taken from it.
        """
        super().__init__(original)
        self._quantized = quantized
        self._in_block = re.compile(rf"{re.escape(language_model(original).blocks)}\.(\d+)\.")
        self._blocks = blocks

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the one or the other model."""
        match = self._in_block.match(name)
        source = self._quantized if match and int(match[1]) < self._blocks else self.base
        return source.tensor(name)


class _Model:
    """One width: its files are made once each, and its first blocks judged at all depths."""

    def __init__(self, checkpoint: Checkpoint, work: Path, text: CalibrationConfig, evaluate: EvalConfig) -> None:
        self.checkpoint = checkpoint
        self.channels = int(checkpoint.config["hidden_size"])
        self._work = work
        self._text = text
        self._evaluate = evaluate
        self._base = work / "base.gguf"
        self._results = work / "results.jsonl"

    def results(self) -> list[Result]:
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def run(self, mixture: str) -> None:
        if not self._base.exists():
            make_base(self.checkpoint, self._base)
        measurement = measured_once(self.checkpoint, self._work, self._text, self._evaluate.device)
        imatrix = self._work / "imatrix.gguf"
        make_imatrix(self.checkpoint, imatrix, measured_rows(Measurement.load(measurement)), self._evaluate.device)
        theirs = self._work / "llama-quantize.gguf"
        options = GgufOptions(mixture=mixture, imatrix=imatrix, base=self._base)
        if not theirs.exists():
            quantize_model(self.checkpoint, theirs, options=options, evaluate=False)
        self._judge(LLAMA_QUANTIZE, theirs, None)
        for maker, feedback in ((ENCODER, False), (OURS, True)):
            output, plan = self._made(measurement, theirs, feedback=feedback)
            self._judge(maker, output, plan)

    def _made(self, measurement: Path, theirs: Path, *, feedback: bool) -> tuple[Path, Plan]:
        # A file whose blocks are no larger than those of another, and what lies outside of them is not quantized.
        output = self._work / ("bpwise.gguf" if feedback else "encoder.gguf")
        plan = output.with_suffix(".plan.json")
        tensors, quantized = read_gguf_header(self._base).tensors, read_gguf_header(theirs)
        outside = [name for name, tensor in tensors.items() if layer_of(name) < 0 and len(tensor.shape) > 1]
        overrides = tuple(TypeOverride.parse(f"{name}={_UNQUANTIZED}") for name in outside)
        unquantized_bytes = sum(2 * math.prod(tensors[name].shape) for name in outside)
        more = unquantized_bytes - sum(quantized.tensors[name].size_bytes for name in outside)
        if not plan.exists():
            output.unlink(missing_ok=True)
            quantize_model(
                self.checkpoint,
                output,
                max_bytes=quantized.file_bytes + more,
                measurement=measurement,
                options=GgufOptions(base=self._base, overrides=overrides, feedback=feedback),
                measure=MeasureConfig(device=self._evaluate.device),
                evaluate=False,
                progress=tqdm,
            ).plan.save(plan)
        return output, load_plan(plan)

    @cached_property
    def _original(self) -> OriginalRun:
        tokenizer = load_tokenizer(self.checkpoint.directory)
        rows = evaluation_rows(tokenizer, self._evaluate, vocab_size=vocab_size_of(self.checkpoint))
        return run_original(self.checkpoint, rows, self._evaluate)

    def _judge(self, maker: str, path: Path, plan: Plan | None) -> None:
        model, done = GgufModel.open(path), {(each.maker, each.blocks) for each in self.results()}
        quantized = model.beside(self.checkpoint)
        for blocks in depths(language_model(self.checkpoint).block_count):
            if (maker, blocks) in done:
                continue
            summary = compare_with(self._original, FirstBlocks(self.checkpoint, quantized, blocks)).summary
            costs = () if plan is None else plan.costs()
            predicted = sum(each.damage_nats or 0 for each in costs if each.block is not None and each.block < blocks)
            result = Result(
                channels=self.channels,
                blocks=blocks,
                maker=maker,
                bpw=_bpw(model, blocks),
                kl_nats=summary.kl_nats.value,
                kl_error=summary.kl_nats.standard_error or 0.0,
                predicted_nats=None if plan is None else predicted,
            )
            with self._results.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            click.echo(f"{self.channels} channels, {blocks} blocks by {maker}: {result.bpw:.3f} bpw, KL {_kl(result)}")


def _bpw(model: GgufModel, blocks: int) -> float:
    # Of the matrices in the first blocks.
    stored = model.header.tensors.items()
    tensors = [each for name, each in stored if 0 <= layer_of(name) < blocks and len(each.shape) > 1]
    return 8 * sum(each.size_bytes for each in tensors) / sum(each.shape[0] * each.shape[1] for each in tensors)


@click.command()
@click.argument("model")
@click.option("--widths", default="", help="Channels of narrower models to cut out of it, as 256,384.")
@click.option("--type", "mixture", default="Q4_K_M", show_default=True, help="Mixture whose size the blocks get.")
@click.option("-r", "--rows", default=8, show_default=True, help="Calibration rows.")
@click.option("-l", "--row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("--eval-rows", default=4, show_default=True, help="Held-out rows.")
@click.option("--eval-row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("--device", default="auto", show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/depth"), show_default=True)
def main(
    model: str,
    widths: str,
    mixture: str,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    eval_row_tokens: int,
    device: str,
    work_dir: Path,
) -> None:
    """Round the first blocks of MODEL, and of narrower models cut out of it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint = open_model(model)
        checkpoint.prepare_fingerprint(tqdm)
        options = {
            "model": checkpoint.fingerprint,
            "mixture": mixture,
            "calibration": [rows, row_tokens],
            "evaluation": [eval_rows, eval_row_tokens],
        }
        require_same(work_dir, options)
        text = CalibrationConfig(rows=rows, row_tokens=row_tokens)
        evaluate = EvalConfig(rows=eval_rows, row_tokens=eval_row_tokens, device=device)
        results: list[Result] = []
        for width in [None, *map(int, filter(None, widths.split(",")))]:
            work, source = work_dir / str(width or "whole"), checkpoint
            if width is not None:
                if not (work / "model").exists():
                    write_narrowed(model, work / "model", width)
                source = open_model(work / "model")
            work.mkdir(exist_ok=True)
            one = _Model(source, work, text, evaluate)
            one.run(mixture)
            results += one.results()
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(results))


if __name__ == "__main__":
    main()
