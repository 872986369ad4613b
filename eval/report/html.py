"""Comparisons as one HTML page that needs nothing else: no network, no scripts or fonts from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...convert.format import LinearCost
from ...version import __version__
from ..comparison import Comparison
from ..metrics.estimate import CONFIDENCE, Estimate, confidence_interval
from ..metrics.profile import Choice
from .charts import (
    bits_map,
    damage_map,
    drift_chart,
    histogram_chart,
    kinds_chart,
    needle_map,
    positions_chart,
    size_chart,
)
from .extras import (
    NEEDLE_NOTE,
    NO_EXTRAS,
    TASKS_NOTE,
    Extras,
    needle_methods,
    needle_rows,
    task_head,
    task_methods,
    task_rows,
)
from .numbers import nats, percent, perplexity, visible
from .svg import STYLE, Drawing, series_color
from .verdict import headline, verdict

__all__ = ["HtmlReport", "charts_of", "html_report", "page_style", "script_hash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HtmlReport:
    """What the page shows.

    Attributes:
        comparisons: At least one; all with the same original on the same text.
        costs: What each linear of each model got, in the models' order; may be empty.
        paired: Rows of the table of differences between models, as text: two names, then values and what is beneath.
        methods: Names and values: how it was measured.
        details: More sections: titles, and for each the rows of its table.
        extras: Benchmarks and needles.
    """

    comparisons: tuple[Comparison, ...]
    costs: tuple[tuple[LinearCost, ...], ...] = ()
    paired: Sequence[tuple[str, ...]] = ()
    methods: Sequence[tuple[str, str]] = ()
    details: Mapping[str, Mapping[str, str | float]] | None = field(default=None)
    extras: Extras = NO_EXTRAS


@dataclass(frozen=True, slots=True)
class _Cell:
    """Text of a table's cell, what it is sorted by, and a line beneath it."""

    text: str
    key: float
    note: str = ""


def html_report(report: HtmlReport) -> str:
    """Return the page."""
    templates = files(__package__)
    script = templates.joinpath("report.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(templates.joinpath("report.html.j2").read_text(encoding="utf-8"))
    comparisons = report.comparisons
    charts = charts_of(report)
    original = comparisons[0].original
    return template.render(
        title=f"{comparisons[0].quantized.name if len(comparisons) == 1 else 'Quantized models'} vs {original.name}",
        headline=headline(comparisons),
        comparisons=comparisons,
        original=original,
        original_perplexity=perplexity(comparisons[0].summary.original_perplexity),
        columns=_COLUMNS,
        rows=[(each.quantized.name, series_color(index), _cells(each)) for index, each in enumerate(comparisons)],
        verdict=verdict,
        percentiles=[(each.quantized.name, _percentiles(each)) for each in comparisons],
        **{kind: _rendered(charts, kind) for kind in ("charts", "maps", "drifts", "needles")},
        **_extras(report.extras),
        paired=report.paired,
        confidence=f"{100 * CONFIDENCE:.0f} %",
        methods=report.methods,
        details=_details(report.details),
        nats=nats,
        choice=_choice,
        version=__version__,
        # Our own text; everything else is escaped, that of drawings where they are made.
        style=page_style(),
        script=Markup(script),
        script_hash=script_hash(script),
    )


def script_hash(script: str) -> str:
    """Return what a page's content security policy says of its one script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def page_style() -> Markup:
    """Return the style sheet of pages and their drawings."""
    return Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8") + STYLE)


def charts_of(report: HtmlReport) -> dict[str, Drawing]:
    """Return the drawings by name; those of single models have their number in it."""
    comparisons = report.comparisons
    drawings: dict[str, Drawing | None] = {
        "histogram": histogram_chart(comparisons),
        "positions": positions_chart(comparisons),
        "size": size_chart(comparisons),
        "kinds": kinds_chart(comparisons),
        "drift": drift_chart(comparisons, first_token=False),
        "drift-first-token": drift_chart(comparisons, first_token=True),
    }
    for number, (comparison, costs) in enumerate(zip(comparisons, report.costs, strict=False), start=1):
        drawings[f"map-damage-{number}"] = damage_map(costs, comparison.quantized.name)
        drawings[f"map-bits-{number}"] = bits_map(costs, comparison.quantized.name)
    for number, model in enumerate(report.extras.needle.models if report.extras.needle else ()):
        drawings[f"needle-{number}"] = needle_map(model)
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _rendered(charts: Mapping[str, Drawing], kind: str) -> list[Markup]:
    kinds = {"map": "maps", "drift": "drifts", "needle": "needles"}
    return [Markup(each.render()) for name, each in charts.items() if kinds.get(name.split("-")[0], "charts") == kind]


def _extras(extras: Extras) -> dict[str, Any]:
    tasks, needle = extras.tasks, extras.needle
    return {
        "tasks": tasks
        and {
            "head": task_head(tasks),
            "rows": task_rows(tasks, [score for score in tasks.scores if score.part_of is None]),
            "parts": task_rows(tasks, [score for score in tasks.scores if score.part_of is not None]),
            "note": TASKS_NOTE,
            "methods": task_methods(tasks),
        },
        "needle": needle and {"rows": needle_rows(needle), "note": NEEDLE_NOTE, "methods": needle_methods(needle)},
    }


_COLUMNS = (
    "KL, nats/token",
    "top-1 agreement",
    "size",
    "top-5 agreement",
    "perplexity",
    "Δp, RMS",
)


def _cells(comparison: Comparison) -> list[_Cell]:
    model, summary = comparison.quantized, comparison.summary
    rms, change = summary.probability_change_rms, summary.probability_change
    size = _Cell("unknown", -1.0)
    if model.stored_bytes is not None and model.bits_per_parameter is not None:
        note = f"{model.bits_per_parameter:.3f} bits/parameter"
        size = _Cell(f"{model.stored_bytes / 1e6:.1f} MB", model.stored_bytes, note)
    return [
        _with_interval(nats(summary.kl_nats), summary.kl_nats, comparison.rows),
        _Cell(percent(summary.top1_agreement), summary.top1_agreement.value),
        size,
        _Cell(percent(summary.top5_agreement), summary.top5_agreement.value),
        _Cell(
            perplexity(summary.quantized_perplexity),
            summary.quantized_perplexity.value,
            perplexity(summary.perplexity_difference, "+"),
        ),
        _Cell(percent(rms), rms.value, f"mean {percent(Estimate(change.value, None), '+')}"),
    ]


def _with_interval(text: str, value: Estimate, rows: int) -> _Cell:
    interval = confidence_interval(value, rows)
    # With very few rows the interval reaches below zero, where no divergence lies.
    note = "" if interval is None else f"{max(0.0, interval.low):.3g} to {interval.high:.3g}"
    return _Cell(text, value.value, note)


def _percentiles(comparison: Comparison) -> list[str]:
    summary = comparison.summary
    values = (
        summary.kl_median_nats,
        summary.kl_p90_nats,
        summary.kl_p99_nats,
        summary.kl_p999_nats,
        summary.kl_max_nats,
        comparison.floor_nats,
        comparison.bfloat16_floor_nats,
    )
    return ["unknown" if value is None else nats(value) for value in values]


def _choice(token: Choice) -> dict[str, Any]:
    return {
        "text": f"#{token.id}" if token.text is None else visible(token.text),
        "percent": f"{100 * token.probability:.1f}",
        "id": token.id,
    }


def _details(details: Mapping[str, Mapping[str, str | float]] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    return [
        (title, [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in section.items()])
        for title, section in (details or {}).items()
    ]
