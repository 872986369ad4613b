"""Blocks made for one rule each; what the code of real ones amounts to is in ``test_model``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bpwise.checkpoint.model.structure import BlockStructure, InputGroup, LinearPlace
from bpwise.checkpoint.trace.block import trace_block
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

WIDTH, NEURONS = 8, 12
HALF = torch.tensor(0.5)


class Block(nn.Module):
    """An MLP and a few parts more, put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up, self.down = (
            nn.Linear(*sizes) for sizes in ((WIDTH, NEURONS), (WIDTH, NEURONS), (NEURONS, WIDTH))
        )
        self.square, self.narrow, self.one = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 1)
        self.vector = nn.Parameter(torch.empty(WIDTH))
        self._forward = forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self._forward(self, hidden)


def traced(forward: Callable[[Any, Tensor], Tensor]) -> BlockStructure:
    with torch.device("meta"):
        return trace_block(Block(forward), (torch.empty(1, 5, WIDTH),), {})


def group_of(structure: BlockStructure, linear: str) -> InputGroup | None:
    return next((group for group in structure.groups if linear in group.linears), None)


def join_of(forward: Callable[[Any, Tensor], Tensor], linear: str) -> tuple[str | None, bool, float]:
    group = group_of(traced(forward), linear)
    assert group is not None
    return group.adds, group.normed, group.scale


def test_an_mlp() -> None:
    structure = traced(lambda b, h: (h + b.down(b.gate(x := b.norm(h)).relu() * b.up(x)),))
    assert structure == BlockStructure(
        groups=(
            InputGroup(("gate", "up"), reads_stream=True),
            InputGroup(("down",), adds="down"),
        ),
        places={name: LinearPlace(f"{name}.weight") for name in ("gate", "up", "down")},
    )


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        pytest.param(lambda b, h: h + b.square(h), ("square", False, 1.0), id="plain"),
        pytest.param(lambda b, h: b.square(h).float() + h, ("square", False, 1.0), id="cast"),
        pytest.param(lambda b, h: h + b.square(h.flatten(0, 1)).view_as(h), ("square", False, 1.0), id="views"),
        pytest.param(lambda b, h: h + b.square(h) * 0.22, ("square", False, 0.22), id="scaled"),
        pytest.param(lambda b, h: h + 3 * b.square(h) / 2, ("square", False, 1.5), id="scaled twice"),
        pytest.param(lambda b, h: h + HALF * b.square(h), ("square", False, 0.5), id="scaled by a tensor"),
        pytest.param(lambda b, h: h + b.norm(b.square(h)), ("norm", True, 1.0), id="normed"),
        pytest.param(lambda b, h: h + b.norm(b.square(h)) * 0.5, ("norm", True, 0.5), id="normed and scaled"),
        pytest.param(
            lambda b, h: h + (b.square(h) + b.narrow(h).sum() * h.tanh()), ("square", False, 1.0), id="beside"
        ),
        pytest.param(lambda b, h: (h + b.square(h)).mul_(b.vector), ("square", False, 1.0), id="the sum is scaled"),
        pytest.param(lambda b, h: h + b.square(h) + b.vector, ("square", False, 1.0), id="a constant comes too"),
    ],
)
def test_what_joins_the_stream(forward: Any, expected: tuple[str | None, bool, float]) -> None:
    assert join_of(forward, "square") == expected


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda b, h: h + b.square(h).tanh(), id="unknown operation"),
        pytest.param(lambda b, h: h + b.square(h) * b.one(h).sigmoid(), id="gate"),
        pytest.param(lambda b, h: h + b.square(h) * b.vector, id="scaled by a vector"),
        pytest.param(lambda b, h: h + b.norm(b.square(h) + h.tanh()), id="sum before a norm"),
        pytest.param(lambda b, h: h + b.norm(b.square(h) + b.vector), id="sum with a constant before a norm"),
        pytest.param(lambda b, h: h + b.norm(b.other_norm(b.square(h))), id="two norms"),
        pytest.param(lambda b, h: h + b.norm(b.square(h) * 0.5), id="scaled before a norm"),
        pytest.param(lambda b, h: h * 2 + b.square(h), id="to a scaled stream"),
        pytest.param(lambda b, h: b.norm(h + b.square(h)), id="norm of the sum"),
        pytest.param(lambda b, h: h + (s := b.square(h)) + s, id="twice"),
        pytest.param(lambda b, h: b.square(h), id="no stream"),
        pytest.param(lambda b, h: torch.cat([h[:, 1:] + b.square(h)[:, 1:], h[:, :1]], dim=1), id="to a part"),
        pytest.param(lambda b, h: torch.add(h, b.square(h), alpha=0.5), id="another sum"),
    ],
)
def test_what_does_not_join_plainly(forward: Any) -> None:
    assert join_of(forward, "square") == (None, False, 1.0)


