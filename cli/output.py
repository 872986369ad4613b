"""The way to the terminal: every line that a command prints goes through here."""

from __future__ import annotations

import click

from ..errors import printable

__all__ = ["say"]


def say(line: str, *, err: bool = False) -> None:
    """Print one line; what strangers put into it is only shown.

    Args:
        line: The line: a line break in it does not break it.
        err: Whether it goes to stderr, with warnings and progress, and not to the results.
    """
    click.echo(printable(line), err=err)
