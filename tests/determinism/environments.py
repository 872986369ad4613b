"""Environments that a run must not depend on, and a whole run in one of them: what it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..crash.commands import timeless
from ..crash.disk import Tree, tree_of
from . import process

_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Environment:
    """What surrounds a process.

    Attributes:
        variables: Environment variables; those of the tests are not inherited.
        umask: Of the process.
        folder: Folders to work in, below the place of the run.
        inside: Whether that is the current directory; else paths are absolute, and it is the root.
        cores: How many processor cores it may use, at most; None for all.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    umask: int = 0o022
    folder: str = "run"
    inside: bool = True
    cores: int | None = None


@dataclass(frozen=True)
class Model:
    """An original, and what it is as an unquantized GGUF file.

    Attributes:
        rows: Options that say how much text is used.
        tables: Whether rows hold blocks of 256, for which ggml searches tables.
        sizes: Bits per weight, of EXL2 and GGUF.
    """

    directory: Path
    base: Path
    rows: tuple[str, ...] = ("--rows", "2", "--row-tokens", "32")
    tables: bool = False
    sizes: tuple[str, str] = ("5", "6")

    def commands(self, place: str) -> list[list[str]]:
        """Measure for all formats, plan, quantize to each format with a report, and export."""
        model, base = str(self.directory), ("--base", str(self.base))
        measured = f"{place}m.safetensors"
        evaluation = ("--eval-rows", "1", "--eval-row-tokens", "16", "-m", measured, "--device", "cpu")
        exl2, gguf = self.sizes
        return [
            ["measure", model, "-o", measured, *base, *self.rows, "--device", "cpu"],
            ["plan", measured, "--bpw", exl2, "-o", f"{place}exl2.json", "--html", f"{place}plans.html"],
            ["plan", measured, "--format", "gguf", "--bpw", gguf, "-o", f"{place}gguf.json"],
            ["quantize", model, f"{place}exl2", "--bpw", exl2, *evaluation],
            ["quantize", model, f"{place}out.gguf", "--bpw", gguf, *base, "--card", *evaluation],
            ["imatrix", measured, "-o", f"{place}imatrix.gguf"],
        ]


def run(
    model: Model,
    place: Path,
    environment: Environment,
    *,
    threads: int = 1,
    only: Sequence[str] | None = None,
    saves: int | None = None,
) -> Tree:
    """Run all commands, or some, in an environment; return what they leave, times apart.

    Args:
        model: What is quantized.
        place: A directory of the run's own; what an earlier one has left there is gone on from.
        environment: What surrounds it.
        threads: Of OpenMP and MKL.
        only: Names of the commands; None for all.
        saves: The process is cut off once so many resume artifacts are kept.
    """
    folder = place / environment.folder
    folder.mkdir(parents=True, exist_ok=True)
    commands = model.commands("" if environment.inside else f"{folder}/")
    settings = {
        "commands": [command for command in commands if only is None or command[0] in only],
        "umask": environment.umask,
        "cores": environment.cores,
        "saves": saves,
        "tables": model.tables,
    }
    variables = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    variables |= {"HOME": str(place), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **environment.variables}
    done = subprocess.run(
        [sys.executable, process.__file__, json.dumps(settings)],
        cwd=folder if environment.inside else "/",
        env=variables,
        capture_output=True,
        check=False,
    )
    expected = 0 if saves is None else process.CUT_OFF
    assert done.returncode == expected, done.stderr.decode(errors="replace")[-3000:]
    return timeless(tree_of(folder))


PLAIN = Environment({"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "TZ": "UTC"})

STRANGE = Environment(
    {
        "LC_ALL": "C",
        "LANG": "tr_TR.UTF-8",
        "PYTHONHASHSEED": "4711",
        "PYTHONOPTIMIZE": "1",
        "TZ": "Asia/Kathmandu",
        "HOME": "/nonexistent",
        "COLUMNS": "30",
        "TERM": "dumb",
        "MALLOC_PERTURB_": "85",
    },
    umask=0o077,
    folder="deep/er und größer/İstanbul",
    inside=False,
    cores=1,
)
"""Everything at once. ``MALLOC_PERTURB_`` fills memory that was not written with ones and zeros by turns."""

VARIED: dict[str, Environment] = {
    "hash seed 1": Environment({"PYTHONHASHSEED": "1"}),
    "hash seed 2": Environment({"PYTHONHASHSEED": "2"}),
    "C": Environment({"LC_ALL": "C"}),
    "POSIX, ASCII": Environment({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "tr_TR": Environment({"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}),
    "umask 077": Environment(umask=0o077),
    "umask 000": Environment(umask=0),
    "time zone": Environment({"TZ": "Pacific/Kiritimati"}),
    "current directory": Environment(inside=False),
    "path": Environment(folder="deep/er und größer/İstanbul"),
    "no home": Environment({"HOME": "/nonexistent"}),
    "optimized Python": Environment({"PYTHONOPTIMIZE": "1"}),
    "memory that was not written": Environment({"MALLOC_PERTURB_": "85"}),
    "one core": Environment(cores=1),
}
"""One thing at a time."""
