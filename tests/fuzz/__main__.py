"""Tries mutants on all readers and prints what became of them: ``python -m tests.fuzz --mutants 500``."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from .pool import BAD, CLASSES, Outcome
from .readers import READERS, build_seeds, fuzz


@click.command()
@click.option("--readers", default=",".join(READERS), help="Names, separated by commas.")
@click.option("--mutants", type=int, default=500, help="Mutants of each reader.")
@click.option("--first", type=int, default=0, help="Number of the first mutant.")
@click.option("--seed", type=int, default=0, help="The same seed makes the same mutants.")
@click.option("--workers", type=int, default=2, help="Processes at a time.")
def main(readers: str, mutants: int, first: int, seed: int, workers: int) -> None:
    """Print a table of readers by classes, then every place that a mutant broke; exit with 1 if any did."""
    names = readers.split(",")
    bad: list[tuple[str, Outcome]] = []
    with tempfile.TemporaryDirectory() as folder:
        seeds, scratch = Path(folder) / "seeds", Path(folder) / "scratch"
        scratch.mkdir()
        build_seeds(seeds, names)
        click.echo(f"{'reader':12}" + "".join(f"{kind:>11}" for kind in (*CLASSES, "seconds")))
        for name in names:
            started = time.monotonic()
            outcomes = fuzz(name, seeds, scratch, mutants=mutants, seed=seed, first=first, workers=workers)
            counts = Counter(outcome.kind for outcome in outcomes)
            line = "".join(f"{counts[kind]:11}" for kind in CLASSES)
            click.echo(f"{name:12}{line}{time.monotonic() - started:11.0f}")
            bad += [(name, outcome) for outcome in outcomes if outcome.kind in BAD]
    _print_places(bad)
    sys.exit(1 if bad else 0)


def _print_places(bad: Sequence[tuple[str, Outcome]]) -> None:
    places: dict[tuple[str, str, str], list[Outcome]] = {}
    for name, outcome in bad:
        # Of what was raised the place and the type; of a message only the file that it is about.
        place = " ".join(outcome.detail.split()[: 1 if outcome.kind == "raw" else 3])
        places.setdefault((name, outcome.kind, place), []).append(outcome)
    for (name, kind, _), outcomes in sorted(places.items(), key=lambda item: (item[0][0], -len(item[1]))):
        first = outcomes[0]
        click.echo(f"{name} {kind} x{len(outcomes)}, first mutant {first.index}: {first.detail[:220]}")


if __name__ == "__main__":
    main()
