"""The check that blocks do on their own what they do inside the model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from .stream import StreamedModel

__all__ = ["check_replay"]

_ROWS, _TOKENS = 2, 16

_SAME = 1e-5
"""Largest difference of a block's outputs that counts as rounding, relative to the largest of them, in float32."""


def check_replay(model: StreamedModel) -> None:
    """Refuse a model whose blocks, run one after another, do something else than in the model's own forward.

    The first block of every structure is run both ways on two sequences of 16 tokens, each a micro-batch.

    Args:
        model: The model; it is asked for its weights, block by block.

    Raises:
        UnsupportedModelError: A block's outputs differ.
    """
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocabulary, (_ROWS, _TOKENS), generator=rng)
    rows = tokens.split(1)
    with torch.no_grad():
        hidden = [model.embed(row, first_row=number) for number, row in enumerate(rows)]
        structures = model.source.structure.structures
        for index in sorted({structures.index(each) for each in structures}):
            if model.calls.hands_state and index:
                return  # later blocks may read what those before them write
            with model.block(index):
                for number, row in enumerate(rows):
                    alone = model.run_block(index, hidden[number].to(model.device), number)
                    _require_same(model.block_name(index), alone, model.run_in_place(index, row))


def _require_same(block: str, alone: Tensor, in_place: Tensor) -> None:
    worst = float((alone - in_place).abs().max() / in_place.abs().max().clamp(min=1e-30))
    if not worst <= _SAME:
        raise UnsupportedModelError(
            f"{block}: run on its own it does not do what it does in the model. Got outputs that differ by {worst:.2g} "
            "of their largest. Expected the same. Choose another model."
        )
