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


WAITING = """
import ctypes, os, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bpwise.cli.allocator import give_back_large_blocks
import torch
give_back_large_blocks()
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def work():  # each waits until all have begun, and then for its turn
    begun.wait()
    with turn:
        [torch.ones(1 << 18) for _ in range(48)].clear()
        small.append(torch.ones(1 << 14))
small, turn, begun = [], threading.Lock(), threading.Barrier(16)
before = resident_mib()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_that_wait_share_their_memory() -> None:
    run = subprocess.run([sys.executable, "-c", WAITING], check=True, stdout=subprocess.PIPE, text=True)
    # On one core there is one heap: 48 MiB that each of 16 threads frees are used by the next, not kept 16 times.
    assert int(run.stdout) < 2 * 48 + 50


def test_the_command_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(group, "give_back_large_blocks", lambda: asked.append(True))
    monkeypatch.setattr(sys, "argv", ["bpwise", "--version"])
    with pytest.raises(SystemExit):
        group.main()
    assert asked
