"""Comparisons as one HTML page that needs nothing else: no network, no scripts or fonts from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...version import __version__
from ..metrics.estimate import CONFIDENCE
from ..metrics.numbers import nats
from ..metrics.profile import Choice
from .content import Report
from .drawings.charts import SizedModel, drift_chart, histogram_chart, kinds_chart, positions_chart, size_chart
from .drawings.maps import bits_map, damage_map, needle_map
from .drawings.svg import STYLE, Drawing, distinct_names, visible
from .extras import (
    AGREEMENT_NOTE,
    ANSWERS_NOTE,
    NEEDLE_NOTE,
    TASKS_NOTE,
    Extras,
    agreement_table,
    answer_parts,
    needle_methods,
    needle_table,
    prompt_of,
    task_methods,
    tasks_table,
)
from .tables import (
    DOMAINS_NOTE,
    detail_tables,
    domains_table,
    methods_table,
    models_table,
    paired_table,
    percentiles_table,
)
from .verdict import GOOD_ENOUGH_NATS, KNOWN_NOTE, headline, known_table, meanings_table

__all__ = ["charts_of", "html_report", "render_page"]


def html_report(report: Report) -> str:
    """Return the page."""
    comparisons, charts = report.comparisons, charts_of(report)
    paired = report.paired
    return render_page(
        __package__,
        "report",
        title=report.title,
        headline=headline(comparisons),
        comparisons=comparisons,
        models=models_table(comparisons, report.broken),
        percentiles=percentiles_table(comparisons),
        paired=paired_table(paired) if paired else None,
        meanings=meanings_table(),
        known=known_table(),
        known_note=KNOWN_NOTE,
        good_enough=f"{GOOD_ENOUGH_NATS:g}",
        prompt=prompt_of(comparisons),
        answers=answer_parts(comparisons),
        answers_note=ANSWERS_NOTE,
        agreement=agreement_table(comparisons),
        agreement_note=AGREEMENT_NOTE,
        domains=domains_table(comparisons),
        domains_note=DOMAINS_NOTE,
        **{kind: _rendered(charts, kind) for kind in ("sizes", "charts", "maps", "drifts", "needles")},
        **_extras(report.extras),
        confidence=f"{100 * CONFIDENCE:.0f} %",
        methods=methods_table(comparisons, report.made),
        made=report.made,
        details=detail_tables(report.details),
        nats=nats,
        choice=_choice,
    )


def render_page(package: str, name: str, **content: Any) -> str:
    """Return a page of a template; what it shows is escaped, and it may use its own script and style alone.

    Args:
        package: Package that holds ``NAME.html.j2``, ``NAME.js`` and, for a page with a style of its own, ``NAME.css``.
        name: The template's name.
        **content: What the template asks for.
    """
    folder = files(package)
    script = folder.joinpath(f"{name}.js").read_text(encoding="utf-8")
    own = folder.joinpath(f"{name}.css")
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8") + STYLE
    style += own.read_text(encoding="utf-8") if own.is_file() else ""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(folder.joinpath(f"{name}.html.j2").read_text(encoding="utf-8"))
    return template.render(
        version=__version__,
        # Our own text; everything else is escaped, that of tables and drawings where they are made.
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        **content,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def charts_of(report: Report) -> dict[str, Drawing]:
    """Return the drawings by name; those of single models have their number in it."""
    comparisons = report.comparisons
    sized = [SizedModel(each.quantized.name, each.quantized.stored_bytes, each.summary.kl_nats) for each in comparisons]
    drawings: dict[str, Drawing | None] = {
        "histogram": histogram_chart(comparisons),
        "positions": positions_chart(comparisons),
        "size": size_chart(sized),
        "kinds": kinds_chart(comparisons),
        "drift": drift_chart(comparisons, first_token=False),
        "drift-first-token": drift_chart(comparisons, first_token=True),
    }
    names = distinct_names([each.quantized.name for each in comparisons]) if len(comparisons) > 1 else [""]
    for number, (name, costs) in enumerate(zip(names, report.costs, strict=False), start=1):
        drawings[f"map-damage-{number}"] = damage_map(costs, name)
        drawings[f"map-bits-{number}"] = bits_map(costs, name)
    for number, model in enumerate(report.extras.needle.models if report.extras.needle else ()):
        drawings[f"needle-{number}"] = needle_map(model)
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def _rendered(charts: Mapping[str, Drawing], kind: str) -> list[Markup]:
    kinds = {"size": "sizes", "map": "maps", "drift": "drifts", "needle": "needles"}
    return [Markup(each.render()) for name, each in charts.items() if kinds.get(name.split("-")[0], "charts") == kind]


def _extras(extras: Extras) -> dict[str, Any]:
    tasks, needle = extras.tasks, extras.needle
    return {
        "tasks": tasks
        and {
            "scores": tasks_table(tasks),
            "parts": tasks_table(tasks, parts=True),
            "note": TASKS_NOTE,
            "methods": task_methods(tasks),
        },
        "needle": needle and {"lengths": needle_table(needle), "note": NEEDLE_NOTE, "methods": needle_methods(needle)},
    }


def _choice(token: Choice) -> dict[str, Any]:
    return {
        "text": f"#{token.id}" if token.text is None else visible(token.text),
        "percent": f"{100 * token.probability:.1f}",
        "id": token.id,
    }
