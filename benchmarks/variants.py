"""The ways of quantizing that ``quality.py`` compares: bpwise, one decision of it made otherwise, and its peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from baselines import uniform_plan
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding import curves
from bpwise.measure.curves import CurveInputs, LinearCurves
from bpwise.measure.measurement import Measurement
from bpwise.measure.statistics import inputs as statistics

__all__ = ["OURS", "PEER", "VARIANTS", "Variant", "changed_measuring"]

PEER = "exllamav2"
OURS = "bpwise"

MakePlan = Callable[[Measurement, float, int], Exl2Plan]


@contextmanager
def _tokens_alike() -> Iterator[None]:
    """Have every token count the same in Gram matrices."""
    subsample_tokens = statistics.subsample_tokens
    statistics.subsample_tokens = lambda weights, _rng: (torch.arange(len(weights)), torch.ones_like(weights))
    try:
        yield
    finally:
        statistics.subsample_tokens = subsample_tokens


@contextmanager
def _rows_by_activity() -> Iterator[None]:
    """Have rows sorted by the power of their inputs (GPTQ's act-order), and groups cut in that order."""
    measure, grouped = curves.measure_curves, curves.grouped_rows

    def by_activity(inputs: CurveInputs, *others: Any) -> list[LinearCurves]:
        order = inputs.gram.diagonal().argsort(descending=True, stable=True)
        curves.grouped_rows = lambda *_: order
        return measure(inputs, *others)

    curves.measure_curves = by_activity
    try:
        yield
    finally:
        curves.measure_curves, curves.grouped_rows = measure, grouped


def _best_plan(measurement: Measurement, bpw: float, head_bits: int) -> Exl2Plan:
    return make_exl2_plan(measurement, bpw=bpw, head_bits=head_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of quantizing.

    Attributes:
        title: What differs from bpwise's defaults.
        group_size: Rows of a group.
        damping: Damping of every Gram matrix; None chooses it on held-out rows.
        tokens_alike: Whether every calibration token counts the same.
        rows_by_activity: Whether rows are grouped by the power of their inputs alone.
        plan: Chooses the widths.
        couple_outputs: Whether outputs make up for each other's errors.
        correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
        tunes_scales: Whether scales are fitted to the original's predictions in the end.
        feedback: Whether errors are fed back, and blocks rounded on quantized inputs.
    """

    title: str
    group_size: int = 32
    damping: float | None = None
    tokens_alike: bool = False
    rows_by_activity: bool = False
    plan: MakePlan = _best_plan
    couple_outputs: bool = True
    correct_drift: bool = True
    tunes_scales: bool = False
    feedback: bool = True

    @property
    def measurement(self) -> str:
        """Name of the measurement that it needs: variants share what they can."""
        damping = "" if self.damping is None else f"-{self.damping:g}"
        rows = "-activity" if self.rows_by_activity else ""
        return f"{'alike' if self.tokens_alike else 'weighted'}-{self.group_size}{damping}{rows}"


VARIANTS = {
    PEER: Variant(title="ExLlamaV2 0.3.2, its own converter"),
    "rtn": Variant(title="uniform widths, rounded to nearest", plan=uniform_plan, feedback=False),
    "uniform": Variant(title="uniform widths", plan=uniform_plan),
    "alike": Variant(title="all tokens count alike", tokens_alike=True),
    "damping": Variant(title="damping of 2 % everywhere", damping=0.02),
    "one-sided": Variant(title="outputs do not make up for each other's errors", couple_outputs=False),
    "no-drift": Variant(title="drift not corrected", correct_drift=False),
    "by-activity": Variant(title="rows grouped by activity alone", rows_by_activity=True),
    "group-64": Variant(title="groups of 64", group_size=64),
    "group-128": Variant(title="groups of 128", group_size=128),
    "tuned": Variant(title="scales tuned, too (--effort high)", tunes_scales=True),
    OURS: Variant(title="bpwise"),
}


@contextmanager
def changed_measuring(variant: Variant) -> Iterator[None]:
    """Have the measuring stage do as a variant says."""
    with ExitStack() as changes:
        if variant.tokens_alike:
            changes.enter_context(_tokens_alike())
        if variant.rows_by_activity:
            changes.enter_context(_rows_by_activity())
        yield
