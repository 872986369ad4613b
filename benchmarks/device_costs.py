"""What a block would cost on a GPU, computed from what a pretend device counts; nothing here is measured on one.

    python benchmarks/device_costs.py

Blocks of a Llama's structure, scaled down, are measured and rounded to EXL2 on the pretend device of ``tests/device``.
It counts what a GPU would be asked for: launches, points where the host waits, multiplications and additions, bytes
read and written, memory. Each count is fitted by sums of what it grows with (weights times tokens, squares and cubes of
widths, input channels, ...), and held against one more block that the fit has not seen. Taken to the shapes of real
models, that gives seconds on a GPU of published rates::

    seconds = max(operations / rate, bytes / bandwidth) + launches * latency + rows in kernels * row

Blocks are counted twice: rounded by loops over the rows of a group, and as CUDA devices do it, by a kernel of the
package's own (``bpwise.convert.exl2.rounding.kernels``). The pretend device does not run that: something else that
returns the same stands in for it and counts as one launch.

Everything is as PyTorch runs it: float32, an operator a launch, attention as products that are written out (a GPU's own
kernel for it moves fewer bytes). Not in it: reading the checkpoint, embeddings and head, rounding to ggml's types (the
CPU does that), and what a GPU loses on small matrices.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.rounding import coupling, feedback
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.rounding.model import RoundConfig, round_model
from bpwise.tests.device.pretend import NAME, Counts, counted, register
from bpwise.tests.device.row_kernel import pretend_kernel
from memory import write_checkpoint
from transformers import LlamaConfig

__all__ = ["GPUS", "MODELS", "Fit", "Shape", "forecast", "main"]

STEPS = {
    "forward": ("bpwise.measure.passes", "MeasuringPasses._forward_block"),
    "backward, statistics": ("bpwise.measure.passes", "MeasuringPasses._backward_block"),
    "curves": ("bpwise.measure.passes", "MeasuringPasses._measured_stage"),
    "rounding": ("bpwise.quantize.rounding.rounding_pass", "RoundingPass._round_block_"),
}
"""Steps of a block, and the functions that do them."""

KERNEL_ROWS = {"curves": 1, "rounding": coupling.OUTPUT_SETS}
"""Rows that kernels work on one after another, by step: so many for every input channel of a linear."""

_SCALED = {
    "bpwise.measure.model.batches": {"MICRO_BATCH_TOKENS": 256},
    "bpwise.measure.statistics.heldout": {"FEW_DIRECTIONS": 128, "FEW_CHANNELS": 128},
    "bpwise.linalg.hessian": {"FEW_CHANNELS": 128},
    "bpwise.quantize.rounding.drift": {"FEW_CHANNELS": 128},
}
"""Limits that small blocks would not reach, so that they are worked on as large ones are."""

_Numbers = dict[tuple[str, str], float]
"""By count and step."""

_HEAD = 64
_FACTORED = 256
"""Columns that Gram matrices are summed and factored in together."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a block, and how much text it sees.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        queries: Width of all queries.
        keys: Width of all keys, and of all values.
        rows: Calibration rows.
        row_tokens: Tokens of a row.
        batch_tokens: Tokens of a micro-batch.
        blocks: Blocks of the model.
    """

    hidden: int
    inner: int
    queries: int
    keys: int
    rows: int = 32
    row_tokens: int = 1024
    batch_tokens: int = 2048
    blocks: int = 1

    def terms(self) -> dict[str, float]:
        """Return what counts grow with."""
        stream, queries, inner = self.hidden, self.queries, self.inner
        linears = [(stream, queries), (stream, self.keys), (stream, self.keys), (queries, stream)]
        linears += [(stream, inner), (stream, inner), (inner, stream)]
        groups = [stream, queries, stream, inner]
        tokens = self.rows * self.row_tokens
        batches = math.ceil(self.rows / max(1, self.batch_tokens // self.row_tokens))
        weights = sum(k * n for k, n in linears)
        squares = sum(k**2 for k in groups)
        return {
            "1": 1,
            "batches": batches,
            "channels": sum(k for k, _ in linears),
            "parts": sum(math.ceil(k / _FACTORED) for k in groups),
            "batches * parts": batches * sum(math.ceil(k / _FACTORED) for k in groups),
            "weights": weights,
            "tokens * weights": tokens * weights,
            "batches * weights": batches * weights,
            "tokens * widths": tokens * sum(k + n for k, n in linears),
            "attention": tokens * self.row_tokens * queries,
            "scores": tokens * self.row_tokens * queries / _HEAD,
            "squares": squares,
            "tokens * squares": tokens * squares,
            "batches * squares": batches * squares,
            "squares of linears": sum(k**2 for k, _ in linears),
            "cubes": sum(k**3 for k in groups),
            "cubes of linears": sum(k**3 for k, _ in linears),
            "feedback": sum(k**2 * n for k, n in linears),
            "largest square": max(groups) ** 2,
            "largest weight": max(k * n for k, n in linears),
            "batch": min(self.batch_tokens, tokens) * sum(k + n for k, n in linears),
        }


_PASSES = ("tokens * weights", "attention")
_PASS_BYTES = ("batches * weights", "tokens * widths", "scores")
TERMS: Mapping[tuple[str, str], Sequence[str]] = {
    ("launches", "forward"): ("batches",),
    ("launches", "backward, statistics"): ("1", "batches", "batches * parts"),
    ("launches", "curves"): ("1", "channels", "parts"),
    ("launches", "rounding"): ("1", "batches", "channels", "parts", "batches * parts"),
    ("waits", "forward"): ("1", "batches"),
    ("waits", "backward, statistics"): ("1", "batches"),
    ("waits", "curves"): ("1",),
    ("waits", "rounding"): ("1", "batches"),
    ("flops", "forward"): _PASSES,
    ("flops", "backward, statistics"): (*_PASSES, "tokens * squares"),
    ("flops", "curves"): ("cubes", "cubes of linears", "squares of linears", "channels"),
    ("flops", "rounding"): (*_PASSES, "tokens * squares", "cubes", "cubes of linears", "feedback", "weights"),
    ("bytes", "forward"): _PASS_BYTES,
    ("bytes", "backward, statistics"): (*_PASS_BYTES, "batches * squares"),
    ("bytes", "curves"): ("cubes", "squares of linears", "channels", "weights"),
    ("bytes", "rounding"): (*_PASS_BYTES, "batches * squares", "cubes", "squares of linears", "feedback", "weights"),
    ("memory", "all"): ("weights", "squares", "largest square", "largest weight", "batch"),
}
"""What each count of each step may grow with."""

SAMPLES = (
    (256, 512, 128, 4, 64),
    (256, 1024, 64, 16, 64),
    (256, 2048, 256, 8, 64),
    (512, 512, 128, 4, 128),
    (512, 1024, 256, 16, 64),
    (512, 1536, 128, 8, 64),
    (768, 768, 256, 4, 128),
    (768, 2048, 128, 4, 64),
    (1024, 1024, 256, 8, 64),
)
UNSEEN = (768, 1536, 384, 8, 128)
"""Scaled-down blocks: hidden, inner and key widths, rows, tokens of a row; and the one that the fit is held against."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As it is sold.
        rate: Float32 operations a second, as published.
        bandwidth: Bytes a second, as published.
        latency: Seconds that a launch takes at least.
        row: Seconds that a row takes in the kernel that rounds row groups; None where there is none, but a loop.
    """

    name: str
    rate: float
    bandwidth: float
    latency: float
    row: float | None = None


_ROW = 5e-7
"""Some 250 instructions, half of which wait for the one before, and values from the second-level cache: 900 cycles."""

GPUS = (
    Gpu("RTX 4090", 82.6e12, 1.008e12, 5e-6, _ROW),  # NVIDIA, Ada GPU architecture whitepaper
    Gpu("H100 SXM", 66.9e12, 3.35e12, 5e-6, _ROW),  # NVIDIA, H100 datasheet: float32 without tensor cores
    Gpu("M3 Max", 14.3e12, 0.4e12, 10e-6),  # Apple names 400 GB/s and 40 cores; of 128 lanes at 1.4 GHz
)
MODELS = {
    "Llama-3.2-1B": Shape(hidden=2048, inner=8192, queries=2048, keys=512, blocks=16),
    "Llama-3-8B": Shape(hidden=4096, inner=14336, queries=4096, keys=1024, blocks=32),
    "27B (Gemma 2)": Shape(hidden=4608, inner=36864, queries=4096, keys=2048, blocks=46),
}


@dataclass
class Fit:
    """Counts as weighted sums of terms.

    Attributes:
        weights: By count and step, the weight of each of its ``TERMS``.
        off: By count, the largest relative error on the block that was not fitted.
    """

    weights: dict[tuple[str, str], np.ndarray[Any, Any]] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seen: Sequence[tuple[Shape, Mapping[tuple[str, str], float]]]) -> Fit:
        """Fit all counts of some blocks, with as little relative error as weights that are not negative allow."""
        fit = cls()
        for key, terms in TERMS.items():
            values = np.array([counts[key] for _, counts in seen])
            table = np.array([[shape.terms()[term] for term in terms] for shape, _ in seen]) / values[:, None]
            fit.weights[key] = _not_negative(table, np.ones(len(values)))
        return fit

    def count(self, what: str, step: str, shape: Shape) -> float:
        """Return a count for a block of any shape."""
        terms = shape.terms()
        return float(np.dot(self.weights[what, step], [terms[term] for term in TERMS[what, step]]))

    def hold_against(self, shape: Shape, counts: Mapping[tuple[str, str], float]) -> None:
        """Note how far the fit is off on a block."""
        for what, step in TERMS:
            off = abs(self.count(what, step, shape) / counts[what, step] - 1)
            self.off[what] = max(self.off.get(what, 0.0), off)


def _not_negative(table: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # Least squares; terms with negative weights are left out one by one.
    scale = np.linalg.norm(table, axis=0)
    found, used = np.zeros(table.shape[1]), list(range(table.shape[1]))
    while used:
        own = np.linalg.lstsq(table[:, used] / scale[used], wanted, rcond=None)[0]
        if own.min() >= 0:
            found[used] = own / scale[used]
            break
        used.pop(int(own.argmin()))
    return found


def forecast(fit: Fit, shape: Shape, gpu: Gpu) -> dict[str, tuple[float, float]]:
    """Return seconds of each step of a block, and seconds of them that are launches.

    Args:
        fit: Counts with kernels or with loops, as the GPU has them.
        shape: The block.
        gpu: The GPU.
    """
    found = {}
    for step in STEPS:
        launches = fit.count("launches", step, shape) * gpu.latency
        work = max(fit.count("flops", step, shape) / gpu.rate, fit.count("bytes", step, shape) / gpu.bandwidth)
        rows = KERNEL_ROWS.get(step, 0) * shape.terms()["channels"]
        found[step] = work + launches + rows * (gpu.row or 0.0), launches
    return found


@contextmanager
def _scaled() -> Iterator[None]:
    before = []
    for name, values in _SCALED.items():
        module = importlib.import_module(name)
        for key, value in values.items():
            before.append((module, key, getattr(module, key)))
            setattr(module, key, value)
    try:
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


@contextmanager
def _watched(found: dict[str, list[Counts]]) -> Iterator[None]:
    # Count each step wherever it is done.
    undo = []
    for step, (module, path) in STEPS.items():
        owner, _, name = path.rpartition(".")
        place = getattr(importlib.import_module(module), owner)
        undo.append((place, name, getattr(place, name)))
        setattr(place, name, _counting(found.setdefault(step, []), undo[-1][2]))
    try:
        yield
    finally:
        for place, name, function in undo:
            setattr(place, name, function)


def _counting(found: list[Counts], function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        with counted() as counts:
            result = function(*args, **kwargs)
        found.append(counts)
        return result

    return watched


@contextmanager
def _kernels() -> Iterator[None]:
    before = feedback.row_kernel
    feedback.row_kernel = lambda _device, _rows: pretend_kernel
    try:
        yield
    finally:
        feedback.row_kernel = before


def _counts_of(hidden: int, inner: int, keys: int, rows: int, row_tokens: int) -> tuple[Shape, _Numbers]:
    # One block, measured and rounded.
    shape = Shape(
        hidden=hidden, inner=inner, queries=hidden, keys=keys, rows=rows, row_tokens=row_tokens, batch_tokens=256
    )
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=hidden // _HEAD,
        num_key_value_heads=keys // _HEAD,
        head_dim=_HEAD,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    tokens = torch.randint(3, 511, (rows, row_tokens), generator=torch.Generator().manual_seed(0))
    text = CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random tokens", adds_bos=False)
    found: dict[str, list[Counts]] = {}
    with tempfile.TemporaryDirectory() as directory, _watched(found), counted() as everything:
        work = Path(directory)
        write_checkpoint(work / "model", config, seed=0)
        checkpoint = Checkpoint.open(work / "model")
        options = MeasureConfig(device=NAME)
        measured = measure_checkpoint(checkpoint, text, options, [Exl2Curves()], work / "measure")
        plan = make_exl2_plan(measured, bpw=4.0, head_bits=6)
        round_model(checkpoint, measured, plan, Exl2Rounder(plan, measured), RoundConfig(device=NAME), work / "round")
    counts: _Numbers = {("memory", "all"): everything.peak_bytes - everything.start_bytes}
    for step, parts in found.items():
        counts["launches", step] = sum(part.launches.total() for part in parts)
        counts["waits", step] = sum(part.waits.total() for part in parts)
        counts["flops", step] = sum(part.flops for part in parts)
        counts["bytes", step] = sum(part.read_bytes + part.written_bytes for part in parts)
    return shape, counts


def _fit(*, kernels: bool) -> Fit:
    seen = []
    with _scaled(), _kernels() if kernels else nullcontext():
        for number, sample in enumerate((*SAMPLES, UNSEEN), start=1):
            name = "with kernels" if kernels else "with loops"
            click.echo(f"block {number} of {len(SAMPLES) + 1}, {name}: {sample}", err=True)
            seen.append(_counts_of(*sample))
    fit = Fit.of(seen[:-1])
    fit.hold_against(*seen[-1])
    return fit


def _report(loops: Fit, kernels: Fit) -> None:
    click.echo("Computed, not measured. Largest errors of the fits on a block that they have not seen:")
    for name, fit in (("with loops", loops), ("with kernels", kernels)):
        click.echo(", ".join(f"{what} {off:.0%}" for what, off in fit.off.items()) + f", {name}.")
    for name, shape in MODELS.items():
        click.echo(f"\n{name}, one block of {shape.blocks}, {shape.rows} x {shape.row_tokens} tokens:\n")
        click.echo("| step | 10^12 operations | GB | launches | with loops | waits |")
        click.echo("| --- | --- | --- | --- | --- | --- |")
        for step in STEPS:
            in_loops = loops.count("launches", step, shape)
            flops, size, launches, waits = (
                kernels.count(x, step, shape) for x in ("flops", "bytes", "launches", "waits")
            )
            cells = f"{flops / 1e12:.2f} | {size / 1e9:.0f} | {launches:,.0f} | {in_loops:,.0f} | {waits:,.0f}"
            click.echo(f"| {step} | {cells} |")
    click.echo("\n| model | GPU | s a block | of them launches | s in curves | s in rounding | all blocks | memory |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in MODELS.items():
        for gpu in GPUS:
            click.echo(_row(name, shape, gpu, kernels if gpu.row else loops))
    click.echo("\nWith loops on all of them:\n")
    for name, shape in MODELS.items():
        for gpu in GPUS:
            if gpu.row:
                click.echo(_row(name, shape, replace(gpu, row=None), loops))


def _row(name: str, shape: Shape, gpu: Gpu, fit: Fit) -> str:
    steps = forecast(fit, shape, gpu)
    seconds, launches = (sum(each[i] for each in steps.values()) for i in range(2))
    return (
        f"| {name} | {gpu.name} | {seconds:.1f} | {launches / seconds:.0%} | {steps['curves'][0]:.1f} | "
        f"{steps['rounding'][0]:.1f} | {seconds * shape.blocks / 60:.0f} min | "
        f"{fit.count('memory', 'all', shape) / 2**30:.1f} GiB |"
    )


@click.command()
def main() -> None:
    """Count, fit and print what is computed."""
    register()
    torch.set_num_threads(1)
    _report(_fit(kernels=False), _fit(kernels=True))


if __name__ == "__main__":
    main()
