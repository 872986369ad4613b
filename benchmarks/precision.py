"""What shorter factors of products in the measuring passes do to the quantized model.

    python benchmarks/precision.py models/SmolLM2-135M-Instruct-off-grid --seeds 3

AMX multiplies in bfloat16, NVIDIA's GPUs in TF32; sums are float32 on both. Here that is computed on any CPU: in the
measuring passes and their sums, the factors of every product are rounded to that many digits before float32 kernels
multiply them (attention's own kernel apart). Everything else is the same. Every line is one bitrate: the mean KL
divergence from the original on held-out text with shorter factors, relative to that with float32, over several seeds of
calibration text and probes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.eval.config import EvalConfig
from bpwise.linalg.products import BFLOAT16, FLOAT32, TF32, float32_products
from bpwise.measure import passes
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.run import measure_model, quantize_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RoundedFactors", "main", "to_tf32"]

_FACTORS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.addmm_.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
}
"""Where the factors of products stand among the arguments."""


def to_tf32(values: Tensor) -> Tensor:
    """Round float32 to the 10 bits after the point that TF32 keeps, to the nearest, ties away from zero."""
    return ((values.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


_SHORTER: dict[str, Callable[[Tensor], Tensor]] = {
    BFLOAT16: lambda values: values.bfloat16().float(),
    TF32: to_tf32,
}


class RoundedFactors(TorchDispatchMode):
    """Rounds the factors of all float32 products, those of backward passes too."""

    def __init__(self, shorter: Callable[[Tensor], Tensor]) -> None:
        """Choose how.

        Args:
            shorter: Rounds a factor.
        """
        super().__init__()
        self._shorter = shorter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round, then compute."""
        places = _FACTORS.get(func, ())
        rounded = [
            self._shorter(each) if place in places and each.dtype == torch.float32 else each
            for place, each in enumerate(args)
        ]
        return func(*rounded, **(kwargs or {}))


@contextmanager
def _emulated(precision: str) -> Iterator[None]:
    # Measuring passes compute so.
    original = passes.products

    @contextmanager
    def shorter(device: torch.device, _precision: str) -> Iterator[None]:
        with float32_products(device), RoundedFactors(_SHORTER[precision]):
            yield

    passes.products = original if precision == FLOAT32 else shorter
    try:
        yield
    finally:
        passes.products = original


@click.command()
@click.argument("model")
@click.option("--bpw", "rates", multiple=True, type=float, default=(8.0, 4.0, 2.5), show_default=True)
@click.option("--precisions", multiple=True, default=(BFLOAT16, TF32), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--rows", default=8, show_default=True)
@click.option("--row-tokens", default=512, show_default=True)
@click.option("--eval-rows", default=6, show_default=True)
def main(
    model: str,
    rates: tuple[float, ...],
    precisions: tuple[str, ...],
    seeds: int,
    rows: int,
    row_tokens: int,
    eval_rows: int,
) -> None:
    """Print the KL divergence of MODEL, measured with shorter factors, relative to that measured in float32."""
    source = open_model(model)
    evaluate = EvalConfig(rows=eval_rows, row_tokens=row_tokens)
    found: dict[tuple[str, float], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(seeds):
            text = CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
            for precision in (FLOAT32, *precisions):
                place = Path(directory) / f"{precision}-{seed}"
                options = MeasureConfig(calibration=text, seed=seed, precision=FLOAT32)
                with _emulated(precision):
                    measure_model(source, place.with_suffix(".safetensors"), formats=["exl2"], measure=options)
                for bpw in rates:
                    made = quantize_model(
                        source,
                        place.with_name(f"{place.name}-{bpw}"),
                        bpw=bpw,
                        measurement=place.with_suffix(".safetensors"),
                        measure=options,
                        evaluate=evaluate,
                    )
                    assert made.comparison is not None
                    kl = made.comparison.summary.kl_nats.value
                    found.setdefault((precision, bpw), []).append(kl)
                    click.echo(f"{precision} {bpw} bpw, seed {seed}: {kl:.6f}", err=True)
    click.echo("| bpw | KL, float32 | " + " | ".join(f"{each} / float32" for each in precisions) + " |")
    click.echo("| --- | --- |" + " --- |" * len(precisions))
    for bpw in rates:
        plain = found[FLOAT32, bpw]
        cells = [f"{statistics.mean(plain):.6f}"]
        for precision in precisions:
            ratios = [ours / theirs for ours, theirs in zip(found[precision, bpw], plain, strict=True)]
            error = statistics.stdev(ratios) / len(ratios) ** 0.5 if seeds > 1 else float("nan")
            cells.append(f"{statistics.mean(ratios):.3f} ± {error:.3f}")
        click.echo(f"| {bpw:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
