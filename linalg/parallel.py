"""Running independent pieces of tensor work: the pure units of measuring and rounding, on all cores of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["cores", "run_all", "threads_beside"]

_Result = TypeVar("_Result")


def run_all(tasks: Sequence[Callable[[], _Result]], device: torch.device) -> list[_Result]:
    """Run tasks that do not depend on each other.

    Error feedback is thousands of small operations. Split over threads inside each operation they gain nothing, and
    with anything else running on the machine the threads wait for each other up to fifty times longer than they
    compute. So on a CPU every task has one core to itself; PyTorch's thread count of the caller stays as it is.

    Args:
        tasks: Functions without arguments.
        device: Where they compute. On anything but a CPU the tasks run one after another in this thread.

    Returns:
        Their results, in order. The first exception of a task is raised.
    """
    if device.type != "cpu":
        return [task() for task in tasks]
    try:
        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda task: task(), tasks))
    finally:
        torch.set_num_threads(torch.get_num_threads())  # threads started later take what was set last


def threads_beside(device: torch.device) -> torch.device:
    """Return for ``run_all`` where tasks compute that only take their inputs from a device and work on the CPU.

    That is the CPU, except beside Apple's MPS, which takes operations of one thread at a time.
    """
    return device if device.type == "mps" else torch.device("cpu")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects containers and `taskset`; not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
