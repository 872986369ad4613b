"""Plans of all sizes as one HTML page: which to take for how much memory, and what every layer would get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from markupsafe import Markup

from ...checkpoint.files.atomic import write_text
from ...convert.format import Format
from ...convert.options import FormatOptions, options_of
from ...convert.registry import format_named, formats
from ...errors import ConfigError
from ...eval.metrics.numbers import nats
from ...eval.report.drawings.charts import planned_chart
from ...eval.report.drawings.maps import bits_map
from ...eval.report.html import render_page
from ...eval.report.verdict import KNOWN_NOTE, known_like, words_for
from ...measure.measurement import Measurement
from ...tables import Table, bytes_text, bytes_unit
from .plans import PlanPoint, plan_points

__all__ = ["is_plan_page", "plan_page", "write_plan_page"]

_OWN = (b'<meta name="generator" content="bpwise ', b"<title>Plans for ")
_HEAD_BYTES = 4096

_CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
_LARGE_GPU = 1 << 50
"""Room for anything."""


def is_plan_page(path: Path) -> bool:
    """Return whether a file is a page that ``write_plan_page`` made."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return all(sign in head for sign in _OWN)


def plan_page(
    points: Mapping[str, Sequence[PlanPoint]],
    *,
    model: str,
    facts: Mapping[str, str],
    measurement: str = "M",
    contexts: Mapping[str, Mapping[int, int]] | None = None,
) -> str:
    """Return the page.

    Args:
        points: Plans by name of the format, the smallest first; formats without any are named as not measured.
        model: Name of the model.
        facts: Names and values: what was measured, and how.
        measurement: Name of the measurement's file, for commands.
        contexts: By name of the format, what its reader takes on a GPU beside the tensors, in bytes, by the tokens of
            the context.
    """
    shown = {format_named(name): each for name, each in points.items() if each}
    found = {each.title: points for each, points in shown.items()}
    unit, unit_bytes = bytes_unit(max(point.plan.stored_bytes for points in found.values() for point in points))
    return render_page(
        __package__,
        "plan",
        model=model,
        facts=Table.of_facts(facts.items()),
        missing=[format_named(name).title for name, each in points.items() if not each],
        known_note=KNOWN_NOTE,
        unit=unit,
        unit_bytes=unit_bytes,
        outputs={each.title: [_output(each, model, point) for point in points] for each, points in shown.items()},
        original=quote(model),
        measurement=quote(measurement),
        contexts={each.title: (contexts or {}).get(each.name, {}) for each in shown},
        tables={each.title: _table(each, points) for each, points in shown.items()},
        chart=Markup(planned_chart({name: _curve(points) for name, points in found.items()}).render()),
        maps={name: Markup(_map(name, points[-1])) for name, points in found.items()},
        data={name: [_data(point) for point in points] for name, points in found.items()},
    )


def write_plan_page(
    measurement: Measurement, path: Path, *, model: str, options: Mapping[str, FormatOptions] | None = None
) -> None:
    """Make the plans of all sizes that a measurement allows, in all formats, and write their page.

    Args:
        measurement: The measurement.
        path: File to make or replace.
        model: Name of the measurement's file without its ending; what to call the model if the file does not tell.
        options: Options by name of a format; those of others are the default.

    Raises:
        ConfigError: Options match nothing or contradict each other, or no format was measured.
    """
    known = measurement.provenance
    given = {name: each.Options() for name, each in formats().items()} | dict(options or {})
    facts = {
        "calibration text": str(known.get("calibration_text", "unknown")),
        "calibration tokens": str(measurement.tokens.size),
        **{key: value for each in formats().values() for key, value in _options(each, given[each.name], measurement)},
        "measured by": f"bpwise {known.get('bpwise', '')}",
        "measurement": measurement.fingerprint,
    }
    points = {name: plan_points(each, measurement, given[name]) for name, each in formats().items()}
    if not any(points.values()):
        raise ConfigError(
            f"measurement: no plans can be made. Got curves of {', '.join(measurement.curves) or 'no format'}."
            f" Expected curves of {' or '.join(formats())}. Measure again."
        )
    page = plan_page(
        points,
        model=model,
        facts=facts,
        measurement=f"{model}.safetensors",
        contexts={name: _contexts(each, measurement, given[name]) for name, each in formats().items() if points[name]},
    )
    write_text(path, page)


def _contexts(format_: Format, measurement: Measurement, options: FormatOptions) -> dict[int, int]:
    longest = measurement.config.get("max_position_embeddings")
    if not isinstance(longest, int):
        return {}
    lengths = [length for length in _CONTEXTS if length < longest] + [min(longest, _CONTEXTS[-1])]
    try:
        return {length: format_.beside_in_vram(measurement, options, _LARGE_GPU, length) for length in lengths}
    except (ConfigError, KeyError):  # no reader, or none for a model of this shape
        return {}


def _output(format_: Format, model: str, point: PlanPoint) -> str:
    return quote(f"{model.rpartition('/')[2]}-{point.bpw:g}bpw{format_.suffix or f'-{format_.name}'}")


def _options(format_: Format, options: FormatOptions, measurement: Measurement) -> Iterator[tuple[str, str]]:
    # What plans of a format depend on beside the size: what was measured for it, and what it was asked.
    if format_.name not in measurement.curves:
        return
    options = format_.completed(options, sized=True)
    asked = {each.name: getattr(options, field) for field, each in options_of(format_.Options, "plan").items()}
    for name, value in {**measurement.curves[format_.name].header, **asked}.items():
        if isinstance(value, int | str):
            yield f"{name.replace('_', ' ')} in {format_.title}", str(value)


def _size(point: PlanPoint) -> str:
    return bytes_text(point.plan.stored_bytes)


def _table(format_: Format, points: Sequence[PlanPoint]) -> Table:
    rows = [(f"{point.bpw} bpw", _size(point), nats(point.damage_nats), _words(point)) for point in points]
    head = (f"bits per weight {format_.bpw_means}", "size of the tensors", "predicted damage, nats/token", "in words")
    return Table.of(head, rows)


def _words(point: PlanPoint) -> str:
    like = known_like(point.damage_nats)
    return words_for(point.damage_nats) + (f"; about llama.cpp's {like}" if like else "")


def _curve(points: Sequence[PlanPoint]) -> list[tuple[int, float, str]]:
    return [
        (point.plan.stored_bytes, point.damage_nats, f"nats at {point.bpw:g} bpw, {_size(point)}") for point in points
    ]


def _map(name: str, point: PlanPoint) -> str:
    drawing = bits_map(point.plan.costs(), name)
    assert drawing is not None, "a plan has linears"
    return drawing.render()


def _data(point: PlanPoint) -> dict[str, Any]:
    # What the page's script shows of a plan; bits in the order of the map's cells, which is that of the linears.
    return {
        "bpw": point.bpw,
        "stored_bytes": point.plan.stored_bytes,
        "vram_bytes": point.plan.vram_bytes,
        "shares": ", ".join(f"{name} {100 * share:.1f} %" for name, share in point.plan.shares().items()),
        "names": [cost.name for cost in point.plan.costs()],
        "bits": [round(cost.bpw, 3) for cost in point.plan.costs()],
        "damage": nats(point.damage_nats),
        "words": _words(point),
    }
