"""Running a model with one decoder block's weights in memory at a time.

Transformers builds the model on the meta device, and its own forward prepares what blocks are given (masks, rotary
embeddings, positions): in the skeleton a recorder takes the place of every block's forward. One run of the skeleton
records each block's arguments; the blocks are then run one after another over all rows; a last run of the skeleton,
into which the final hidden states are injected, applies whatever the model does after its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.model.structure import BlockStructure, InputGroup
from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.language import LanguageModel, language_model
from ...linalg.ahead import MadeAhead
from ..layers.cast_linear import CastOnUseLinear
from ..layers.normless import hold_small_states, norms_of_stream
from .batches import micro_batches
from .calls import Calls
from .outside import OutsideWeights
from .recorder import Recorder
from .skeleton import WeightReader, build_skeleton, loaded_weights, require_stored
from .states import new_state
from .surgery import split_block

__all__ = ["StreamedModel", "as_hidden", "as_state"]


class StreamedModel:
    """A causal language model whose weights are read when they are needed and let go afterwards.

    Attributes:
        source: Where configuration and tensors come from.
        device: Where blocks run.
        dtype: Floating dtype of weights and activations while running.
        offload_dir: Where hidden states of all rows are kept; None for memory.
        calls: How blocks are called, as ``embed`` recorded it.
        outside: Weights of what is outside of the blocks.
    """

    def __init__(
        self, source: TensorSource, *, device: torch.device, dtype: torch.dtype, offload_dir: Path | None = None
    ) -> None:
        """Build the skeleton; reads no weights.

        Args:
            source: Where configuration and tensors come from.
            device: Where blocks run.
            dtype: Floating dtype of weights and activations.
            offload_dir: A directory for hidden states of all rows; None keeps them in memory.

        Raises:
            UnsupportedModelError: Transformers does not know the model type.
            CheckpointError: Transformers does not accept config.json, or a tensor is missing or has another shape than
                config.json says.
        """
        self.source: LanguageModel = language_model(source)
        self.device = device
        self.dtype = dtype
        self.offload_dir = offload_dir
        self._model: Any = build_skeleton(self.source, self.source.config, dtype, device)
        self._blocks: list[Any] = list(self._model.get_submodule(self.source.blocks))
        for block in self._blocks:
            split_block(block, self.source.listed, self.source.config)
        require_stored(self.source, self._model)
        self._model.set_submodule(self.source.head_name, CastOnUseLinear(self._model.get_output_embeddings()))
        groups = [group for each in self.source.structure.structures for group in each.groups]
        for norm in norms_of_stream(self._model, self.source.blocks, groups):
            hold_small_states(norm)
        self._weights = WeightReader(self.source, device, dtype)
        self.outside = OutsideWeights(self._model, self.source.blocks, self._weights.read, self._weights.place)
        self._recorder = Recorder(self._model, self._blocks, str(self.source.directory / "config.json"))
        self.calls = Calls()
        self._ahead = MadeAhead(partial(self._weights.of_block, self._blocks, self.source.blocks))

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Length of a token's embedding."""
        return int(self._model.get_input_embeddings().weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """Rows of the token embeddings."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    def embeddings(self, tokens: Tensor, table: str) -> Tensor:
        """Return the embeddings of some tokens as a table stores them, shape (tokens, width), on the CPU."""
        return self.source.parameter(table)[tokens].to(self.dtype)

    def structure(self, index: int) -> BlockStructure:
        """Return the structure of a block."""
        return self.source.structure.structures[index]

    def linear_names(self, index: int, group: InputGroup) -> tuple[str, ...]:
        """Return the full names of an input group's linears in one block."""
        return tuple(f"{self.block_name(index)}.{name}" for name in group.linears)

    def block_name(self, index: int) -> str:
        """Return a block's full name, for messages and tensor names."""
        return f"{self.source.blocks}.{index}"

    def embed(
        self, tokens: Tensor, table: Tensor | None = None, calls: Calls | None = None, first_row: int = 0
    ) -> Tensor:
        """Return what enters the first block, on the CPU; record how blocks are called.

        Args:
            tokens: Token ids, int64, shape (rows, tokens).
            table: Token embeddings to use instead of the model's own, shape (vocabulary, hidden size).
            calls: Where to record; None for the model's own record, which ``run_block`` looks at.
            first_row: Number of the first row, as ``run_block`` takes it.

        Returns:
            Shape (rows, tokens, width): a token's hidden states one after another where the model has several.
        """
        tables = {} if table is None else {self.source.embedding_name: table}
        state: Tensor | None = None
        with torch.no_grad(), self.outside.held(tables):
            for batch in micro_batches(*tokens.shape):
                embedded = self.record(tokens[batch], first_row + batch.start, calls or self.calls)
                if state is None:
                    state = self.new_state(tokens, embedded.shape[-1])
                state[batch] = embedded.cpu()
        assert state is not None
        return state

    def new_state(self, tokens: Tensor, width: int | None = None) -> Tensor:
        """Return a tensor to be filled, shape (rows, tokens, width), in memory or in files of the offload directory.

        Args:
            tokens: Token ids, shape (rows, tokens).
            width: Values of every token; None for an embedding.

        Raises:
            WorkDirectoryError: The offload directory has no place for it.
        """
        return new_state((*tokens.shape, width or self.hidden_size), self.dtype, self.offload_dir)

    def record(self, tokens: Tensor, first_row: int, calls: Calls) -> Tensor:
        """Return what enters the first block for one micro-batch; arguments as for ``embed``."""
        return as_state(self._recorder.record(tokens.to(self.device), first_row, calls))

    def table(self, name: str) -> Any:
        """Return the module of a table of embeddings; while a micro-batch is recorded it has a row for every token."""
        return self._model.get_submodule(name)

    @contextmanager
    def block(self, index: int, then: int | None = None) -> Iterator[Any]:
        """Hold one block's weights on the device; they go when the context ends.

        Args:
            index: Which block.
            then: The block that is asked for next; None, or a number that no block has, if there is none. Where the
                device is not the CPU itself, a thread reads that block's weights into memory while the context lasts.

        Raises:
            BpwiseError: A weight cannot be read; of a block that was read ahead, when that block is asked for.
        """
        ahead = then if self.device.type != "cpu" and then in range(self.block_count) else None
        block, weights = self._blocks[index], self._ahead.take(index)
        with loaded_weights(block, weights, self._weights.place), self._ahead.making(ahead):
            yield block

    def layer_input(self, index: int, hidden: Tensor, first_row: int) -> Tensor | None:
        """Return the embeddings of its own that a block reads, shape (rows, tokens, layer width); None without any.

        Arguments are those of ``run_block``.
        """
        if self.source.layer_embedding is None:
            return None
        width = self.table(self.source.layer_embedding).weight.shape[1] // self.block_count
        return self.calls.layer_input(index, first_row, tuple(as_hidden(hidden, self.hidden_size).shape), width)

    def run_block(
        self,
        index: int,
        hidden: Tensor,
        first_row: int = 0,
        calls: Calls | None = None,
        layer_input: Tensor | None = None,
    ) -> Tensor:
        """Run one loaded block.

        Args:
            index: Which block; it must be held by ``block``.
            hidden: One micro-batch of hidden states, shape (rows, tokens, width), on the device. ``embed`` must
                have seen a micro-batch of the same rows and tokens.
            first_row: The first of its rows among all.
            calls: As ``embed`` recorded them.
            layer_input: Stands in for the embeddings of its own that the block reads.

        Returns:
            The block's output, same shape.
        """
        own = as_hidden(hidden, self.hidden_size)
        args, kwargs = (calls or self.calls).of(index, first_row, tuple(own.shape), layer_input)
        output = self._blocks[index](own, *args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return as_state(states)

    @contextmanager
    def tail(self) -> Iterator[Any]:
        """Hold what runs after the blocks (final norm, head) on the device; yields the head, a ``CastOnUseLinear``."""
        head = self._model.get_submodule(self.source.head_name)
        with self.outside.held():
            self.outside.load(head)
            yield head

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply what the model does after its blocks. ``tail`` must be held.

        Args:
            hidden: Output of the last block, shape (rows, tokens, width), on the device.

        Returns:
            Shape (rows, tokens, vocabulary).
        """
        with self.outside.blank_tables():
            return self._recorder.logits(as_hidden(hidden, self.hidden_size))

    def run_in_place(self, index: int, tokens: Tensor) -> Tensor:
        """Run one loaded block inside the model's own forward, blocks before it handing on what they get.

        Args:
            index: Which block; it must be held by ``block``.
            tokens: Token ids of one micro-batch, int64, shape (rows, tokens).

        Returns:
            The block's output, shape (rows, tokens, width).
        """
        with self.outside.held():
            return as_state(self._recorder.run_in_place(index, tokens.to(self.device)))


def as_state(hidden: Tensor) -> Tensor:
    """Return hidden states by token: several of one token (Gemma 3n has four, outermost) become one long one."""
    return hidden if hidden.ndim == 3 else hidden.permute(1, 2, 0, 3).flatten(2)


def as_hidden(state: Tensor, hidden_size: int) -> Tensor:
    """Return hidden states as the model has them; the counterpart of ``as_state``."""
    if state.shape[-1] == hidden_size:
        return state
    hidden: Tensor = state.unflatten(2, (-1, hidden_size)).permute(2, 0, 1, 3)
    return hidden
