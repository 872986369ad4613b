"""The way to the terminal: every line that a command prints goes through here, and how far it has come."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..progress import ExpectedPart, RunForecast, TimeLeft, placed, seconds_by_step
from ..quantize.timing.costs import minutes
from ..tables import bytes_text
from ..version import __version__

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import TensorSource

__all__ = ["JSON_OPTION", "RunBar", "logged", "note", "progress_bar", "say", "say_json", "say_shortened", "time_lines"]

_DOCUMENT_VERSION = 1
"""Of what ``--json`` prints."""

JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")

_LINE_SECONDS = 30.0
"""Time between two lines about a step, where they go to a file."""

_MOST_LABEL_CHARACTERS = 60

_LOGGER = logging.getLogger(__package__.partition(".")[0])
"""What the library logs goes through here: what a run begins with at INFO, what its steps decide at DEBUG."""


class _Lines(logging.Handler):
    """Prints what is logged, a line each, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), err=True)


@contextmanager
def logged(level: int) -> Iterator[None]:
    """Print what the library logs while the body runs, and progress too unless the level is above INFO.

    Args:
        level: The least level to print, as ``logging`` has it.
    """
    before, lines = _LOGGER.level, _Lines()
    _LOGGER.addHandler(lines)
    _LOGGER.setLevel(level)
    try:
        yield
    finally:
        _LOGGER.setLevel(before)
        _LOGGER.removeHandler(lines)


def say(line: str, *, err: bool = False) -> None:
    """Print one line; what strangers put into it is only shown.

    Args:
        line: The line: a line break in it does not break it.
        err: Whether it goes to stderr, with warnings and progress, and not to the results. There a line may be lost: a
            log file on a full disk ends no run.
    """
    bars = sys.modules["tqdm"].tqdm if "tqdm" in sys.modules and sys.stderr.isatty() else None
    with (
        suppress(OSError) if err else nullcontext(),
        nullcontext() if bars is None else bars.external_write_mode(file=sys.stderr),
    ):
        _print(printable(line), err=err)


def note(line: str) -> None:
    """Print one line on stderr that ``--quiet`` leaves out."""
    if _LOGGER.level <= logging.INFO:
        say(line, err=True)


def say_json(command: str, content: Mapping[str, Any]) -> None:
    """Print what a command found as one JSON document; see ``docs/commands.md``.

    Args:
        command: The command's name.
        content: What it found, in types that JSON has, or NumPy's; NaN and infinity become null.
    """
    document = {"bpwise_document": _DOCUMENT_VERSION, "bpwise": __version__, "command": command, **content}
    # Nothing in it may act on a terminal; of what could, only DEL is not escaped.
    _print(json.dumps(_plain(document), indent=2).replace("\x7f", "\\u007f"))


def _print(text: str, *, err: bool = False) -> None:
    click.echo(text, err=err)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy's
        return _plain(value.tolist())
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


class RunBar:
    """Progress of a command, on stderr: how far a step is, and the time left of the whole run; see ``RunProgress``.

    That is a bar in a terminal, otherwise a line every half minute. Where nothing was forecast, as of single steps, the
    time left is that of the step.
    """

    def __init__(self) -> None:
        """Begin."""
        self._left: TimeLeft | None = None

    def expect(self, forecast: RunForecast) -> None:
        """Print what the run will take, and count down from now on; see ``RunProgress``."""
        self._left = TimeLeft(forecast.parts)
        note(f"expected    {_steps_line(forecast)}")

    def __call__(self, items: Sequence[Any], step: str) -> Iterable[Any]:
        """See ``Progress``."""
        place = ""
        if self._left is not None:
            self._left.begin(step)
            place = self._left.place
        if _LOGGER.level > logging.INFO:
            return items
        label = printable(placed(step, place), _MOST_LABEL_CHARACTERS)
        show = _progress_bar if sys.stderr.isatty() else _progress_lines
        return show(items, label, self._left)


def progress_bar(items: Sequence[Any], step: str) -> Iterable[Any]:
    """Show how far a step is that belongs to no run; see ``Progress``."""
    return RunBar()(items, step)


def time_lines(parts: Iterable[ExpectedPart]) -> list[str]:
    """Return the expected time of each step, and of all, as lines for a terminal; none where nothing was timed."""
    steps = seconds_by_step(parts)
    shown = [f"{step:8} {minutes(seconds):>10}" for step, seconds in steps.items()]
    total = f"{'in all':8} {minutes(sum(steps.values())):>10}, roughly, on this machine"
    return [f"{'time' if not place else '':13} {line}" for place, line in enumerate([*shown, total])] if steps else []


def _steps_line(forecast: RunForecast) -> str:
    steps = seconds_by_step(forecast.parts)
    each = ", ".join(f"{step} {minutes(seconds)}" for step, seconds in steps.items())
    time_ = f"{minutes(sum(steps.values()))} ({each})" if steps else "next to no time"
    if forecast.memory_bytes is None or forecast.disk_bytes is None:
        return f"{time_}, roughly"
    memory, disk = bytes_text(forecast.memory_bytes), bytes_text(forecast.disk_bytes)
    return f"{time_}, at most {memory} of memory and {disk} in the work directory, roughly"


def _progress_bar(items: Sequence[Any], label: str, left: TimeLeft | None) -> Iterator[Any]:
    from tqdm import tqdm

    if left is None:
        yield from tqdm(items, desc=label, unit="block", dynamic_ncols=True)
        return
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    with tqdm(total=len(items), desc=label, bar_format=shown, dynamic_ncols=True) as bar:
        for done, item in enumerate(items):
            left.advance(done / len(items))
            bar.set_postfix_str(f"{tqdm.format_interval(left.seconds)} left of the run", refresh=True)
            yield item
            bar.update()
        left.advance(1.0)


def _progress_lines(items: Sequence[Any], label: str, left: TimeLeft | None) -> Iterator[Any]:
    from tqdm import tqdm

    first = last = time.monotonic()
    done = 0
    ended = threading.Event()

    def tell() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_SECONDS:
            return
        last = now
        if left is not None:
            time_left = f", {tqdm.format_interval(left.seconds)} left of the run"
        elif done:
            time_left = f", {tqdm.format_interval((now - first) / done * (len(items) - done))} left"
        else:
            time_left = ""
        say(f"{label}: {done} of {len(items)}{time_left}", err=True)

    def beat() -> None:  # one item may take longer: a log tells that the run lives
        while not ended.wait(_LINE_SECONDS):
            tell()

    threading.Thread(target=beat, name="bpwise progress", daemon=True).start()
    try:
        for item in items:
            if left is not None:
                left.advance(done / len(items))
            tell()
            yield item
            done += 1
    finally:
        ended.set()
    if left is not None:
        left.advance(1.0)
    say(f"{label}: {len(items)} in {tqdm.format_interval(time.monotonic() - first)}", err=True)


def say_shortened(source: TensorSource, **asked: int | None) -> None:
    """Say on stderr which rows are shorter than by default, because the model's context is.

    Args:
        source: The model.
        **asked: Tokens in each row as asked for, None for the default, by what the rows are for: ``calibration``,
            ``evaluation``.

    Raises:
        ConfigError: Rows are longer than the model's context.
    """
    from ..measure.text.context import shortened_line

    for use, row_tokens in asked.items():
        line = shortened_line(row_tokens, source, use)
        if line is not None:
            say(line, err=True)
