"""The command group: user errors become one sentence and exit code 1, signals 128 + number, warnings a line."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import click

from ..errors import BpwiseError, BpwiseWarning
from ..version import __version__
from .allocator import give_back_large_blocks
from .effects import refuse_without_effect
from .output import say

__all__ = ["cli", "main"]


_STOPPING = ("SIGTERM", "SIGHUP")
"""Signals that end a run as Ctrl-C does: partial files are deleted, locks let go. Windows lacks the second."""


class _Stopped(KeyboardInterrupt):
    """A signal that asks the process to end: whatever cleans up after Ctrl-C does so after it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Command(click.Command):
    """Refuses options that have no effect beside the others before it does anything."""

    def invoke(self, ctx: click.Context) -> Any:
        refuse_without_effect(ctx)
        return super().invoke(ctx)


class _Group(click.Group):
    """Turns the errors that a user can cause into one sentence and exit code 1, and being stopped into 128 + signal."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", BpwiseWarning)
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                return super().invoke(ctx)
        except BpwiseError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, _Stopped) else int(signal.SIGINT)
            # Progress bars leave the cursor in their line. A terminal that was closed takes no more words.
            with suppress(OSError):
                say("", err=True)
                say(f"Stopped. {stop}".rstrip(), err=True)
            raise click.exceptions.Exit(128 + number) from stop


def _show_warning(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    if issubclass(category, BpwiseWarning):
        say(f"warning     {message}", err=True)
    else:
        others(message, category, *where)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="bpwise")
def cli() -> None:
    """Shrink a language model to exactly the size you want, and know what it cost."""


def main() -> None:
    """Entry point of the ``bpwise`` command."""
    give_back_large_blocks()
    for name in _STOPPING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _stop)
    cli()


def _stop(number: int, _frame: FrameType | None) -> None:
    for name in _STOPPING:  # a second one must not stop the cleaning up
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise _Stopped(number)
