"""Hidden states in files."""

import gc
import os
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.files import operations
from bpwise.errors import WorkDirectoryError
from bpwise.measure.model.states import new_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_state_in_a_file_holds_what_is_put_there_and_leaves_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = tmp_path / "made" / "here"
    values = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = new_state(values.shape, dtype, directory)
    for row in range(3):
        state[row : row + 1] = values[row : row + 1]
    state[1] *= 2
    gc.collect()
    assert torch.equal(state[0], values[0])
    assert torch.equal(state[1], values[1] * 2)
    assert not list(directory.iterdir())  # the file has no name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks the Linux kernel")
def test_a_state_is_mapped_while_it_lives(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    state = new_state((4, 8), torch.float32, tmp_path)
    view = state[1:]
    assert mapped() == 1
    del state
    view.fill_(1.0)
    assert mapped() == 1
    del view
    gc.collect()
    assert mapped() == 0


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int, _offset: int, _size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(operations.os, "posix_fallocate", full, raising=False)
    with pytest.raises(WorkDirectoryError, match=r"no place for 1 MiB .*--offload-dir"):
        new_state((1 << 18,), torch.float32, tmp_path)


def test_no_directory_is_memory() -> None:
    state = new_state((2, 3), torch.float64, None)
    assert state.shape == (2, 3)
    assert state.dtype == torch.float64
