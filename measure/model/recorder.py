"""Runs of a skeleton in which a recorder takes the place of every block's forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ..layers.experts import hold_forward
from .calls import Calls

__all__ = ["Recorder"]


class _EndOfEmbedding(Exception):
    """Stops the skeleton's forward once every block's arguments are recorded."""


class _WrongReturn(Exception):
    """Stops the skeleton's forward: its blocks return something else than was tried."""


class Recorder:
    """Runs what a model does before its blocks, and what it does after them."""

    def __init__(self, model: Any, blocks: Sequence[Any], where: str) -> None:
        """Take a model; nothing runs.

        Args:
            model: A causal language model of Transformers.
            blocks: Its decoder blocks.
            where: Its config.json, for messages.
        """
        self._model = model
        self._blocks = blocks
        self._where = where
        self._tuple_length: int | None = None  # of what blocks return; 0 for a tensor, None until that is known
        self._tried_length = 0
        self._calls = Calls()
        self._first_row = 0
        self._last: Tensor | None = None
        self._embedded: Tensor | None = None
        self._injected: Tensor | None = None
        self._live: int | None = None

    def record(self, tokens: Tensor, first_row: int, calls: Calls) -> Tensor:
        """Return what enters the first block, and record how blocks are called.

        Args:
            tokens: Token ids of one micro-batch, int64, shape (rows, tokens), on the device.
            first_row: The first of its rows among all.
            calls: Where to record.

        Returns:
            As the model has it: shape (rows, tokens, hidden size), before it another dimension in some models.

        Raises:
            UnsupportedModelError: The model changes hidden states between its blocks.
        """
        self._calls, self._first_row = calls, first_row
        with suppress(_EndOfEmbedding):
            self._run(tokens)
        assert self._embedded is not None
        embedded, self._embedded = self._embedded, None
        return embedded

    def run_in_place(self, index: int, tokens: Tensor) -> Tensor:
        """Run one loaded block inside the model's own forward, blocks before it handing on what they get.

        Args:
            index: Which block.
            tokens: As for ``record``.

        Returns:
            The block's output, as the model has it.
        """
        self._live = index
        try:
            return self.record(tokens, 0, Calls())
        finally:
            self._live = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply what the model does after its blocks; what it does before them is thrown away.

        Args:
            hidden: Output of the last block, as the model has it.

        Returns:
            Shape (rows, tokens, vocabulary).
        """
        self._injected = hidden
        try:
            tokens = torch.zeros(hidden.shape[-3:-1], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._run(tokens).logits
        finally:
            self._injected = None
        return logits

    def _run(self, tokens: Tensor) -> Any:
        # Blocks return a tensor, or a tuple that begins with one; nothing says which but that the model goes on.
        for length in (0, 1, 2) if self._tuple_length is None else (self._tuple_length,):
            self._tried_length = length
            try:
                with ExitStack() as stack:
                    for index, block in enumerate(self._blocks):
                        stack.enter_context(hold_forward(block, partial(self._record, index)))
                    output = self._model(input_ids=tokens, use_cache=False)
                if output.logits.ndim == 3:
                    self._tuple_length = length
                    return output
            except (_WrongReturn, ValueError, TypeError, IndexError):
                if self._tuple_length is not None:
                    raise
        raise UnsupportedModelError(
            f"{self._where}: {type(self._model).__name__} cannot be run block by block. Got blocks whose outputs are "
            "changed before the next one gets them. Choose another model."
        )

    def _record(self, index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._injected is not None:
            return self._returned(self._injected)
        if index == 0:
            self._calls.begin()
        elif self._last is None or not _is_same(hidden, self._last):
            raise _WrongReturn
        else:
            self._tuple_length = self._tried_length
        if index == self._live:
            output = type(self._blocks[index]).forward(self._blocks[index], hidden, *args, **kwargs)
            self._embedded = output[0] if isinstance(output, tuple) else output
            raise _EndOfEmbedding
        self._calls.record(index, len(self._blocks), self._first_row, hidden, (args, kwargs))
        self._last = hidden
        if index == len(self._blocks) - 1:
            self._embedded = hidden
            raise _EndOfEmbedding
        return self._returned(hidden)

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._tried_length - 1)) if self._tried_length else hidden


def _is_same(hidden: Tensor, before: Tensor) -> bool:
    # A view of the whole is as good.
    return hidden is before or (hidden.data_ptr() == before.data_ptr() and hidden.shape == before.shape)
