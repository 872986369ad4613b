"""The command group: user errors become one sentence and exit code 1, signals 128 + number, warnings a line.

Also how a run is stopped, and how it waits for room on a disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..errors import BpwiseError, BpwiseWarning, DiskFullError, reason
from ..tables import listed
from ..version import __version__
from .allocator import give_back_large_blocks
from .effects import refuse_without_effect
from .format_options import owners
from .output import logged, say

__all__ = ["HELP", "WAIT_OPTION", "CommandHelp", "cli", "main"]

_SIZES = ("bpw", "max_size", "vram", "context", "size_of")
_CALIBRATION = (
    *("calibration", "column", "chat_template", "rows", "row_tokens", "seed", "damping", "moe_calibrate_all"),
    "equalize",
)
_MACHINE = ("device", "precision", "offload_dir", "work_dir", "wait_for_space")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandHelp:
    """What a command's help has beside its text.

    Attributes:
        sections: Headings of options, and the names of the parameters under each; formats' own have headings anyway.
        examples: Command lines.
    """

    sections: Mapping[str, Sequence[str]]
    examples: Sequence[str] = ()


HELP: Mapping[str, CommandHelp] = {
    "quantize": CommandHelp(
        sections={
            "Target": _SIZES,
            "Calibration": _CALIBRATION,
            "Evaluation": (
                *("eval_text", "eval_rows", "eval_row_tokens", "eval_domains"),
                *("no_eval", "force_eval_text", "no_cache"),
            ),
            "Machine": _MACHINE,
        },
        examples=(
            "bpwise quantize MODEL model.gguf --bpw 4.5",
            "bpwise quantize MODEL model.gguf --vram 8GB --context 32k",
            "bpwise quantize MODEL OUT --bpw 8,6,4.5 -m m.safetensors",
        ),
    ),
    "measure": CommandHelp(
        sections={"Calibration": _CALIBRATION, "Machine": _MACHINE},
        examples=(
            "bpwise measure MODEL -o m.safetensors",
            "bpwise measure ORG/NAME -o m.safetensors --formats gguf",
            "bpwise measure MODEL -o m.safetensors -c self=2,built-in,notes.txt",
        ),
    ),
    "plan": CommandHelp(sections={"Target": ("bpw", "max_size", "vram", "context")}),
    "eval": CommandHelp(
        sections={
            "Evaluation": (
                *("text", "column", "rows", "row_tokens", "seed", "dtype", "force_eval_text"),
                *("domains", "answers"),
            ),
            "Benchmarks": (
                *("tasks", "num_fewshot", "limit", "include_path", "batch_size", "apply_chat_template"),
                *("needle", "needle_samples"),
            ),
            "Engine": ("engine", "base", "llama_cpp"),
            "Machine": ("device", "offload_dir", "cache_dir", "no_cache"),
        },
        examples=(
            "bpwise eval ORIGINAL model.gguf",
            "bpwise eval ORG/NAME mine.gguf ORG/NAME-GGUF:Q4_K_M",
            "bpwise eval ORIGINAL OUT --tasks mmlu,gsm8k --limit 200",
        ),
    ),
}
"""By command; others have their options in one list."""

_NO_HELP = CommandHelp(sections={})

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end a run: partial files are deleted, locks let go. Windows lacks the third."""

_CLEANING_SECONDS = 5.0
"""Time for that; what a thread is at work on may take longer, and is made again by the next run."""

_SAME_SECONDS = 0.1
"""A signal so soon after the first is the same wish: `timeout` sends its own twice, a closed terminal two kinds."""

_CONTINUE = "Run the same command to continue."

_WAITS = "bpwise.wait_for_space"
_LOOK_SECONDS = 10.0
_RETRY_SECONDS = 600.0
"""Time after which a run tries again in any case: what a quota has left cannot be asked for."""

_SOME_BYTES = 1 << 20
"""Growth of the free space that is worth a try: other programs write a few bytes at any time."""

WAIT_OPTION = click.option(
    "--wait-for-space",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, _, value: ctx.meta.__setitem__(_WAITS, value),
    help="If a disk is full, wait for free space and resume instead of stopping.",
)


_said = threading.Event()
"""Set where the line about being stopped was printed."""


