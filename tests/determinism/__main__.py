"""Prints what 2 and 3 threads change in measurement and plans of a model: ``python -m tests.determinism MODEL``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from bpwise.convert.registry import formats

from .threads import differences, plan_differences

_COMMAND = "from bpwise.cli import main; main()"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(model: Path, options: Sequence[str]) -> None:
    """Measure MODEL with 1, 2 and 3 threads, by the OPTIONS of ``bpwise measure``, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        files = {threads: Path(folder, f"{threads}.safetensors") for threads in (1, 2, 3)}
        for threads, file in files.items():
            arguments = ("measure", str(model), "-o", str(file), "--device", "cpu", *options)
            variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run([sys.executable, "-c", _COMMAND, *arguments], env=variables, check=True)
        compare(files)


def compare(files: dict[int, Path]) -> None:
    """Print a line for each pair of a measurement and that of one thread, and one for the plans of each format."""
    for threads in (2, 3):
        found = differences(files[1], files[threads])
        click.echo(
            f"1 and {threads} threads: {found.changed_bytes} of {found.all_bytes} bytes, {found.integers} places in "
            f"orders of rows; damages by {found.damage:.1e} at most, others by {found.others:.1e}"
        )
        for name in formats():
            plans = plan_differences(files[1], files[threads], name)
            click.echo(
                f"  {name}: {plans.plans} of {plans.all_plans} plans differ, in {plans.decisions} of "
                f"{plans.all_decisions} decisions"
            )


if __name__ == "__main__":
    main()
