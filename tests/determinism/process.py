"""A process that runs commands of bpwise one after another: ``python process.py SETTINGS``, as JSON.

Left out is what takes seconds and has no part in what is written: timing the machine, llama.cpp as a judge, and, of
models whose rows hold no block of 256, ggml's search tables.
"""

import json
import os
import sys
from typing import Any

from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.cli import cli
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.engine import gate
from bpwise.eval import speed
from bpwise.linalg.work import Rates

CUT_OFF = 9
"""Exit status of a run that was cut off as asked."""


def cut_off_after(saves: int) -> None:
    """End the process, with nothing cleaned up, once so many resume artifacts are kept."""
    plain = ResumeStore.save
    left = [saves]

    def save(self: ResumeStore, artifact: str, tensors: Any) -> None:
        plain(self, artifact, tensors)
        left[0] -= 1
        if left[0] == 0:
            os._exit(CUT_OFF)

    ResumeStore.save = save  # type: ignore[method-assign]


def main(settings: str) -> None:
    """Run.

    Args:
        settings: ``commands``, lists of arguments; ``umask``; ``cores``, the least number of them to use, or null;
            ``saves``, or null; ``tables``, whether ggml's tables are needed.
    """
    asked = json.loads(settings)
    os.umask(asked["umask"])
    if asked["cores"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["cores"]])
    Rates._timed = lambda *_args, **_kwargs: [1e-3]  # type: ignore[method-assign]
    gate._library = lambda: None  # type: ignore[assignment]
    speed._ENGINE = ""  # nothing is run by it, so nothing is timed
    if not asked["tables"]:
        GgufCurves.warm_up = lambda _: None  # type: ignore[method-assign,assignment]
    if asked["saves"] is not None:
        cut_off_after(asked["saves"])
    for command in asked["commands"]:
        cli.main([os.fsdecode(each.encode()) for each in command], standalone_mode=False)  # as a terminal hands them on


if __name__ == "__main__":
    main(sys.argv[1])
