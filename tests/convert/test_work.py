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


def piece_file(work: Path, piece: str) -> Path:
    (directory,) = work.iterdir()
    return directory / f"{piece}.safetensors"


def test_pieces_come_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.tensor(7),
        "c": torch.zeros(0, 2),
        "d": torch.ones(3) > 0,
    }
    StageDirectory(tmp_path, "measure", {}).save("x", tensors)
    read = StageDirectory(tmp_path, "measure", {}).load("x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("at", [0, 4, 8, 40, 0.5, -1])
def test_a_damaged_piece_counts_as_not_finished(tmp_path: Path, at: float) -> None:
    StageDirectory(tmp_path, "measure", {}).save("x", {"a": torch.arange(100.0), "b": torch.ones(2, 2)})
    file = piece_file(tmp_path, "x")
    data = bytearray(file.read_bytes())
    data[int(at * len(data)) if at == 0.5 else int(at)] ^= 1
    file.write_bytes(data)
    again = StageDirectory(tmp_path, "measure", {})
    with pytest.warns(UserWarning, match=r"x\.safetensors: damaged\. It is made again"):
        assert not again.has("x")
    assert not file.exists()
    with pytest.raises(WorkDirectoryError, match=r"x\.safetensors: missing or damaged\. Delete .*measure-"):
        again.load("x")
    again.save("x", {"a": torch.zeros(1)})
    assert again.has("x")


@pytest.mark.parametrize("change", ["cut", "empty", "another", "shape", "not-a-file"])
def test_other_damage(tmp_path: Path, change: str) -> None:
    pieces = StageDirectory(tmp_path, "measure", {})
    pieces.save("x", {"a": torch.arange(100.0)})
    pieces.save("y", {"a": torch.arange(100.0) + 1})
    file, other = piece_file(tmp_path, "x"), piece_file(tmp_path, "y")
    if change == "not-a-file":
        file.unlink()
        file.symlink_to(tmp_path)
    else:
        data = file.read_bytes()
        new = {
            "cut": data[:-8],
            "empty": b"",
            "another": other.read_bytes(),
            "shape": data.replace(b"[100]", b"[1,100]"),
        }
        file.write_bytes(new[change])
    with pytest.warns(UserWarning, match="damaged"):
        assert not StageDirectory(tmp_path, "measure", {}).has("x")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(WorkDirectoryError, match="cannot be used as a work directory"), claimed(tmp_path / "work"):
        pytest.fail("there is no directory")


def test_a_single_number_of_a_piece(tmp_path: Path) -> None:
    pieces = StageDirectory(tmp_path, "stage", {})
    pieces.save("piece", {"data": torch.ones(3), "damping": torch.tensor(float("inf")), "distance": torch.tensor(0.25)})
    assert [pieces.number("piece", name) for name in ("damping", "distance", "other")] == [float("inf"), 0.25, None]
