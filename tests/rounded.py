"""Tiny models, measured and rounded to EXL2: what tests of rounding share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder, rounded_linear
from bpwise.convert.numerics.fit import _TUNED
from bpwise.convert.rounding import RoundedModel
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.progress import Progress, silent
from bpwise.quantize.rounding.model import RoundConfig, round_model
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCABULARY = 264


def random_linear(shape: tuple[int, ...]) -> QuantizedLinear:
    """One of 4 bits in place of a weight of this shape, (out, rows)."""
    out_features, rows = shape
    rng = torch.Generator().manual_seed(1)
    return QuantizedLinear(
        groups=(RowGroup(4, rows),),
        codes=torch.randint(0, 16, (rows, out_features), generator=rng, dtype=torch.uint8),
        scale_codes=torch.randint(0, 16, (1, out_features), generator=rng, dtype=torch.uint8),
        max_scales=torch.full((1,), 0.1).half(),
        order=torch.randperm(rows, generator=rng),
    )


def token_ids(rows: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 32), generator=torch.Generator().manual_seed(seed))


def calibration(rows: int = 24) -> CalibrationSet:
    return CalibrationSet(
        tokens=token_ids(rows, seed=1), origins=("random",) * rows, description="random ids", adds_bos=False
    )


@dataclass
class Measured:
    """A model and its measurement; ``work`` is where it was measured."""

    directory: Path
    measurement: Measurement
    work: Path

    def plan(self, bpw: float, head_bits: Any = 6, **options: Any) -> Exl2Plan:
        return make_exl2_plan(self.measurement, bpw=bpw, head_bits=head_bits, **options)

    def round(
        self,
        plan: Exl2Plan,
        work: Path,
        progress: Progress = silent,
        *,
        couple_outputs: bool = True,
        **options: Any,
    ) -> RoundedModel:
        return round_model(
            Checkpoint.open(self.directory),
            self.measurement,
            plan,
            Exl2Rounder(plan, self.measurement, couple_outputs=couple_outputs),
            RoundConfig(device="cpu", **options),
            work,
            progress,
        )

    def linear(self, rounded: RoundedModel, name: str) -> QuantizedLinear:
        source = language_model(Checkpoint.open(self.directory))
        return rounded_linear(rounded, source, name, tuned=rounded.store.has(_TUNED))

    def dense(self, rounded: RoundedModel | None = None) -> Any:
        """The model as Transformers runs it, with its weights replaced by the decoded ones."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        for name in rounded.names if rounded else ():
            module = model.get_submodule(name)
            # A weight of its own: a quantized head is no longer tied to the embedding.
            module.weight = torch.nn.Parameter(self.linear(rounded, name).dequantize().float())
        return model

    def assert_same(self, one: RoundedModel, other: RoundedModel) -> None:
        assert one.names == other.names
        for name in one.names:
            first, second = self.linear(one, name), self.linear(other, name)
            assert first.groups == second.groups
            for field in ("codes", "scale_codes", "max_scales", "order"):
                assert torch.equal(getattr(first, field), getattr(second, field)), field


def measured_model(directory: Path, place: Path, rows: int = 24) -> Measured:
    work = place / "measuring"
    config = MeasureConfig(device="cpu")
    made = measure_checkpoint(Checkpoint.open(directory), calibration(rows), config, [Exl2Curves()], work)
    return Measured(directory, made, work)


def mean_divergence(original: Any, quantized: Any, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(dim=-1) for model in (original, quantized))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())
