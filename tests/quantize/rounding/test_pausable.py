import threading
from functools import partial

import pytest
import torch
from bpwise.quantize.rounding.pausable import PausableForwards, output_of, run_until
from torch import Tensor, nn


class Block(nn.Module):
    """Two linears with a residual stream, as a decoder block in small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.Identity()
        self.second = nn.Linear(4, 4, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden)
        return hidden + self.second(self.norm(hidden))


def pausable(block: Block, batches: list[Tensor], keep_paused: bool = True) -> PausableForwards:
    runs = [partial(block, batch) for batch in batches]
    return PausableForwards(block, ["first", "second"], ["norm"], runs, keep_paused=keep_paused)


def batches() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=rng) for _ in range(3)]


@pytest.mark.parametrize("keep_paused", [True, False])
def test_weights_set_between_stops_are_used(keep_paused: bool) -> None:
    block, inputs = Block(), batches()
    twice, thrice = 2 * torch.eye(4), 3 * torch.eye(4)
    with torch.no_grad(), pausable(block, inputs, keep_paused) as forwards:
        for number, batch in enumerate(inputs):
            assert torch.equal(forwards.advance(number)["first"], batch)
        block.first.weight.copy_(twice)
        for number, batch in enumerate(inputs):
            taps = forwards.advance(number)
            assert torch.equal(taps["second"], 3 * batch)
            assert torch.equal(taps[output_of("norm")], 3 * batch)
            assert "first" not in taps
        block.second.weight.copy_(thrice)
        for number, batch in enumerate(inputs):
            assert torch.equal(forwards.finish(number), 12 * batch)


def test_no_gradients_are_kept() -> None:
    block, inputs = Block(), batches()
    with pausable(block, inputs[:1]) as forwards:
        forwards.advance(0)
        forwards.advance(0)
        assert not forwards.finish(0).requires_grad


def test_error_inside_a_pass_is_raised_and_threads_end() -> None:
    block, inputs = Block(), [*batches()[:2], torch.ones(3, 5)]
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes"), pausable(block, inputs) as forwards:
        for number in range(3):
            forwards.advance(number)
        for number in range(3):
            forwards.advance(number)
    assert threading.active_count() == before
    block(inputs[0])  # nothing stops it any more


def test_leaving_early_ends_paused_passes() -> None:
    block, inputs = Block(), batches()
    before = threading.active_count()
    with pausable(block, inputs) as forwards:
        forwards.advance(0)
        forwards.advance(1)
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_passes_that_are_not_kept_are_ended_one_by_one() -> None:
    block, inputs = Block(), batches()
    before = threading.active_count()
    with pausable(block, inputs, keep_paused=False) as forwards:
        for _ in range(2):
            for number in range(3):
                forwards.advance(number)
                assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_forward_ends_at_a_module() -> None:
    block, batch = Block(), batches()[0]
    expected = batch + block.first(batch)
    with torch.no_grad():
        assert torch.equal(run_until(block.second, partial(block, batch)), expected)
        block.second.weight.zero_()
        assert torch.equal(block(batch), expected)  # nothing ends it any more
