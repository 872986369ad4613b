"""What measuring and rounding a block cost beside the passes through it that they cannot do without.

    python benchmarks/speed.py --preset qwen2.5-1.5b --rows 32

One block of real dimensions with random weights is measured in both formats and rounded in each, with random tokens.
*Passes* are a forward pass and one with the backward pass to the block's inputs, in float32 and nothing else; for
rounding, two forward passes. Both include an output head of 2048 tokens, which the passes leave out. Times are
processor seconds of all threads. Rows below a step say what kinds of work it is made of. Beside the passes stands what
their products alone would take at the rate of a large product.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.linears import model_linears
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.kernels import encode
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.rounder import GgufRounder
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.measure.measurement import Measurement
from bpwise.measure.model.batches import micro_batches
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.rounding.model import RoundConfig, round_model
from memory import PRESETS, write_checkpoint

__all__ = ["file_layout", "main"]

_VOCABULARY = 2048
"""Small: it is the block that is looked at."""

_STEPS = {
    "measure: forward": ("bpwise.measure.passes", "MeasuringPasses._forward_block"),
    "measure: backward": ("bpwise.measure.passes", "MeasuringPasses._backward_block"),
    "measure: curves": ("bpwise.measure.passes", "MeasuringPasses._measured_stage"),
    "measure: head": ("bpwise.measure.passes", "MeasuringPasses.head"),
}
_PARTS = {
    "sums of x x^T": ("bpwise.measure.statistics.inputs", "WeightedGram.add"),
    "damping and held-out tokens": ("bpwise.measure.input_group", "cross_validate_damping"),
    "Cholesky factors": ("bpwise.linalg.hessian", "_factor_"),
    "EXL2: damages": ("bpwise.convert.exl2.rounding.curves", "_damage"),
    "GGUF: damages": ("bpwise.convert.gguf.ggml.curves", "_errors"),
    "drift": ("bpwise.quantize.rounding.drift", "InputSums.solved"),
    "EXL2: rounding": ("bpwise.convert.exl2.rounding.rounder", "round_linear_"),
    "GGUF: rounding": ("bpwise.convert.gguf.rounder", "_encoded"),
}
"""Kinds of work, and the functions that do it; some are parts of others."""


class _Clock:
    """Processor seconds by name: of the whole process for steps, of the calling thread for their parts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str, now: Callable[[], float] = time.process_time) -> Iterator[None]:
        start = now()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += now() - start

    def watch(self, name: str, module: str, path: str, now: Callable[[], float]) -> None:
        """Count what a function takes from now on."""
        *owners, last = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        function = getattr(owner, last)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.step(name, now):
                return function(*args, **kwargs)

        setattr(owner, last, watched)


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="qwen2.5-1.5b", show_default=True)
@click.option("--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("--row-tokens", default=1024, show_default=True)
def main(preset: str, rows: int, row_tokens: int) -> None:
    """Print what measuring and rounding one block of PRESET cost, in passes through it."""
    torch.set_num_threads(1)
    clock = _Clock()
    config = PRESETS[preset]
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 1, _VOCABULARY, False
    tokens = torch.randint(3, _VOCABULARY - 1, (rows, row_tokens), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random tokens", adds_bos=False)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_checkpoint(work / "model", config, seed=0)
        checkpoint = Checkpoint.open(work / "model")
        _passes(checkpoint, tokens, clock)
        layout = file_layout(checkpoint)
        for kind in measured_types():  # ggml's tables, once a process
            with clock.step("tables"):
                encode(torch.ones(1, 256), kind, torch.ones(256))
        for watched, now in ((_STEPS, time.process_time), (_PARTS, time.thread_time)):
            for name, (module, path) in watched.items():
                clock.watch(name, module, path, now)
        makers = [Exl2Curves(), GgufCurves(measured_types(), layout)]
        measured = measure_checkpoint(checkpoint, calibration, MeasureConfig(device="cpu"), makers, work / "measure")
        in_measuring = Counter({name: clock.seconds.pop(name) for name in _PARTS if name in clock.seconds})
        _round(checkpoint, measured, layout, work, clock)
    _report(preset, rows * row_tokens, checkpoint, clock, in_measuring)


def _passes(checkpoint: Checkpoint, tokens: torch.Tensor, clock: _Clock) -> None:
    # Both kinds of pass through the block, and nothing else.
    model = StreamedModel(language_model(checkpoint), device=torch.device("cpu"), dtype=torch.float32)
    hidden = model.embed(tokens)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    with model.block(0):
        for batch in micro_batches(*tokens.shape):
            with clock.step("forward pass"), torch.no_grad():
                model.run_block(0, hidden[batch], batch.start)
            inputs = hidden[batch].clone().requires_grad_()
            with clock.step("pass with backward"):
                model.run_block(0, inputs, batch.start).backward(gradient[batch])
    large = torch.randn(2048, 2048)
    with clock.step("rate"):
        for _ in range(4):
            large @ large


def file_layout(checkpoint: Checkpoint) -> Layout:
    """Return a GGUF file that holds every linear, and the token embeddings, as one tensor in place."""
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    tensors, rows = {}, {}
    table = (source.embedding_name, *source.shape(f"{source.embedding_name}.weight"))
    for number, (name, out, width) in enumerate(
        [*((each.name, each.out_features, each.in_features) for each in (*linears, head)), table]
    ):
        tensor = f"blk.0.{number}.weight"
        tensors[tensor] = StoredTensor(ggml_type("F32"), (out, width))
        rows[tensor] = TensorRows((name,), np.zeros(out, dtype=np.int64), np.arange(out))
    return Layout(tensors, RowMap(rows, {}))


def _round(checkpoint: Checkpoint, measured: Measurement, layout: Layout, work: Path, clock: _Clock) -> None:
    exl2 = make_exl2_plan(measured, bpw=4.0, head_bits=6)
    gguf = make_gguf_plan(measured, bpw=4.5)
    options = RoundConfig(device="cpu")
    with clock.step("round: exl2"):
        round_model(checkpoint, measured, exl2, Exl2Rounder(exl2, measured), options, work / "exl2")
    with clock.step("round: gguf"):
        rounder = GgufRounder(gguf, measured, checkpoint, layout.rows)
        round_model(checkpoint, measured, gguf, rounder, options, work / "gguf")


def _report(preset: str, tokens: int, checkpoint: Checkpoint, clock: _Clock, in_measuring: Counter[str]) -> None:
    seconds = clock.seconds
    passes, two = seconds["forward pass"] + seconds["pass with backward"], 2 * seconds["forward pass"]
    linears, _ = model_linears(language_model(checkpoint))
    weights = sum(each.in_features * each.out_features for each in linears)
    rate = 4 * 2 * 2048**3 / seconds["rate"]
    measuring = sum(seconds[name] for name in _STEPS)
    click.echo(
        f"{preset}, one block of {weights / 1e6:.1f} million weights, {tokens} tokens, {rate / 1e9:.0f} GFLOP/s\n"
    )
    click.echo("| step | CPU s | of passes |\n| --- | --- | --- |")
    click.echo(f"| passes (products alone: {6 * weights * tokens / rate:.1f} s) | {passes:.1f} | 1 |")
    click.echo(f"| **measure** | {measuring:.1f} | **{measuring / passes:.2f}** |")
    for name in _STEPS:
        click.echo(f"| {name} | {seconds[name]:.1f} | {seconds[name] / passes:.2f} |")
    for name in in_measuring:
        click.echo(f"| of it {name} | {in_measuring[name]:.1f} | {in_measuring[name] / passes:.2f} |")
    click.echo(f"| two forward passes | {two:.1f} | 1 |")
    for name in ("round: exl2", "round: gguf"):
        click.echo(f"| **{name}** | {seconds[name]:.1f} | **{seconds[name] / two:.2f}** |")
    for name in _PARTS:
        if name in seconds:
            click.echo(f"| of both {name} | {seconds[name]:.1f} | {seconds[name] / two:.2f} |")
    click.echo(f"| search tables of ggml, once a process | {seconds['tables']:.1f} | |")


if __name__ == "__main__":
    main()
