import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bpwise.convert.work import StageDirectory, claimed, discard_stages
from bpwise.errors import WorkDirectoryError

CLAIM = """
import sys
from pathlib import Path
from bpwise.convert.work import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.readline()
"""


def test_two_runs_do_not_share_a_work_directory(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    command = [sys.executable, "-c", CLAIM, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(WorkDirectoryError, match=r"out\.work: another run is at work there"), claimed(work):
            pytest.fail("both are at work")
        other.kill()
    with claimed(work):  # a run that was killed leaves no claim behind
        assert work.is_dir()


def test_an_empty_work_directory_goes(tmp_path: Path) -> None:
    work = tmp_path / "deep" / "work"
    with claimed(work):
        StageDirectory(work, "measure", {"a": 1}).save("x", {"t": torch.zeros(1)})
        discard_stages(work)
    assert not work.exists()


def test_what_is_left_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "work"):
        StageDirectory(tmp_path / "work", "measure", {"a": 1}).save("x", {"t": torch.zeros(1)})
        _ = 1 / 0
    with claimed(tmp_path / "work"):
        assert StageDirectory(tmp_path / "work", "measure", {"a": 1}).has("x")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(WorkDirectoryError, match="cannot be used as a work directory"), claimed(tmp_path / "work"):
        pytest.fail("there is no directory")


def test_a_single_number_of_a_piece(tmp_path: Path) -> None:
    pieces = StageDirectory(tmp_path, "stage", {})
    pieces.save("piece", {"data": torch.ones(3), "damping": torch.tensor(float("inf")), "distance": torch.tensor(0.25)})
    assert [pieces.number("piece", name) for name in ("damping", "distance", "other")] == [float("inf"), 0.25, None]
