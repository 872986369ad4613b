"""Norms whose output matrices alone read, and what they add to their weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bpwise.checkpoint.model.structure import LinearPlace
from bpwise.checkpoint.trace.block import trace_block
from bpwise.checkpoint.trace.norms import weight_offset
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

WIDTH = 8


class Block(nn.Module):
    """Two norms and two linears, put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], *, spare: bool = False) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.turned = nn.Parameter(torch.empty(WIDTH, 6))
        if spare:
            self.spare = nn.Linear(WIDTH, WIDTH)
        self._forward = forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self._forward(self, hidden)


def norms(forward: Callable[[Any, Tensor], Tensor], *, spare: bool = False) -> dict[str, tuple[str, ...]]:
    with torch.device("meta"):
        structure = trace_block(Block(forward, spare=spare), (torch.empty(1, 5, WIDTH),), {})
    return {norm: tuple(place.parameter for place in places) for norm, places in structure.norms.items()}


def test_readers_of_a_norm() -> None:
    assert norms(lambda b, h: h + b.second(b.first(b.norm(h)))) == {"norm": ("first.weight",)}


def test_views_and_picked_tokens_are_read_through() -> None:
    def forward(b: Any, h: Tensor) -> Tensor:
        x = b.norm(h)
        return h + b.second(b.first(x.reshape(-1, WIDTH)[torch.tensor([0, 1, 2, 3, 4])])).view(h.shape) * x.size(1)

    assert norms(forward) == {"norm": ("first.weight",)}


def test_a_matrix_that_is_stored_turned() -> None:
    with torch.device("meta"):
        block = Block(lambda b, h: h + b.second(b.first(b.norm(h)) + b.norm(h) @ b.turned))
        norm = trace_block(block, (torch.empty(1, 5, WIDTH),), {}).norms
    assert norm == {}  # called twice: each call would need factors of its own


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda b, h: b.second(b.first(x := b.norm(h))) + x, id="joins the stream"),
        pytest.param(lambda b, h: h + b.second(b.first((b.norm(h) * 2).tanh())), id="what is not linear"),
        pytest.param(lambda b, h: b.norm(h + b.second(b.first(h))), id="the output"),
        pytest.param(lambda b, h: h + b.second(b.first(b.norm(h).view(1, 5, 2, 4).flatten(2))), id="cut into heads"),
        pytest.param(lambda b, h: h + b.second(b.first(b.norm(h).softmax(-1))), id="channels that meet"),
    ],
)
def test_other_readers(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert norms(forward) == {}


def test_linears_that_were_not_called() -> None:
    def forward(b: Any, h: Tensor) -> Tensor:
        return h + b.second(b.first(b.norm(h)))  # type: ignore[no-any-return]

    assert norms(forward, spare=True) == {}


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (nn.RMSNorm(WIDTH), 0.0),
        (nn.LayerNorm(WIDTH), 0.0),
        (LlamaRMSNorm(WIDTH), 0.0),
        (Gemma3RMSNorm(WIDTH), 1.0),
        (Qwen3NextRMSNorm(WIDTH), 1.0),
        (OlmoLayerNorm(WIDTH), None),
        (nn.GroupNorm(2, WIDTH), None),
    ],
)
def test_offset_of_a_weight(norm: nn.Module, offset: float | None) -> None:
    assert weight_offset(norm.to("meta")) == offset


def test_places_tell_the_orientation() -> None:
    with torch.device("meta"):
        block = Block(lambda b, h: h + b.second(b.norm(h) @ b.turned + b.first(h)))
        structure = trace_block(block, (torch.empty(1, 5, WIDTH),), {})
    assert structure.norms == {"norm": (LinearPlace("turned", turned=True),)}
