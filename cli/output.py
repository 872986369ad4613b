"""The way to the terminal: every line that a command prints goes through here, and how far it has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from ..errors import printable

__all__ = ["progress_bar", "say"]

_LINE_SECONDS = 30.0
"""Time between two lines about a step, where they go to a file."""

_MOST_LABEL_CHARACTERS = 60


def say(line: str, *, err: bool = False) -> None:
    """Print one line; what strangers put into it is only shown.

    Args:
        line: The line: a line break in it does not break it.
        err: Whether it goes to stderr, with warnings and progress, and not to the results.
    """
    click.echo(printable(line), err=err)


def progress_bar(items: Sequence[Any], step: str) -> Iterable[Any]:
    """Show on stderr how far a step is: a bar in a terminal, otherwise a line every half minute; see ``Progress``."""
    from tqdm import tqdm

    label = printable(step, _MOST_LABEL_CHARACTERS)
    if not sys.stderr.isatty():
        return _progress_lines(items, label)
    bar: Iterable[Any] = tqdm(items, desc=label, unit="block", dynamic_ncols=True)
    return bar


def _progress_lines(items: Sequence[Any], label: str) -> Iterator[Any]:
    from tqdm import tqdm

    first = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= _LINE_SECONDS:
            left = (now - first) / done * (len(items) - done)
            say(f"{label}: {done} of {len(items)}, {tqdm.format_interval(left)} left", err=True)
            last = now
        yield item
    say(f"{label}: {len(items)} in {tqdm.format_interval(time.monotonic() - first)}", err=True)
