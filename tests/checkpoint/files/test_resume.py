import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore, discard_artifacts, locked_work, run_artifacts
from bpwise.errors import BrokenModelError, BudgetError, WorkDirectoryError

CLAIM = """
import sys
from pathlib import Path
from bpwise.checkpoint.files.resume import locked_work
with locked_work(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.readline()
"""

ONE, OTHER = {"a": 1}, {"a": 2}


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def make_stage(work: Path, identity: dict[str, int]) -> ResumeStore:
    stage = ResumeStore(work, "measure", identity)
    stage.save("x", {"t": torch.zeros(1)})
    return stage


def piece_file(work: Path, artifact: str) -> Path:
    (directory,) = work.iterdir()
    return directory / f"{artifact}.safetensors"


def test_pieces_come_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.tensor(7),
        "c": torch.zeros(0, 2),
        "d": torch.ones(3) > 0,
    }
    ResumeStore(tmp_path, "measure", {}).save("x", tensors)
    read = ResumeStore(tmp_path, "measure", {}).load("x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("at", [0, 4, 8, 40, 0.5, -1])
def test_a_damaged_piece_counts_as_not_finished(tmp_path: Path, at: float) -> None:
    ResumeStore(tmp_path, "measure", {}).save("x", {"a": torch.arange(100.0), "b": torch.ones(2, 2)})
    file = piece_file(tmp_path, "x")
    data = bytearray(file.read_bytes())
    data[int(at * len(data)) if at == 0.5 else int(at)] ^= 1
    file.write_bytes(data)
    again = ResumeStore(tmp_path, "measure", {})
    with pytest.warns(UserWarning, match=r"x\.safetensors: damaged\. It is made again"):
        assert not again.has("x")
    assert not file.exists()
    with pytest.raises(
        WorkDirectoryError, match=r"x\.safetensors: an artifact of finished work has gone, or is damaged"
    ):
        again.load("x")
    again.save("x", {"a": torch.zeros(1)})
    assert again.has("x")


@pytest.mark.parametrize("change", ["cut", "empty", "another", "shape", "not-a-file"])
def test_other_damage(tmp_path: Path, change: str) -> None:
    artifacts = ResumeStore(tmp_path, "measure", {})
    artifacts.save("x", {"a": torch.arange(100.0)})
    artifacts.save("y", {"a": torch.arange(100.0) + 1})
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
        assert not ResumeStore(tmp_path, "measure", {}).has("x")


def test_a_single_number_of_a_piece(tmp_path: Path) -> None:
    artifacts = ResumeStore(tmp_path, "stage", {})
    artifacts.save(
        "artifact", {"data": torch.ones(3), "damping": torch.tensor(float("inf")), "distance": torch.tensor(0.25)}
    )
    assert [artifacts.number("artifact", name) for name in ("damping", "distance", "other")] == [
        float("inf"),
        0.25,
        None,
    ]


class TestClaim:
    def test_two_runs_do_not_share_a_work_directory(self, tmp_path: Path) -> None:
        work = tmp_path / "out.work"
        command = [sys.executable, "-c", CLAIM, str(work)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "claimed\n"
            with pytest.raises(WorkDirectoryError, match=r"out\.work: in use by another bpwise run"), locked_work(work):
                pytest.fail("both are at work")
            other.kill()
        with locked_work(work):  # a run that was killed leaves no claim behind
            assert work.is_dir()

    def test_an_empty_work_directory_goes(self, tmp_path: Path) -> None:
        work = tmp_path / "deep" / "work"
        with run_artifacts(work) as stages:
            make_stage(work, ONE)
            stages.add("measure", ONE)
        assert list(tmp_path.iterdir()) == []

    def test_one_that_an_earlier_run_made_goes_too(self, tmp_path: Path) -> None:
        work = tmp_path / "work"
        make_stage(work, ONE)
        with run_artifacts(work) as stages:
            stages.add("measure", ONE)
        assert not work.exists()

    @pytest.mark.parametrize("left", ["nothing", ".lock"])
    def test_one_that_a_killed_run_left_empty_goes(self, tmp_path: Path, left: str) -> None:
        work = tmp_path / ("out.work" if left == "nothing" else "named")
        work.mkdir()
        if left != "nothing":
            (work / left).write_text("")
        with run_artifacts(work):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_step_that_was_half_deleted_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = make_stage(tmp_path, ONE)

        def killed(_path: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("bpwise.checkpoint.files.operations.delete_tree", killed)
            discard_artifacts(tmp_path, "measure", ONE)
        assert not stage.path.exists()
        (left,) = tmp_path.iterdir()
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        left.rename(left.with_name(re.sub("partial-[0-9]+", f"partial-{ended.pid}", left.name)))
        discard_artifacts(tmp_path, "measure", ONE)
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_directory_of_somebody_stays(self, tmp_path: Path) -> None:
        with run_artifacts(tmp_path) as stages:
            make_stage(tmp_path, ONE)
            stages.add("measure", ONE)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_left_stays(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), run_artifacts(tmp_path / "work") as stages:
            make_stage(tmp_path / "work", ONE)
            stages.add("measure", ONE)
            _ = 1 / 0
        with locked_work(tmp_path / "work"):
            assert ResumeStore(tmp_path / "work", "measure", ONE).has("x")

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "work").write_text("")
        with pytest.raises(WorkDirectoryError, match=r"work: in the way. Got a file"), locked_work(tmp_path / "work"):
            pytest.fail("there is no directory")

    def test_what_a_killed_run_was_writing_goes(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        (tmp_path / f".measurement.safetensors.partial-{ended.pid}-0123abcd").write_text("half")
        (tmp_path / f".measurement.safetensors.partial-{os.getppid()}-0123abcd").write_text("by a process that lives")
        with locked_work(tmp_path):
            names = files(tmp_path) - {".lock"}
        assert names == {f".measurement.safetensors.partial-{os.getppid()}-0123abcd"}

    def test_it_may_go_while_it_is_claimed(self, tmp_path: Path) -> None:
        with run_artifacts(tmp_path / "work") as stages:
            stages.add("measure", ONE)
            shutil.rmtree(tmp_path / "work")
        assert list(tmp_path.iterdir()) == []

    def test_ctrl_c_tells_where_the_work_is(self, tmp_path: Path) -> None:
        sentence = f"Run the same command to resume. Finished work is kept in {tmp_path}"
        with pytest.raises(KeyboardInterrupt, match=re.escape(sentence)), locked_work(tmp_path):
            raise KeyboardInterrupt


class TestDiscarding:
    """A work directory may be somebody's home: only what says itself that it is this run's is ever deleted."""

    def test_only_the_stages_of_this_run_go(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "1.jpg").write_text("the only copy")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "id").write_text("the only copy")
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "identity.json").write_text(json.dumps(ONE))
        make_stage(tmp_path, OTHER)
        theirs = files(tmp_path)
        with run_artifacts(tmp_path) as stages:
            make_stage(tmp_path, ONE)
            stages.add("measure", ONE)
        assert files(tmp_path) == theirs

    def test_a_broken_model_leaves_nothing_to_go_on_with(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        with pytest.raises(BrokenModelError), run_artifacts(tmp_path) as stages:
            make_stage(tmp_path, ONE)
            stages.add("measure", ONE)
            raise BrokenModelError
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_a_size_that_cannot_be_reached_leaves_what_another_run_has_begun(self, tmp_path: Path) -> None:
        make_stage(tmp_path, ONE)
        theirs = files(tmp_path)
        with pytest.raises(BudgetError), run_artifacts(tmp_path) as stages:
            for identity in (ONE, OTHER):
                make_stage(tmp_path, identity)
                stages.add("measure", identity)
            raise BudgetError
        assert files(tmp_path) == theirs

    @pytest.mark.parametrize("content", [None, "{", "[]", json.dumps(OTHER)], ids=["none", "damaged", "list", "other"])
    def test_the_name_alone_is_not_enough(self, tmp_path: Path, content: str | None) -> None:
        path = make_stage(tmp_path, ONE).path
        if content is None:
            (path / "identity.json").unlink()
        else:
            (path / "identity.json").write_text(content)
        discard_artifacts(tmp_path, "measure", ONE)
        assert (path / "x.safetensors").exists()

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        path = make_stage(tmp_path / "elsewhere", ONE).path
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / path.name).symlink_to(path)
        discard_artifacts(tmp_path / "work", "measure", ONE)
        assert (path / "x.safetensors").exists()


class TestPieces:
    def test_no_piece_goes_into_a_directory_that_has_gone(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "work", ONE)
        shutil.rmtree(tmp_path / "work")
        with pytest.raises(WorkDirectoryError, match="has gone while it was in use"):
            stage.save("y", {"t": torch.zeros(1)})
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize("keep", [0, 20], ids=["empty", "cut"])
    def test_a_damaged_piece_is_made_again_by_the_next_run(self, tmp_path: Path, keep: int) -> None:
        stage = make_stage(tmp_path, ONE)
        file = stage.path / "x.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(WorkDirectoryError, match="Run the same command again"):
            stage.load("x")
        assert not stage.has("x")