def test_a_sum_in_place_on_a_part_of_the_stream_is_seen() -> None:
    def forward(block: Any, hidden: Tensor) -> Tensor:
        total = hidden + block.square(hidden)
        total[:, 1:] += hidden[:, :-1]
        return total

    assert join_of(forward, "square") == (None, False, 1.0)


def test_a_norm_of_heads_is_none_of_the_output() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH // 2)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.norm(self.out(hidden).view(1, 5, 2, WIDTH // 2)).flatten(2)

    with torch.device("meta"):
        structure = trace_block(Heads(), (torch.empty(1, 5, WIDTH),), {})
    assert structure.groups == (InputGroup(("out",)),)


@pytest.mark.parametrize(
    ("made", "reads"),
    [
        pytest.param(lambda b, h: b.norm(h), True, id="norm"),
        pytest.param(lambda b, h: b.norm(h + b.narrow(h).sum() * h).flatten(0, 1).float() * 2, True, id="later"),
        pytest.param(lambda b, h: b.norm(h)[:, 1:], True, id="part"),
        pytest.param(lambda b, h: h, False, id="the stream itself"),
        pytest.param(lambda b, h: b.norm(h).relu(), False, id="activations"),
        pytest.param(lambda b, h: b.norm(h.tanh()), False, id="norm of something else"),
    ],
)
def test_what_reads_the_stream(made: Any, reads: bool) -> None:
    group = group_of(traced(lambda b, h: b.square(made(b, h))), "square")
    assert group is not None
    assert group.reads_stream == reads


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda b, h: b.gate(h).cumsum(1) * b.up(h), id="after tokens were mixed"),
        pytest.param(lambda b, h: b.gate(h).softmax(1) * b.up(h), id="after a softmax"),
        pytest.param(lambda b, h: b.gate(h) * b.up(h * 2), id="other inputs"),
        pytest.param(lambda b, h: b.gate(h) @ b.up(h).mT, id="in a product of matrices"),
        pytest.param(lambda b, h: b.gate(h)[..., None] * b.up(h)[..., None, :], id="as an outer product"),
    ],
)
def test_linears_that_do_not_share(forward: Any) -> None:
    assert [group.linears for group in traced(forward).groups] == [("gate",), ("up",)]


def test_two_linears_that_both_add_stay_apart() -> None:
    with torch.device("meta"):
        block = Block(lambda b, h: h + b.square(h) + b.down(h))
        block.down = nn.Linear(WIDTH, WIDTH)
        structure = trace_block(block, (torch.empty(1, 5, WIDTH),), {})
    assert structure.groups == (InputGroup(("square",), adds="square"), InputGroup(("down",), adds="down"))


def test_routers_and_gates_are_in_no_group() -> None:
    structure = traced(lambda b, h: h * b.narrow(h).softmax(-1).topk(2).values.sum(-1, keepdim=True) * b.one(h))
    assert structure == BlockStructure(groups=(), routers=("narrow", "one"))


def test_what_another_matrix_lies_behind_is_no_router() -> None:
    structure = traced(lambda b, h: b.narrow(b.square(h)).topk(2).values)
    assert [group.linears for group in structure.groups] == [("square",)]
    assert structure.routers == ("narrow",)


