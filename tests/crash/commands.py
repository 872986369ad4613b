"""Every command that writes, and every format: what is run, from what, and what it leaves."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bpwise.cli import cli
from bpwise.convert.opening import verify_model
from bpwise.convert.registry import format_of
from bpwise.errors import BpwiseError
from click.testing import CliRunner, Result

from .disk import Recorder, Tree, restore, tree_of, unsynchronised

TEXT = ("--rows", 2, "--row-tokens", 16, "--device", "cpu")
EVALUATION = ("--eval-rows", 1, "--eval-row-tokens", 16)

FORMATS: dict[str, tuple[object, ...]] = {
    "exl2": ("--bpw", 5),
    "gguf": ("--format", "gguf", "--bpw", 9),
    "mlx": ("--format", "mlx", "--bpw", 9),
}
"""By name of a registered format, options that ask ``quantize`` for it."""

SUFFIXES = {"exl2": "", "gguf": ".gguf", "mlx": ""}

READING = {"inspect", "verify"}
"""Commands that write nothing."""


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        name: What it is called in figures.
        arguments: ``MODEL`` stands for the original, ``DISK`` for the disk, and ``MADE`` for what stands on it before.
        begin: Names of ``MADE`` that are on the disk when it begins.
        empty: Directories that are there, empty.
    """

    name: str
    arguments: tuple[object, ...]
    begin: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return str(self.arguments[0])

    def spares(self, missing: set[str]) -> bool:
        """Whether it may do without these files where the disk refuses them: what is kept for the next time only."""
        return all(path.startswith("cache") for path in missing)


def _quantize(name: str) -> Command:
    output = f"DISK/out{SUFFIXES[name]}"
    return Command(f"quantize, {name}", ("quantize", "MODEL", output, *FORMATS[name], *TEXT, *EVALUATION))


_FROM = ("-m", "DISK/m.safetensors", "--device", "cpu")
_JUDGED = ("eval", "MODEL", "DISK/out", "--rows", 1, "--row-tokens", 16, "--device", "cpu", "--cache-dir", "DISK/cache")

_PREDICTIONS = ("--kl-divergence-base", "DISK/base.kld")

COMMANDS = [
    Command("measure, all formats", ("measure", "MODEL", "-o", "DISK/all.safetensors", *TEXT)),
    Command("measure", ("measure", "MODEL", "-o", "DISK/m.safetensors", "--formats", "exl2", *TEXT)),
    Command(
        "measure, --offload-dir",
        ("measure", "MODEL", "-o", "DISK/a/m.safetensors", "--formats", "exl2", "--offload-dir", "DISK/states", *TEXT),
    ),
    Command(
        "measure, --keep-hessians",
        ("measure", "MODEL", "-o", "DISK/b/m.safetensors", "--formats", "exl2", "--keep-hessians", "DISK/hess", *TEXT),
    ),
    *map(_quantize, FORMATS),
    Command(
        "quantize, into a directory that is there",
        ("quantize", "MODEL", "DISK/out", "--bpw", 5, "--no-eval", *_FROM),
        begin=("m.safetensors",),
        empty=("out",),
    ),
    Command(
        "quantize, tuned",
        ("quantize", "MODEL", "DISK/out", "--bpw", 5, "--effort", "high", "--no-eval", *_FROM),
        begin=("m.safetensors",),
    ),
    Command(
        "quantize, a series",
        ("quantize", "MODEL", "DISK/out", "--bpw", "5,4", *EVALUATION, *_FROM),
        begin=("m.safetensors",),
    ),
    Command("eval, with its cache", _JUDGED, begin=("out",)),
    Command("plan", ("plan", "DISK/m.safetensors", "--bpw", 5, "--html", "DISK/p.html"), begin=("m.safetensors",)),
    Command("imatrix", ("imatrix", "DISK/all.safetensors", "-o", "DISK/x.gguf"), begin=("all.safetensors",)),
    Command("export", ("export", "DISK/m.safetensors", "--for", "exllamav3", "--bpw", 5), begin=("m.safetensors",)),
    Command("dequantize", ("dequantize", "DISK/out", "DISK/dense"), begin=("out",)),
    Command("card", ("card", "DISK/out"), begin=("out",)),
    Command(
        "perplexity",
        ("perplexity", "MODEL", "-f", "MODEL/config.json", "-c", 16, "--chunks", 2, "--device", "cpu", *_PREDICTIONS),
    ),
]

