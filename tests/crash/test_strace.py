"""A run, watched by strace: what it changes on the disk lies in its own places, and in private temporary folders."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bpwise
import pytest

from .commands import EVALUATION, TEXT, Stage

pytestmark = [
    pytest.mark.crash,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: apt-get install strace"),
]

CALLS = "open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,truncate"
CALLS += ",unlink,unlinkat,rmdir,chmod,fchmodat,utimensat,mknod,mknodat"

DEVICES = ("/dev/null", "/dev/tty", "/proc/self/", "/sys/")

_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


def changed(log: Path, here: Path) -> Iterator[Path]:
    """Yield every path that a call made, opened for writing, renamed, linked or deleted.

    Args:
        log: What ``strace -f -y`` wrote.
        here: The directory that it began in.
    """
    for line in log.read_text(errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None or int(found[3]) < 0 or "O_TMPFILE" in found[2]:  # which has no name
            continue
        if found[1].startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", found[2]):
            continue
        for directory, name in _PATH.findall(found[2]):
            yield Path(os.path.normpath(os.path.join(directory or here, name)))  # noqa: PTH118 - either may be absolute


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "MODEL", "DISK/out", "--bpw", 5, *TEXT, *EVALUATION),
        ("measure", "MODEL", "-o", "DISK/out.safetensors", "--formats", "exl2", "--offload-dir", "DISK/out.st", *TEXT),
    ],
    ids=lambda arguments: arguments[0],
)
def test_all_that_is_written_is_in_its_place(arguments: tuple[object, ...], stage: Stage, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("disk", "cache", "private", "here", "home")}
    for place in places.values():
        place.mkdir()
    log = tmp_path / "log"
    names = {"MODEL": str(stage.model), "DISK": str(places["disk"])}
    given = [re.sub("MODEL|DISK", lambda found: names[found[0]], str(each)) for each in arguments]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("XDG", "HF_"))},
        "HOME": str(places["home"]),
        "TMPDIR": str(places["private"]),
        "XDG_CACHE_HOME": str(places["cache"]),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_importable()), os.environ.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    strace = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log)]
    command = [*strace, sys.executable, "-m", "bpwise", *given]
    subprocess.run(command, cwd=places["here"], env=environment, check=True, capture_output=True, timeout=600)
    paths = set(changed(log, places["here"]))
    strangers = {path for path in paths if not _is_ours(path, places)}
    assert strangers == set()
    assert any(path.is_relative_to(places["disk"] / "out") or path.name.startswith("out") for path in paths)
    left = {name: sorted(each.name for each in place.rglob("*")) for name, place in places.items() if name != "disk"}
    assert (left["private"], left["here"], left["home"]) == ([], [], [])


def _importable() -> Path:
    return Path(bpwise.__file__).parent.parent


def _is_ours(path: Path, places: dict[str, Path]) -> bool:
    if str(path).startswith(DEVICES):
        return True
    if path.is_relative_to(places["disk"]) and path != places["disk"]:
        return path.relative_to(places["disk"]).parts[0].lstrip(".").startswith("out")
    return any(path.is_relative_to(places[name]) for name in ("cache", "private"))
