"""The benchmark of peers: its table, processor time of children, and the check that weights are quantized."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("peers")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("peer_packages")


def test_table_leaves_out_what_there_is_none_of(peers: ModuleType) -> None:
    common = {"seconds": 58.4, "bpw": 4.3125, "file_bytes": 152_340_000, "kl_nats": 0.1373, "kl_error": 0.0058}
    exl2 = peers.Result(name="a", once_seconds=81.6, head_bpw=16, **common)
    gguf = peers.Result(name="b", once_seconds=0, head_bpw=None, **common)
    rows = peers.table([exl2, gguf]).splitlines()[2:]
    assert rows == [
        "| a | 82 | 58 | 4.312 | 16.00 | 152.3 | 0.1373 ± 0.0058 |",
        "| b |  | 58 | 4.312 |  | 152.3 | 0.1373 ± 0.0058 |",
    ]


def test_time_is_that_of_the_child_and_of_its_children(peers: ModuleType, tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    seconds = peers.cpu_seconds([sys.executable, "-c", nested], tmp_path / "log.txt")
    # Starting two interpreters takes time too, but far less than this leaves on any machine.
    assert 0.25 < seconds < 3


@pytest.mark.parametrize("in_features", [128, 160], ids=["whole groups", "a short last group"])
def test_values_are_counted_within_groups(packages: ModuleType, in_features: int) -> None:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, in_features), generator=rng)
    scales = torch.rand(6, (in_features + 63) // 64, generator=rng).repeat_interleave(64, dim=1)[:, :in_features]
    assert packages.most_values(codes * scales, 64) <= 16
    assert packages.most_values(codes * scales, 128) > 16