PUSHES = [
    Command("push", ("push", "DISK/out", "org/"), begin=("out",)),
    Command("push, a branch for each size", ("push", "DISK/out", "org/", "--branch"), begin=("out",)),
]
"""What writes to the Hub, and nothing here."""


class Stage:
    """One disk, the original beside it, and what commands begin with."""

    def __init__(self, root: Path, model: Path) -> None:
        self.disk = root / "disk"
        self.disk.mkdir()
        self.model = model
        self.recorded: dict[str, tuple[Recorder, Tree]] = {}
        self._made: dict[str, Tree] = {}

    def run(self, command: Command) -> Result:
        """Run a command on the disk as it is."""
        names = {"MODEL": str(self.model), "DISK": str(self.disk)}
        arguments = [re.sub("MODEL|DISK", lambda found: names[found[0]], str(each)) for each in command.arguments]
        return CliRunner().invoke(cli, arguments)

    def begin(self, command: Command) -> None:
        """Make the disk what it is before a command."""
        restore(self.disk, self._start(command))

    def finished(self, command: Command) -> Tree:
        """What a run that nothing disturbs leaves."""
        self.begin(command)
        with unsynchronised():
            done = self.run(command)
        assert done.exit_code == 0, (done.output, done.exception)
        return timeless(tree_of(self.disk))

    def _start(self, command: Command) -> Tree:
        tree: Tree = dict.fromkeys(command.empty)
        for name in command.begin:
            if name not in self._made:
                made = next(each for each in COMMANDS if f"DISK/{name}" in map(str, each.arguments) and not each.begin)
                made_whole = tree_of(self.disk) if self.finished(made) else {}
                self._made[name] = {k: v for k, v in made_whole.items() if k == name or k.startswith(f"{name}/")}
            tree |= self._made[name]
        return tree


def timeless(tree: Tree) -> Tree:
    """Contents without what two runs do not share: seconds, memory, and digests of files that are remembered or not.

    Which are depends on whether they are a few seconds old.
    """
    return {
        path: _timeless(path, node) if isinstance(node, bytes) else node
        for path, node in tree.items()
        if path not in ("cache", "cache/bpwise", "cache/bpwise/file-digests.json")
    }


_STEP = re.compile(rb"[^\n]*[0-9.]+ s, [0-9.]+ [kMG]B[^\n]*\n")
"""A line of a report on one step's seconds and memory: steps that an earlier run has finished have none."""

_SECONDS = re.compile(rb'(?<="seconds": )[0-9.e-]+|(?<=time \| )[0-9.]+ s|(?<=time</span></td><td>)[0-9.]+ s')
_DATE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")


def _timeless(path: str, content: bytes) -> bytes:
    if "report." in path:
        return _DATE.sub(b"DATE", _SECONDS.sub(b"TIME", _STEP.sub(b"", content))).replace(b",\n", b"\n")
    return content


def finished_models(disk: Path) -> Iterator[Path]:
    """Whatever on a disk a reader takes for a model."""
    for path in disk.iterdir():
        if not path.name.startswith(".") and format_of(path) is not None:
            yield path


def readable_models(disk: Path) -> Iterator[Path]:
    """Whatever on a disk a reader takes for a whole model; one that is refused in a sentence is none."""
    for path in finished_models(disk):
        with suppress(BpwiseError):
            verify_model(path)
            yield path
