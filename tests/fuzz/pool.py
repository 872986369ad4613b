"""Runs what may hang, crash or take all memory in forked children, and says what became of it."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BAD", "CLASSES", "Mutant", "Outcome", "is_measured", "run_all", "save_coverage"]

CLASSES = ("ok", "refused", "traceback", "hang", "memory", "crash", "raw")
"""What may become of a mutant: read; a ``BpwiseError``; any other exception; too much time; too much memory; a signal;
a message or output with raw control characters, or without a bound."""

BAD = CLASSES[2:]
"""What must not become of any."""

SECONDS = 1.0
"""Processor time that a mutant may take: wall time would depend on what else runs."""

_SECOND_BYTES = 2e6
"""For each so many bytes it may take as much again: a million keys are 11 MB, and some readers take a file thrice."""

_WALL_SECONDS = 120.0
"""Wall time for what waits: for a server, or for a process of its own."""

_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mutant that is made and not yet read.

    Attributes:
        read: Returns class and detail of what became of it; what it raises is a traceback.
        parses: Whether the first parser of any reader takes it.
        size_bytes: Size of the file.
    """

    read: Callable[[], tuple[str, str]]
    parses: bool
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant.

    Attributes:
        index: Its number.
        kind: One of ``CLASSES``.
        parses: As of the mutant.
        detail: What was raised, and where.
    """

    index: int
    kind: str
    parses: bool
    detail: str


def run_all(
    make: Callable[[int], Mutant], count: int, *, first: int = 0, workers: int = 1, seconds: float = SECONDS
) -> list[Outcome]:
    """Run numbers ``first`` to ``first + count - 1`` in children, each a share of them one after another.

    One that takes too much time runs once more: on a machine that is busy otherwise, the same work takes longer.

    Args:
        make: Makes a number's mutant; no limit is on this.
        count: How many.
        first: The first of them.
        workers: Children at a time.
        seconds: Processor time that one may take.

    Returns:
        An outcome for every number, in order, whatever the number of workers.
    """
    shares = [list(range(first + worker, first + count, workers)) for worker in range(workers)]
    running = [_Child(make, share, seconds) for share in shares if share]
    outcomes: list[Outcome] = []
    again: set[int] = set()
    while running:
        waiting = []
        for child in running:
            found = child.outcomes()
            outcomes += found
            left = child.numbers[len(found) :]
            if found and found[-1].kind == "hang" and found[-1].index not in again:
                again.add(outcomes.pop().index)
                left = [found[-1].index, *left]
            if left:
                waiting.append(_Child(make, left, seconds))
        running = waiting
    return sorted(outcomes, key=lambda outcome: outcome.index)


class _Child:
    """A process that goes through numbers until one ends it."""

    def __init__(self, make: Callable[[int], Mutant], numbers: Sequence[int], seconds: float) -> None:
        self.numbers = numbers
        self._reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Of threads that are there already (progress bars have one) the child needs none.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            os.close(self._reading)
            code = 1
            try:
                _work(make, numbers, seconds, writing)
                save_coverage()
                code = 0
            finally:
                os._exit(code)
        os.close(writing)

    def outcomes(self) -> list[Outcome]:
        """Wait for its end; return what it said of its first numbers, and what ended it."""
        with os.fdopen(self._reading, encoding="utf-8") as file:
            found = [_parsed(line) for line in file if line.endswith("\n")]
        _, status = os.waitpid(self._process, 0)
        if len(found) < len(self.numbers):
            number = self.numbers[len(found)]
            ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            hung = ended in (signal.SIGPROF, signal.SIGALRM)
            name = signal.Signals(ended).name if ended else f"exit {os.waitstatus_to_exitcode(status)}"
            found.append(Outcome(number, "hang" if hung else "crash", True, name))
        return found


def save_coverage() -> None:
    """Save which branches this process took, if that is being measured: it may end without doing so by itself."""
    if is_measured():
        measuring = sys.modules["coverage"].Coverage.current()
        measuring.stop()
        measuring.save()


def is_measured() -> bool:
    """Return whether it is measured which branches are taken."""
    return "coverage" in sys.modules and sys.modules["coverage"].Coverage.current() is not None


def _parsed(line: str) -> Outcome:
    index, kind, parses, detail = line.rstrip("\n").split("\t", 3)
    return Outcome(int(index), kind, parses == "True", detail)


def _work(make: Callable[[int], Mutant], numbers: Sequence[int], seconds: float, writing: int) -> None:
    import resource  # not on Windows

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    faulthandler.disable()
    warnings.simplefilter("ignore")  # which a run would print
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)  # ends the process, wherever it is
    for number in numbers:
        mutant = make(number)
        signal.setitimer(signal.ITIMER_PROF, seconds * (1 + mutant.size_bytes / _SECOND_BYTES))
        signal.setitimer(signal.ITIMER_REAL, _WALL_SECONDS)
        kind, detail = _classified(mutant.read)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = f"{number}\t{kind}\t{mutant.parses}\t{ascii(detail)[1:-1][:300]}\n"
        os.write(writing, line.encode())


def _classified(read: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    try:
        return read()
    except MemoryError as error:
        return "memory", _where(error)
    except BaseException as error:
        kind = "memory" if "can't allocate memory" in str(error) else "traceback"
        return kind, _where(error)


def _where(error: BaseException) -> str:
    frames = list(_package_frames(error))
    place = f"{frames[-1].filename.rpartition('bpwise/')[2]}:{frames[-1].lineno}" if frames else "?"
    return f"{place} {type(error).__name__}: {str(error)[:150]}"


def _package_frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    for frame in traceback.extract_tb(error.__traceback__):
        if "/bpwise/" in frame.filename and "/bpwise/tests/" not in frame.filename:
            yield frame
