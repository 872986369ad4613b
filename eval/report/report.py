"""Comparisons as reports: for people (HTML, Markdown, terminal) and for programs (JSON, CSV)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import atomic_file, try_file, write_json, write_text
from ...checkpoint.files.operations import delete, sync, write
from ...checkpoint.files.partials import clear_partials
from ...checkpoint.files.paths import locked, refuse_foreign, try_directory
from ...checkpoint.files.schemas import check_schema, read_json
from ...convert.names import REPORT_FILE
from ...errors import FormatError
from ...tables import Table
from ...version import __version__
from ..comparison import Comparison
from .content import REPORT_VERSION, Report
from .drawings.png import png_bytes
from .extras import NO_EXTRAS, Extras, agreement_records, extras_records
from .html import charts_of, html_report
from .markdown import markdown_report
from .tables import Details, domains_records, models_records

__all__ = [
    "CSV_NAME",
    "HTML_NAME",
    "JSON_NAME",
    "MARKDOWN_NAME",
    "PLOTS_NAME",
    "ReportFiles",
    "carried_over",
    "clear_report",
    "earlier_details",
    "read_comparison",
    "report_names",
    "try_report",
    "write_report",
]

JSON_NAME = REPORT_FILE
MARKDOWN_NAME = "report.md"
HTML_NAME = "report.html"
CSV_NAME = "report.csv"
PLOTS_NAME = "report-plots"

_OURS = {
    ".json": re.compile(rb'\A\{\s*"bpwise_(report|series)"'),
    ".csv": re.compile(
        rb"\Amodel,(stored_bytes,bits_per_parameter|task,part_of|length,depth|domain,documents|prompts,most_tokens),"
    ),
    # A row of every report on comparisons, and the title of one on a series.
    ".md": re.compile(rb"^\| bpwise \| |\A# .* (?:bitrates|outputs), from one measurement$", re.MULTILINE),
    ".html": re.compile(re.escape(b'<meta name="generator" content="bpwise ')),
}
"""What tells files of a report from those of others, by their suffix."""

_MOST_BYTES = 1 << 20

_OF_EVALUATION = "evaluate"
"""Entry of a section on steps that belongs to the evaluation itself, and not to how the model was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where a report is.

    Attributes:
        json: Everything that was measured.
        csv: The table of models.
        markdown: The summary.
        html: The page.
        extras: Tables of domains, answers, benchmarks and needles as CSV; empty if they were not measured.
        plots: The drawings as SVG and PNG files; empty if they were not asked for.
    """

    json: Path
    csv: Path
    markdown: Path
    html: Path
    extras: tuple[Path, ...]
    plots: tuple[Path, ...]


def write_report(report: Report, directory: Path, *, prefix: str = "", plots: Sequence[str] = ()) -> ReportFiles:
    """Write a report into a directory, each file atomically.

    Args:
        report: What it tells.
        directory: Made if it is missing; reports of the same names in it are replaced.
        prefix: Put before all names, to tell reports of models apart that lie in one directory.
        plots: Formats that the drawings are written in too: ``svg``, ``png``.

    Raises:
        ConfigError: The comparisons are of different originals or texts.
        BpwiseError: PNG files are asked for, and their renderer is not installed.
        NumericalError: A number of the details is NaN or infinite.
        WorkDirectoryError: A file cannot be written.
    """
    path = {
        name: Path(directory) / f"{prefix}{name}"
        for name in (JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME, PLOTS_NAME)
    }
    with _locked(Path(directory), prefix):
        files = _written(report, path, prefix, plots)
    sync(Path(directory))  # that the lock is gone: a run that finds all of it finished looks no further
    return files


def clear_report(directory: Path, prefix: str) -> None:
    """Delete what killed runs have left beside a report.

    Args:
        directory: Where the report is.
        prefix: As of ``write_report``.

    Raises:
        WorkDirectoryError: The directory cannot be written.
    """
    clear_partials(directory, report_names(prefix))
    if _lock_file(directory, prefix).exists():
        with _locked(directory, prefix):  # whoever lets go of it deletes it
            pass


def _lock_file(directory: Path, prefix: str) -> Path:
    return directory / f".{prefix}report.lock"


def _locked(directory: Path, prefix: str) -> AbstractContextManager[None]:
    # Of two evaluations that end together one waits: no files of both stand side by side.
    report = directory / f"{prefix}{JSON_NAME}"
    return locked(_lock_file(directory, prefix), report, "name another --output", wait=True)


def _written(report: Report, path: Mapping[str, Path], prefix: str, plots: Sequence[str]) -> ReportFiles:
    write_json(path[JSON_NAME], report.to_dict())
    _write_csv(path[CSV_NAME], models_records(report.comparisons))
    write_text(path[MARKDOWN_NAME], markdown_report(report))
    write_text(path[HTML_NAME], html_report(report))
    tables = []
    for name, records in _side_tables(report.comparisons, report.extras).items():
        table = path[JSON_NAME].with_name(f"{prefix}report.{name}.csv")
        if records:
            _write_csv(table, records)
            tables.append(table)
        else:
            delete(table, missing_ok=True)  # an earlier report's
    return ReportFiles(
        json=path[JSON_NAME],
        csv=path[CSV_NAME],
        markdown=path[MARKDOWN_NAME],
        html=path[HTML_NAME],
        extras=tuple(tables),
        plots=_write_plots(report, path[PLOTS_NAME], plots),
    )


def _side_tables(comparisons: Sequence[Comparison], extras: Extras) -> dict[str, list[dict[str, Any]]]:
    # By the names of their files; without records where they were not measured.
    own = {"domains": domains_records(comparisons), "answers": agreement_records(comparisons)}
    return {**own, **extras_records(extras)}


def report_names(prefix: str = "") -> tuple[str, ...]:
    """Return the names of all files that a report may have, its drawings apart."""
    tables = (f"report.{name}.csv" for name in _side_tables((), NO_EXTRAS))
    return tuple(f"{prefix}{name}" for name in (JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME, *tables))


def try_report(directory: Path, *, prefix: str = "", plots: Sequence[str] = ()) -> None:
    """Refuse a place that a report cannot be written to, or where it would replace other files, before the long work.

    Args:
        directory: As in ``write_report``.
        prefix: As in ``write_report``.
        plots: As in ``write_report``.

    Raises:
        WorkDirectoryError: A file of it cannot be made, or is of something else.
    """
    for name in report_names(prefix):
        refuse_foreign(directory / name, _is_report, "a report", advice="move it away")
        try_file(directory / name)
    if plots:
        try_directory(directory / f"{prefix}{PLOTS_NAME}")


def _is_report(path: Path) -> bool:
    # Each file is asked itself: one of ours does not make those of others beside it ours. One that was cut is ours.
    try:
        with path.open("rb") as file:
            return _OURS[path.suffix].search(file.read(_MOST_BYTES)) is not None
    except OSError:
        return False


def earlier_details(directory: Path, comparison: Comparison, *, prefix: str = "") -> Details:
    """Return the further sections of the report that is there; none if it is of another model, or cannot be read.

    Args:
        directory: As in ``write_report``.
        comparison: What was measured of the model now.
        prefix: As in ``write_report``.
    """
    try:
        report = read_json(directory / f"{prefix}{JSON_NAME}", FormatError)
        model = report["comparison"]["quantized"]
        same = (model["name"], model["stored_bytes"]) == (comparison.quantized.name, comparison.quantized.stored_bytes)
        sections = {title: dict(section) for title, section in report["details"].items()} if same else {}
    except (FormatError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    for section in sections.values():
        section.pop(_OF_EVALUATION, None)
    return sections


def read_comparison(directory: Path, *, prefix: str = "") -> Comparison | None:
    """Return the comparison of a report on one model; None if there is no whole one of this version.

    Args:
        directory: As in ``write_report``.
        prefix: As in ``write_report``.
    """
    path = directory / f"{prefix}{JSON_NAME}"
    if not all((directory / f"{prefix}{name}").is_file() for name in (CSV_NAME, MARKDOWN_NAME, HTML_NAME)):
        return None
    try:
        report = read_json(path, FormatError)
        if report.get("bpwise_report") != REPORT_VERSION or report.get("bpwise") != __version__:
            return None
        return check_schema(report.get("comparison"), Comparison, FormatError, where=f"{path}: comparison")
    except FormatError:
        return None


def carried_over(details: Details, earlier: Details) -> Details:
    """Return sections with what an earlier report told of the same model's making, which is not done again.

    Args:
        details: Sections of now.
        earlier: Those of the earlier report; where both have an entry, it is theirs that tells of the making.
    """
    made = {title: {**section, **earlier.get(title, {})} for title, section in details.items()}
    return {**made, **{title: section for title, section in earlier.items() if title not in made}}


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, Table.of_records(records).to_csv())


def _write_plots(report: Report, folder: Path, formats: Sequence[str]) -> tuple[Path, ...]:
    paths = []
    for name, drawing in charts_of(report).items() if formats else ():
        for form in formats:
            paths.append(folder / f"{name}.{form}")
            if form == "png":
                with atomic_file(paths[-1]) as temporary:
                    write(temporary, png_bytes(drawing))
            else:
                write_text(paths[-1], drawing.render(standalone=True) + "\n")
    return tuple(paths)
