"""The command group: user errors become one sentence and exit code 1, signals 128 + number, warnings a line."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import click

from ..errors import BpwiseError, BpwiseWarning, reason
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


_LOWERED = ("--rows", "--row-tokens", "--eval-rows", "--eval-row-tokens")
"""Options that say how much is in memory at once."""


class _Command(click.Command):
    """Refuses options that have no effect beside the others before it does anything; says what to do without memory."""

    def invoke(self, ctx: click.Context) -> Any:
        refuse_without_effect(ctx)
        try:
            return super().invoke(ctx)
        except (MemoryError, RuntimeError) as error:
            if not _is_short_of_memory(error):
                raise
            raise BpwiseError(_memory_sentence(self, error)) from error


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


def _is_short_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or torch is None:
        return isinstance(error, MemoryError)
    # Of the CPU's memory torch says so in words alone.
    return isinstance(error, torch.OutOfMemoryError) or (
        type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    )


def _memory_sentence(command: click.Command, error: BaseException) -> str:
    offered = {option for parameter in command.params for option in parameter.opts}
    ways = [f"Lower {' or '.join(lowered)}"] if (lowered := [each for each in _LOWERED if each in offered]) else []
    ways += ["name an --offload-dir"] if "--offload-dir" in offered else []
    ways += ["close other programs"]
    advice = ", or ".join(ways)
    return (
        f"memory: there is not enough ({reason(error)}). {advice[0].upper()}{advice[1:]}, and run again: what is "
        "finished is not done again."
    )


def _show_warning(others: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    if issubclass(category, BpwiseWarning):
        say(f"warning     {message}", err=True)
    else:
        others(message, category, *where)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="bpwise")
def cli() -> None:
    """Measure how much each bit matters to a language model, then quantize it to exactly the size you ask for."""


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