class Rounding(nn.Linear):
    """Changes what it reads."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.round())


class Grouped(nn.Linear):
    """Multiplies each half of its input by one half of its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        halves = hidden.view(-1, 2, WIDTH // 2).transpose(0, 1)
        return (halves @ self.weight.view(2, WIDTH, WIDTH // 2).mT).transpose(0, 1).reshape(1, 5, -1)


@pytest.mark.parametrize(
    ("linear", "forward"),
    [
        pytest.param(nn.Linear(WIDTH, WIDTH), lambda b, h: b.square(b.square(h)), id="called twice"),
        pytest.param(nn.Linear(WIDTH, WIDTH), lambda b, h: functional.linear(h, b.square.weight), id="not called"),
        pytest.param(nn.Linear(WIDTH, WIDTH), lambda b, h: (b.square.weight @ h.mT).mT, id="from the left"),
        pytest.param(Rounding(WIDTH, WIDTH), lambda b, h: b.square(h), id="other inputs"),
        pytest.param(Grouped(WIDTH // 2, 2 * WIDTH), lambda b, h: b.square(h), id="grouped"),
    ],
)
def test_matrices_that_are_left_out(linear: nn.Module, forward: Any) -> None:
    with torch.device("meta"):
        block = Block(forward)
    block.square = linear.to("meta")
    assert trace_block(block, (torch.empty(1, 5, WIDTH, device="meta"),), {}) == BlockStructure(groups=())


def test_orientation_is_seen() -> None:
    with torch.device("meta"):
        block = Block(lambda b, h: h + b.square(h))
        block.square = Conv1D(WIDTH, WIDTH)
        structure = trace_block(block, (), {"hidden": torch.empty(1, 5, WIDTH)})
    assert structure.places == {"square": LinearPlace("square.weight", turned=True)}
    assert structure.groups == (InputGroup(("square",), adds="square"),)


class Experts(nn.Module):
    """Three matrices an expert, stacked, the first two as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Parameter(torch.empty(4, WIDTH, NEURONS))
        self.w1, self.w3 = (nn.Parameter(torch.empty(4, WIDTH, NEURONS)) for _ in range(2))

    def forward(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(1):  # whichever
            tokens, _ = torch.where(chosen == expert)
            own = hidden[tokens]
            neurons = (own @ self.w1[expert]).relu() * (own @ self.w3[expert])
            output.index_add_(0, tokens, functional.linear(neurons, self.w2[expert]))
        return output


def test_experts() -> None:
    def forward(block: Any, hidden: Tensor) -> Tensor:
        flat = block.norm(hidden).flatten(0, 1)
        made = block.experts(flat, block.narrow(flat).topk(2).indices).view_as(hidden)
        return hidden + (made + block.down(block.up(flat)).view_as(hidden))

    with torch.device("meta"):
        block = Block(forward)
        block.experts = Experts()
        structure = trace_block(block, (torch.empty(1, 5, WIDTH),), {})
    groups = [InputGroup(("up",), reads_stream=True), InputGroup(("down",), adds="down")]
    for number in range(4):
        first = (f"experts.{number}.w1", f"experts.{number}.w3")
        groups.append(InputGroup(first, expert=number, reads_stream=True))
        groups.append(InputGroup((f"experts.{number}.w2",), expert=number))
    assert structure.groups == tuple(groups)
    assert structure.experts == ("experts",)
    assert structure.routers == ("narrow",)
    assert structure.places["experts.3.w3"] == LinearPlace("experts.w3", expert=3, turned=True)
    assert structure.places["experts.3.w2"] == LinearPlace("experts.w2", expert=3)
    assert {*structure.places} == {name for group in groups for name in group.linears}


def test_stacks_that_no_router_chooses_from_are_no_experts() -> None:
    def forward(block: Any, hidden: Tensor) -> Tensor:
        heads = hidden.view(5, 2, WIDTH // 2).transpose(0, 1)
        return hidden + (heads @ block.heads).transpose(0, 1).reshape(1, 5, WIDTH)

    with torch.device("meta"):
        block = Block(forward)
        block.heads = nn.Parameter(torch.empty(2, WIDTH // 2, WIDTH // 2))
        assert trace_block(block, (torch.empty(1, 5, WIDTH),), {}) == BlockStructure(groups=())
