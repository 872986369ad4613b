"""Weights that are read while the block before is at work: order, overlap, errors, and what the device holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.errors import CheckpointError
from bpwise.eval.metrics.passes import last_hidden
from bpwise.measure.model.stream import StreamedModel
from bpwise.progress import silent
from torch import Tensor

from .pretend import NAME, counted

MakeModel = Callable[..., Path]

LONG_SECONDS = 60.0
BLOCKS = 4


class Watched(Checkpoint):
    """A checkpoint that says which block every tensor is of, and calls back before it reads one."""

    watch: Callable[[int, str], None] = staticmethod(lambda _block, _name: None)

    def tensor(self, name: str) -> Tensor:
        if name.startswith("model.layers."):
            self.watch(int(name.split(".")[2]), name)
        return super().tensor(name)


@pytest.fixture
def source(make_model: MakeModel) -> Watched:
    return Watched.open(make_model("model", num_hidden_layers=BLOCKS))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("bpwise")]


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12)


def test_the_next_block_is_read_while_one_works(source: Watched, pretend: torch.device) -> None:
    at_work = [threading.Event() for _ in range(BLOCKS)]
    read: list[int] = []

    def watch(block: int, _name: str) -> None:
        if block not in read:
            read.append(block)
        # Only once the block before is at work, and only while it is.
        assert block == 0 or at_work[block - 1].wait(LONG_SECONDS)
        assert block < 2 or finished[block - 2]

    source.watch = watch
    finished = [False] * BLOCKS
    model = StreamedModel(source, device=pretend, dtype=torch.float32)
    hidden = model.embed(tokens())
    for index in range(BLOCKS):
        with torch.no_grad(), model.block(index, index + 1):
            at_work[index].set()
            hidden = model.run_block(index, hidden.to(pretend)).cpu()
        assert read == list(range(min(index + 2, BLOCKS)))  # one ahead, and no more
        finished[index] = True
    on_cpu = StreamedModel(Checkpoint.open(source.directory), device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(hidden, last_hidden(on_cpu, tokens(), "model", silent))


def test_backwards(source: Watched, pretend: torch.device) -> None:
    read: list[int] = []
    source.watch = lambda block, _name: read.append(block)
    model = StreamedModel(source, device=pretend, dtype=torch.float32)
    for index in reversed(range(BLOCKS)):
        with model.block(index, index - 1) as block:
            assert block.self_attn.q_proj.weight.device == pretend
    assert list(dict.fromkeys(read)) == [3, 2, 1, 0]
    assert read == sorted(read, reverse=True)


def test_a_damaged_tensor_is_told_when_its_block_is_asked_for(source: Watched, pretend: torch.device) -> None:
    def fail(block: int, name: str) -> None:
        if block == 2:
            raise CheckpointError(f"{name}: damaged. Get the model again.")

    source.watch = fail
    model = StreamedModel(source, device=pretend, dtype=torch.float32)
    with model.block(1, 2):
        pass
    with pytest.raises(CheckpointError, match=r"^model\.layers\.2\.\S+: damaged\. Get the model again\.$"):
        last_hidden(model, tokens(), "model", silent)
    with model.block(3) as block:
        assert not block.self_attn.q_proj.weight.is_meta
    assert all(parameter.is_meta for parameter in model._blocks[2].parameters())


def test_the_device_holds_one_block_and_waits_no_more(source: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, int, dict[str, int]]:
        model = StreamedModel(source, device=torch.device(NAME, 0), dtype=torch.float32)
        with counted() as counts:
            hidden = last_hidden(model, tokens(), "model", silent)
        return hidden, counts.peak_bytes - counts.start_bytes, dict(counts.waits)

    ahead = run()
    block = StreamedModel.block

    @contextmanager
    def one_by_one(self: StreamedModel, index: int, _then: int | None = None) -> Iterator[object]:
        with block(self, index) as module:
            yield module

    monkeypatch.setattr(StreamedModel, "block", one_by_one)
    plain = run()
    assert torch.equal(ahead[0], plain[0])
    assert ahead[1:] == plain[1:]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_thread(error: type[BaseException], source: Watched, pretend: torch.device) -> None:
    model = StreamedModel(source, device=pretend, dtype=torch.float32)
    seen = 0

    def watch(_hidden: Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:  # after the second block, while the third lies ready
            raise error

    with pytest.raises(error):
        last_hidden(model, tokens(), "model", silent, watch=watch)
