"""Memory that tensors leave, in a process of its own: what it sets up stays."""

import subprocess
import sys

import pytest
from bpwise.cli import group

PROGRAM = """
import threading
from bpwise.cli.allocator import give_back_large_blocks
import torch
give_back_large_blocks()
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def work():  # large tensors that come and go between small ones that stay
    large = []
    for _ in range(20):
        large.append(torch.ones(5 << 20))
        small.append(torch.ones(1 << 14))
small = []
before = resident_mib()
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_tensors_go_back_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True)
    # 60 tensors of 20 MiB are freed, 60 of 64 KiB are not. The C library alone would keep 800 MiB.
    assert int(run.stdout) < 100


def test_the_command_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(group, "give_back_large_blocks", lambda: asked.append(True))
    monkeypatch.setattr(sys, "argv", ["bpwise", "--version"])
    with pytest.raises(SystemExit):
        group.main()
    assert asked
