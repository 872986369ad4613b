"""When, by what command and on what a report was made."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from ...measure.device import installed_memory

__all__ = ["command_line", "run_facts"]

_MODEL_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)

_PATH = re.compile(r"(?:^|(?<=[=,]))(?:[A-Za-z]:[\\/]|[\\/]|~|\.\.[\\/])[^=,]*[\\/](?=[^\\/=,])")
"""All but the last part of a path from the root, from a home or from above the current directory."""


def run_facts() -> dict[str, str]:
    """Return date, command, hardware and software of this process, by name."""
    command = command_line(sys.argv)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **({} if command is None else {"command": command}),
        "hardware": _hardware(),
        "software": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }


def command_line(arguments: list[str]) -> str | None:
    """Return the command that runs, without what only this machine knows: directories before the names of files.

    Args:
        arguments: As ``sys.argv``.

    Returns:
        What a shell would take; None if the process is not bpwise's own.
    """
    if not arguments or not _is_ours(Path(arguments[0])):
        return None
    return shlex.join(["bpwise", *(_PATH.sub("", each.rstrip("/")) for each in arguments[1:])])


def _is_ours(program: Path) -> bool:
    return program.stem == "bpwise" or (program.name == "__main__.py" and program.parent == _package())


def _package() -> Path:
    return Path(__file__).parents[2]


def _hardware() -> str:
    parts = [_processor(), f"{os.cpu_count()} cores"]
    memory = installed_memory()
    if memory is not None:
        parts.append(f"{memory / 1e9:.0f} GB of memory")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    with suppress(OSError):  # not on Linux
        found = _MODEL_NAME.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()
