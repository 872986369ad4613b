"""Results of a run, for terminals and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..convert.model import Verification
from ..convert.plan import Plan
from ..convert.rounding import Drift, drift_section
from ..eval.comparison import Comparison
from ..eval.report.markdown import summary_lines
from .rounding.fallbacks import fallback_entries, fallback_lines
from .timing.costs import StepCost, cost_line, cost_section

__all__ = ["QuantizeResult", "report_details"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
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

    def summary_lines(self) -> list[str]:
        """Return the result as lines for a terminal."""
        plan, verified = self.plan, self.verification
        rates = ", ".join(f"{part} {bpw:.4f} bpw" for part, bpw in verified.rates.items())
        lines = [
            f"size        {verified.file_bytes / 2**20:.1f} MiB, {verified.file_bytes / self.original_bytes:.1%} of the"
            f" original; {rates}",
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
        return [*lines, f"output      {self.output}"]


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
