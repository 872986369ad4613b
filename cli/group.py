"""The command group: errors that a user can cause become one sentence and exit code 1, warnings a line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from ..errors import BpwiseError, BpwiseWarning
from ..version import __version__
from .allocator import give_back_large_blocks
from .effects import refuse_without_effect

__all__ = ["cli", "main"]


class _Command(click.Command):
    """Refuses options that have no effect beside the others before it does anything."""

    def invoke(self, ctx: click.Context) -> Any:
        refuse_without_effect(ctx)
        return super().invoke(ctx)


class _Group(click.Group):
    """Turns the errors that a user can cause into one sentence and exit code 1."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", BpwiseWarning)
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                return super().invoke(ctx)
        except BpwiseError as error:
            raise click.ClickException(str(error)) from error


def _show_warning(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    if issubclass(category, BpwiseWarning):
        click.echo(f"warning     {message}", err=True)
    else:
        others(message, category, *where)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="bpwise")
def cli() -> None:
    """Measure how much each bit matters to a language model, then quantize it to exactly the size you ask for."""


def main() -> None:
    """Entry point of the ``bpwise`` command."""
    give_back_large_blocks()
    cli()
