"""Contents of a report, before they are written as anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...convert.plan import LinearCost
from ...version import __version__
from ..comparison import Comparison
from .extras import NO_EXTRAS, Extras, extras_content
from .made import run_facts
from .paired import PairedDifference, paired_differences
from .tables import Details
from .verdict import headline, sentence, verdict_sentence

__all__ = ["REPORT_VERSION", "Report"]

REPORT_VERSION = 1
"""Of ``report.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a report tells.

    Attributes:
        comparisons: At least one; all with the same original on the same text.
        costs: What each linear of each model got, in the models' order, for the maps; may be empty.
        details: More sections, after the comparison in their order: a title, and rows of names and values.
        extras: Benchmarks and needles of the same models.
        broken: Names of models that were made with them, but whose predictions are useless.
        made: Date, command, hardware and software, by name; by default of this process.
    """

    comparisons: tuple[Comparison, ...]
    costs: tuple[tuple[LinearCost, ...], ...] = ()
    details: Details = field(default_factory=dict)
    extras: Extras = NO_EXTRAS
    broken: tuple[str, ...] = ()
    made: Mapping[str, str] = field(default_factory=run_facts)

    @property
    def title(self) -> str:
        """The report's title."""
        first = self.comparisons[0]
        compared = first.quantized.name if len(self.comparisons) == 1 else "Quantized models"
        return f"{compared} against {first.original.name}"

    @property
    def paired(self) -> tuple[PairedDifference, ...]:
        """Differences between the models.

        Raises:
            ConfigError: The comparisons are of different originals or texts.
        """
        return paired_differences(self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has; of one model flat, of several as lists."""
        costs = [
            [{"name": x.name, "bpw": x.bpw, "damage_nats": x.damage_nats} for x in each]  # not all tell their weights
            for each in self.costs
        ]
        if len(self.comparisons) == 1:
            (only,) = self.comparisons
            models: dict[str, Any] = {
                "headline": sentence(only),
                "verdict": verdict_sentence(only),
                "comparison": only.to_dict(),
                "linears": costs[0] if costs else [],
            }
        else:
            models = {
                "headline": headline(self.comparisons),
                "verdicts": [verdict_sentence(each) for each in self.comparisons],
                "comparisons": [each.to_dict() for each in self.comparisons],
                "paired": [asdict(pair) for pair in self.paired],
                "linears": costs or [[] for _ in self.comparisons],
            }
        return {
            "bpwise_report": REPORT_VERSION,
            "bpwise": __version__,
            **models,
            **extras_content(self.extras),
            "made": dict(self.made),
            "details": {title: dict(section) for title, section in self.details.items()},
        }
