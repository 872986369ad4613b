"""Other programs that convert a model: run in processes of their own, within a time limit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import CheckpointError
from ..files.operations import unnamed

__all__ = ["last_line", "run_program"]

_SHOWN_CHARACTERS = 400


def run_program(
    command: Sequence[str], staged: Path, environment: Mapping[str, str], most_seconds: float, name: str
) -> tuple[int, bytes]:
    """Run a program to its end. Its standard input stays open until then, so that it can end with this process.

    Args:
        command: The program and its arguments.
        staged: Directory of the model that it converts; it runs in the one above.
        environment: Its environment variables.
        most_seconds: Time after which it counts as stuck.
        name: What it is called in messages.

    Returns:
        Its exit status, and what it said, standard output and errors together.

    Raises:
        CheckpointError: It has not ended within that time.
    """
    with unnamed() as log:
        process = subprocess.Popen(
            command,
            cwd=staged.parent,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(most_seconds)
        except subprocess.TimeoutExpired as cause:
            raise CheckpointError(
                f"{staged.name}: {name} has not ended within {most_seconds:.0f} s, and was stopped. "
                "Look whether the disk is slow or memory is short, and run again."
            ) from cause
        finally:
            process.kill()
            process.communicate()
        log.seek(0)
        return status, log.read()


def last_line(output: bytes) -> str:
    """Return the last line that a program said, without those that only inform; of a progress bar its last state."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").replace("\r", "\n").splitlines()]
    said = [line for line in lines if line and not line.startswith(("INFO:", "WARNING:", "^", "~"))]
    return said[-1][-_SHOWN_CHARACTERS:] if said else "it said nothing"
