"""Which branches of the modules that read were taken, by coverage.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import bpwise
import click

__all__ = ["measured_branches"]

_ROOT = Path(bpwise.__file__).resolve().parent


@contextmanager
def measured_branches(modules: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Measure what happens inside, then print a line for each reader, and the lines whose branches were not taken.

    Args:
        modules: Of each reader, those whose branches count, as ``convert/registry``. Nothing is measured without any.
    """
    if not modules:
        yield
        return
    import coverage

    files = sorted({str(_ROOT / f"{module}.py") for each in modules.values() for module in each})
    with tempfile.TemporaryDirectory() as folder:
        settings = {"data_file": f"{folder}/data", "branch": True, "include": files, "config_file": False}
        measuring = coverage.Coverage(data_suffix=True, **settings)
        measuring.start()
        try:
            yield
        finally:
            measuring.stop()
            measuring.save()
        combined = coverage.Coverage(**settings)
        combined.combine([folder])
        combined.json_report(outfile=f"{folder}/report.json")
        report = json.loads(Path(f"{folder}/report.json").read_text())
    found = {str(Path(path).resolve().relative_to(_ROOT))[:-3]: each for path, each in report["files"].items()}
    for reader, names in modules.items():
        sums = [found[name]["summary"] for name in names]
        taken, all_ = (sum(each[key] for each in sums) for key in ("covered_branches", "num_branches"))
        click.echo(f"{reader:12}{taken:6} of {all_:4} branches, {taken / max(1, all_):.1%}")
    for name, each in sorted(found.items()):
        missing = ", ".join(f"{start}->{max(0, end)}" for start, end in each["missing_branches"])
        if missing:
            click.echo(f"{name}: {missing}")