class _Stopped(KeyboardInterrupt):
    """A signal that asks the process to end: whatever cleans up after Ctrl-C does so after it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


_LOWERED = ("--rows", "--row-tokens", "--eval-rows", "--eval-row-tokens")
"""Options that say how much is in memory at once."""


_LEVEL = "bpwise.level"


def _level_option(*flags: str, level: int, help: str) -> click.Option:
    def chosen(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given and ctx.meta.setdefault(_LEVEL, level) != level:
            raise click.UsageError("--quiet and --verbose exclude each other. Leave one of them out.", ctx)

    return click.Option(flags, is_flag=True, expose_value=False, callback=chosen, help=help)


class _Command(click.Command):
    """Refuses options that have no effect beside the others, says what to do without memory, and waits for room.

    Its help has options under headings, and examples.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = str(self.name)
        sections = HELP.get(command, _NO_HELP).sections
        headings = {name: listed([each.title for each in declared]) for name, declared in owners(command).items()}
        order = ("Options", "Target", *headings.values(), *sections)
        headings |= {name: heading for heading, names in sections.items() for name in names}
        records: dict[str, list[tuple[str, str]]] = {heading: [] for heading in order}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records[headings.get(str(parameter.name), "Options")].append(record)
        for heading, each in records.items():
            if each:
                with formatter.section(heading):
                    formatter.write_dl(each)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        examples = HELP.get(str(self.name), _NO_HELP).examples
        if examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in examples))

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Take what ``click.Command`` takes, and add the options that every command has."""
        super().__init__(*arguments, **settings)
        self.params += [
            _level_option("-q", "--quiet", level=logging.WARNING, help="Print only warnings, errors and the result."),
            _level_option("-v", "--verbose", level=logging.DEBUG, help="Also print what each step reads and decides."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        refuse_without_effect(ctx)
        with logged(ctx.meta.get(_LEVEL, logging.INFO)):
            return self._run_with_room(ctx)

    def _run_with_room(self, ctx: click.Context) -> Any:
        if not ctx.meta.get(_WAITS):
            return self._run(ctx)
        said = ""
        while True:
            try:
                return self._run(ctx)
            except DiskFullError as full:
                line, place = f"waiting     {full} This run goes on by itself.", full.place
            # Only here is the memory of what failed free again.
            if line != said:
                say(line, err=True)
                said = line
            _wait_for_room(place)

    def _run(self, ctx: click.Context) -> Any:
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
            _said.set()
            _say_stopped(str(stop))
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
    """Shrink a language model to exactly the size you want, and know what it cost."""


def main() -> None:
    """Entry point of the ``bpwise`` command."""
    give_back_large_blocks()
    _catch_signals()
    cli()


def _catch_signals() -> None:
    # Python calls a handler only once the main thread is back from C, where a product or a factor may take minutes. The
    # number of a signal is in this socket at once, and a thread that waits for it can end the process.
    numbers = []
    for name in _STOPPING:
        number = getattr(signal, name, None)
        # nohup and shells' background jobs have some ignored
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
            numbers.append(int(number))
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach())
    threading.Thread(target=_end_late, args=(receiver, numbers), name="bpwise signals", daemon=True).start()


def _stop(number: int, _frame: FrameType | None) -> None:
    for name in _STOPPING:  # a second one must not stop the cleaning up; it is the thread's
        each = getattr(signal, name, None)
        if each is not None and signal.getsignal(each) is _stop:
            signal.signal(each, lambda *_: None)
    raise _Stopped(number)


def _end_late(signals: socket.socket, numbers: list[int]) -> None:
    # Ends the process by the second signal, or a while after the first.
    number = 0
    while number not in numbers:
        number = signals.recv(1)[0]
    first = time.monotonic()
    while (left := first + _CLEANING_SECONDS - time.monotonic()) > 0:
        signals.settimeout(left)
        with suppress(TimeoutError):
            if signals.recv(1)[0] in numbers and time.monotonic() - first > _SAME_SECONDS:
                break
    if not _said.is_set():
        _say_stopped()
    os._exit(128 + number)


def _say_stopped(how_to_continue: str = "") -> None:
    say("", err=True)  # progress bars leave the cursor in their line
    say(f"Stopped. {how_to_continue or _CONTINUE}", err=True)


def _wait_for_room(place: Path) -> None:
    disk = next(each for each in (place, *place.absolute().parents) if each.exists())
    free, tried = shutil.disk_usage(disk).free, time.monotonic()
    while shutil.disk_usage(disk).free < free + _SOME_BYTES and time.monotonic() - tried < _RETRY_SECONDS:
        time.sleep(_LOOK_SECONDS)
