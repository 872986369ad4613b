"""Results of a run, for terminals and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..convert.model import Verification
from ..convert.plan import Plan
from ..convert.rounding import Drift, drift_section
from ..eval.comparison import Comparison
from ..eval.metrics.numbers import nats
from ..eval.report.markdown import summary_lines
from ..eval.report.tables import models_table
from ..eval.report.verdict import Judged, verdict_sentence
from ..tables import bytes_text, html_summary
from .rounding.fallbacks import fallback_entries, fallback_lines
from .timing.costs import StepCost, cost_line, cost_section, minutes

__all__ = ["QuantizeResult", "report_details"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QuantizeResult(Judged):
    """Result of a run.

    Attributes:
        output: The directory or file.
        plan: What every linear or tensor got, with the predicted damage.
        verification: What was read back from the written files.
        original_bytes: Size of the original tensors.
        comparison: Original against quantized, or None if evaluation was left out.
        costs: Time and memory of every step that ran.
        fallbacks: Linears whose Gram matrix could not be factored with the measured damping, and the damping that it
            took (infinite: rounded without error feedback); empty if the work directory holds no rounded model.
        drift: How far the hidden states after each block are from the original's; empty if the work directory holds no
            rounded model, or it was refined after that.
        measurement: The measurement file, which serves any other bitrate; None if nothing was measured.
        report: The page with the comparison; None if evaluation was left out.
        experts: How many experts calibration text hardly reached; None for a model without experts.
        precision: How products were computed while measuring; None if nothing was measured.
        warnings: What readers compute otherwise than Transformers, and what could not be carried over.
        beside: Files that belong to the output and lie beside it.
        details: What was found of the original on its way, for the report: section -> entry -> value.
        seconds: Wall-clock time of the run, what other outputs of the same run took included.
        repeated: Whether an earlier run had made all of it, so that nothing was done.
    """

    output: Path
    plan: Plan
    verification: Verification
    original_bytes: int
    comparison: Comparison | None
    costs: tuple[StepCost, ...]
    fallbacks: Mapping[str, float]
    drift: tuple[Drift, ...]
    measurement: Path | None
    report: Path | None
    experts: str | None
    precision: str | None
    warnings: tuple[str, ...]
    details: Mapping[str, Mapping[str, str | float]]
    beside: tuple[Path, ...] = ()
    seconds: float = 0.0
    repeated: bool = False

    @property
    def bpw(self) -> float:
        """Bits per weight as a target in bits means them."""
        return self.verification.bpw

    @property
    def file_bytes(self) -> int:
        """Size of all files with tensors, in bytes."""
        return self.verification.file_bytes

    def __repr__(self) -> str:
        """Return the output, its size, and what it cost."""
        cost = "" if self.kl is None else f", KL {nats(self.kl)} nats/token, {self.verdict}"
        return f"QuantizeResult({self.output}: {self.bpw:.4f} bpw, {bytes_text(self.file_bytes)}{cost})"

    def _repr_html_(self) -> str:
        compared = [] if self.comparison is None else [self.comparison]
        size = f"{bytes_text(self.file_bytes)}, {self.file_bytes / self.original_bytes:.1%} of the original"
        facts = [f"{size}; {self.bpw:.4f} bits per weight", *map(verdict_sentence, compared), *self.warnings]
        facts += [] if self.report is None else [f"Report: {self.report}"]
        return html_summary(self.output.name, facts, models_table(compared) if compared else None)

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        if self.repeated:
            return [f"finished already: {self.output} holds what this command makes"]
        plan, verified = self.plan, self.verification
        rates = ", ".join(f"{part} {bpw:.4f} bpw" for part, bpw in verified.rates.items())
        lines = [
            f"size        {bytes_text(verified.file_bytes)}, {verified.file_bytes / self.original_bytes:.1%} of the "
            f"original; {rates}",
            *(f"plan        {fact}" for fact in plan.describe().facts),
        ]
        lines += [] if self.comparison is None else summary_lines(self.comparison)
        lines += [f"warning     {warning}" for warning in self.warnings]
        lines += [] if self.experts is None else [f"experts     {self.experts}"]
        lines += fallback_lines(self.fallbacks)
        lines += map(cost_line, self.costs)
        if self.measurement is not None:
            lines.append(f"measurement {self.measurement} serves any other bitrate")
        if self.report is not None:
            lines.append(f"report      {self.report}")
        lines += [f"beside      {path}" for path in self.beside]
        verdict = "" if self.verdict is None else f": {self.verdict}"
        total = f"{minutes(self.seconds)}; {self.file_bytes / self.original_bytes:.1%} of the original's size{verdict}"
        return [*lines, f"total       {total}", f"output      {self.output}"]


def report_details(result: QuantizeResult) -> dict[str, dict[str, str | float]]:
    """Return what a report should say of the run beside the comparison: section -> entry -> value."""
    plan, verified = result.plan, result.verification
    predicted: dict[str, float] = {}
    if plan.damage_nats is not None:
        predicted["predicted damage, nats/token"] = plan.damage_nats
    if plan.gap is not None:
        predicted["at most above the best possible, %"] = round(100 * plan.gap, 3)
    return {
        "Size": {
            **{f"bits per weight, {part}": round(bpw, 4) for part, bpw in verified.rates.items()},
            "quantized files, bytes": verified.file_bytes,
            "original tensors, bytes": result.original_bytes,
            "quantized / original": round(verified.file_bytes / result.original_bytes, 4),
        },
        "Plan": {
            **predicted,
            **{f"weights in {name}, %": round(100 * share, 2) for name, share in plan.shares().items()},
            "in words": "; ".join(plan.describe().facts),
            **({} if result.experts is None else {"experts": result.experts}),
            **({} if result.precision is None else {"matrix products while measuring": result.precision}),
            **fallback_entries(result.fallbacks),
        },
        **{section: dict(entries) for section, entries in result.details.items()},
        **cost_section(result.costs),
        **drift_section(result.drift),
    }
