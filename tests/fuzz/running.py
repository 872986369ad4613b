"""What mutants are read with: the command line, a process for templates that starts at once; what messages may be."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest import mock

from bpwise.cli import cli
from bpwise.measure.text import chat_template
from click.testing import CliRunner

from .pool import is_measured, save_coverage

__all__ = ["Raw", "Refused", "is_printable", "quick_templates", "run_cli"]

_MOST_CHARACTERS = 2000
"""Longest message that is still one for people."""

_MOST_LINE_CHARACTERS = 400_000


class Refused(Exception):
    """The command line ended with a sentence."""


class Raw(Exception):
    """Something for a terminal holds control characters, or has no bound."""


def is_printable(message: str, *, lines: bool = False) -> bool:
    """Return whether a terminal shows a message as it is, whole.

    Args:
        message: The message.
        lines: Whether it may have several lines.
    """
    kept = message.replace("\n", "") if lines else message
    return kept.isprintable() and len(message) <= _MOST_CHARACTERS


def run_cli(*arguments: object) -> None:
    """Run a command; what it raises comes out.

    Raises:
        Refused: It ended with exit code 1, or 2 for a path that is none.
        Raw: It printed what a terminal would act on.
    """
    result = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    for line in result.stdout.split("\n"):
        if not line.isprintable() or len(line) > _MOST_LINE_CHARACTERS:
            raise Raw(f"printed {line[:200]!r}")
    if result.exit_code in (1, 2):
        raise Refused(result.stderr.rpartition("Error: ")[2].rstrip("\n"))
    assert result.exit_code == 0, result.stderr


@contextmanager
def quick_templates() -> Iterator[None]:
    """Fork the process that renders chat templates: a new one takes most of a second to start."""
    with mock.patch.object(chat_template, "_start", _Forked), mock.patch.object(chat_template, "_CHAT_SECONDS", 0.3):
        yield


class _Forked:
    """The part of ``subprocess.Popen`` that chat templates need."""

    def __init__(self) -> None:
        reading, self_writes = os.pipe()
        self_reads, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(reading, 0)
                os.dup2(writing, 1)
                for each in (reading, writing, self_reads, self_writes):
                    os.close(each)
                files = open(0), open(1, "w")  # noqa: SIM115 - with the last name of one it would be closed
                sys.stdin, sys.stdout = files
                chat_template.serve()
                save_coverage()
            finally:
                os._exit(0)
        os.close(reading)
        os.close(writing)
        self.stdin, self.stdout = open(self_writes, "wb"), open(self_reads, "rb")  # noqa: PTH123, SIM115
        self._code: int | None = None

    def kill(self) -> None:
        with suppress(BrokenPipeError):
            self.stdin.close()  # ends it in its own way, as saving what it took of its branches needs
        for _ in range(100 if is_measured() else 0):
            ended, status = os.waitpid(self.pid, os.WNOHANG) if self._code is None else (0, 0)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def communicate(self) -> None:
        self.stdout.close()
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.wait()
