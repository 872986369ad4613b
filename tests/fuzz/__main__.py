"""Tries mutants on all readers and prints what became of them: ``python -m tests.fuzz --mutants 500``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from .branches import measured_branches
from .pool import BAD, CLASSES, Outcome
from .readers import READERS, fuzz
from .seeds import build_seeds

_CHUNK = 1000
"""Most mutants between two lines of the file of counts."""

_SUMS = ("mutants", "parse", *CLASSES, "seconds")


@click.command()
@click.option("--readers", default=",".join(READERS), help="Names, separated by commas.")
@click.option("--mutants", type=int, default=10, help="Mutants of the slowest readers; each gets its share.")
@click.option("--rounds", type=int, default=1, help="How often all of that.")
@click.option("--seed", type=int, default=0, help="The same seed makes the same mutants.")
@click.option("--workers", type=int, default=2, help="Processes at a time.")
@click.option("--counts", type=click.Path(path_type=Path), help="File of counts to add to: more mutants, not the same.")
@click.option("--coverage", is_flag=True, help="Measure which branches of the readers' modules were taken.")
def main(readers: str, mutants: int, rounds: int, seed: int, workers: int, counts: Path | None, coverage: bool) -> None:
    """Print a table of readers by classes, then every place that a mutant broke; exit with 1 if any did."""
    names = [name for name in readers.split(",") if name]
    lines = [json.loads(line) for line in counts.read_text().splitlines()] if counts and counts.exists() else []
    bad: list[tuple[str, Outcome]] = []
    memory = Path("/dev/shm")  # where nothing waits for a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        seeds, scratch = Path(folder) / "seeds", Path(folder) / "scratch"
        scratch.mkdir()
        build_seeds(seeds, {READERS[name].seeds for name in names})
        with measured_branches({name: READERS[name].modules for name in names} if coverage else {}):
            for name in names * rounds:
                done = max((each["first"] + each["mutants"] for each in lines if each["reader"] == name), default=0)
                end = done + mutants * READERS[name].share
                for first in range(done, end, _CHUNK):
                    started = time.monotonic()
                    size = min(_CHUNK, end - first)
                    tried = fuzz(name, seeds, scratch, mutants=size, seed=seed, first=first, workers=workers)
                    bad += [(name, outcome) for outcome in tried if outcome.kind in BAD]
                    lines.append(
                        {
                            **{"reader": name, "seed": seed, "first": first, "mutants": size},
                            **Counter(outcome.kind for outcome in tried),
                            "bad": [f"{each.index} {each.kind}: {each.detail}" for each in tried if each.kind in BAD],
                            "parse": sum(outcome.parses for outcome in tried),
                            "seconds": round(time.monotonic() - started, 1),
                        }
                    )
                    click.echo(f"{name} {first}: {lines[-1]['seconds']} s", err=True)
                    if counts is not None:
                        with counts.open("a") as file:
                            file.write(json.dumps(lines[-1]) + "\n")
    _print_table(lines)
    _print_places(bad)
    sys.exit(1 if bad else 0)


def _print_table(lines: Sequence[dict[str, int]]) -> None:
    # "parse" is how many the first parser of any reader takes.
    click.echo(f"{'reader':12}" + "".join(f"{name:>11}" for name in _SUMS))
    names = [name for name in READERS if any(line["reader"] == name for line in lines)]
    for name in [*names, "all"]:
        sums = [sum(line.get(key, 0) for line in lines if name in (line["reader"], "all")) for key in _SUMS]
        click.echo(f"{name:12}" + "".join(f"{round(number):11}" for number in sums))


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
