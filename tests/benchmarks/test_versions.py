import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("versions")


def test_a_constant_ratio_is_certain(versions: ModuleType) -> None:
    assert versions.ratio_interval([0.2, 0.4, 2.0], [0.1, 0.2, 1.0]) == pytest.approx((2.0, 2.0, 2.0))


def test_interval_of_two_rows(versions: ModuleType) -> None:
    # A quarter of the drawings holds the first row twice, a quarter the second; their ratios are 1 and 3.
    ratio, low, high = versions.ratio_interval([1.0, 3.0], [1.0, 1.0])
    assert (ratio, low, high) == pytest.approx((2.0, 1.0, 3.0))


def test_table_pairs_what_both_have(versions: ModuleType) -> None:
    def made(version: str, bpw: float, seed: int, kl_nats: list[float]) -> Any:
        return versions.Result(version=version, format="exl2", bpw=bpw, seed=seed, kl_nats=kl_nats)

    results = [
        made("new", 4.0, 0, [0.1, 0.2]),
        made("old", 4.0, 0, [0.2, 0.4]),
        made("new", 4.0, 1, [0.3, 0.3]),
        made("new", 2.5, 0, [1.0, 1.0]),
    ]
    lines = versions.table(results).splitlines()
    assert lines[2:] == ["| exl2 | 4 | 1 | 0.300000 | 0.150000 | 0.500 | 0.500 to 0.500 |"]


@pytest.mark.slow  # four processes
def test_a_version_against_itself(versions: ModuleType, make_model: Any, tmp_path: Path) -> None:
    options = ["--exl2", "5", "--gguf", "", "-r", "4", "-l", "64", "--eval-rows", "2", "--eval-row-tokens", "64"]
    command = [str(ROOT), str(make_model("m")), *options, "--work-dir", str(tmp_path / "work")]
    result = CliRunner().invoke(versions.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "| 1.000 | 1.000 to 1.000 |" in result.stdout
    again = CliRunner().invoke(versions.main, command, catch_exceptions=False)
    assert again.stderr == ""  # nothing is made again
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
