"""Running a model with one decoder block's weights in memory at a time.

Transformers builds the model on the meta device, and its own forward prepares what blocks are given (masks, rotary
embeddings, positions): in the skeleton every block is replaced by a recorder. One run of the skeleton records each
block's arguments; the blocks are then run one after another over all rows; a last run of the skeleton, into which the
final hidden states are injected, applies whatever the model does after its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.families import HEAD, Family
from ...checkpoint.model.structure import InputGroup
from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.language import language_model
from ...errors import NumericalError
from .cast_linear import CastOnUseLinear
from .normless import hold_small_states, norms_of_stream
from .skeleton import (
    build_skeleton,
    embedding_name,
    embedding_rows,
    frozen_parameter,
    loaded_weights,
    read_weight,
    set_parameter,
    stored_name,
)
from .states import new_state
from .surgery import split_block

__all__ = ["MICRO_BATCH_TOKENS", "TAIL_TOKENS", "StreamedModel", "check_finite", "micro_batches", "whole_model"]

MICRO_BATCH_TOKENS = 2048
"""Tokens that go through a block together: enough to keep a processor busy, few enough to stay small in memory."""

TAIL_TOKENS = 256
"""Positions whose logits are held at once, of each model: 128 MiB in float32 for a vocabulary of 128k."""


def micro_batches(rows: int, row_tokens: int) -> list[slice]:
    """Cut rows into micro-batches of about 2048 tokens, at least one row each."""
    size = max(1, MICRO_BATCH_TOKENS // row_tokens)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def check_finite(tensor: Tensor, where: str, what: str = "activations") -> None:
    """Raise if a tensor holds NaN or infinity.

    Args:
        tensor: Any shape, floating point.
        where: Name of a module.
        what: What of it the tensor holds, in the plural.

    Raises:
        NumericalError: It does.
    """
    extremes = torch.stack(torch.aminmax(tensor))  # NaN goes through; one pass over memory, unlike isfinite
    if not bool(torch.isfinite(extremes).all()):
        raise NumericalError(
            f"{where}: NaN or infinity in the {what}. Check that the original model runs in this dtype."
        )


class _EndOfEmbedding(Exception):
    """Stops the skeleton's forward once every block's arguments are recorded."""


class _Recorder(nn.Module):
    """Stands in for one decoder block in the skeleton."""

    def __init__(self, owner: StreamedModel, index: int) -> None:
        super().__init__()
        self._record = owner._record
        self._index = index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._record(self._index, hidden_states, args, kwargs)


class StreamedModel:
    """A causal language model whose weights are read when they are needed and let go afterwards.

    Attributes:
        family: How its blocks are cut into linears.
        device: Where blocks run.
        dtype: Floating dtype of weights and activations while running.
        offload_dir: Where hidden states of all rows are kept; None for memory.
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
            UnsupportedModelError: Neither bpwise nor Transformers knows the model type.
            CheckpointError: Transformers does not accept config.json, or a tensor is missing or has another shape than
                config.json says.
        """
        self._source = language_model(source)
        self.family: Family = self._source.family
        self.device = device
        self.dtype = dtype
        self.offload_dir = offload_dir
        self._model: Any = build_skeleton(self._source, self._source.config, dtype, device)
        self._model.set_submodule(HEAD, CastOnUseLinear(self._model.get_submodule(HEAD)))
        for norm in norms_of_stream(self._model, self.family):
            hold_small_states(norm)
        parent = self._model.get_submodule(self.family.blocks)
        self._blocks: list[nn.Module] = list(parent)
        for block in self._blocks:
            split_block(block, self.family, self._source.config)
        table = self.embedding_name
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            stored_name(self._source, name, parameter.shape, table)
        for index in range(len(self._blocks)):
            parent[index] = _Recorder(self, index)
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._embedded: Tensor | None = None
        self._injected: Tensor | None = None

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Length of a token's hidden state."""
        return int(self._model.get_input_embeddings().weight.shape[1])

    @property
    def embedding_name(self) -> str:
        """Full name of the module that holds the token embeddings."""
        return embedding_name(self._model)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embeddings."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def tied(self) -> bool:
        """Whether the output head is the table of token embeddings."""
        return self._source.tied_embeddings

    def embeddings(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of some tokens as they are stored, shape (tokens, hidden size), on the device."""
        return self._source.tensor(f"{self.embedding_name}.weight")[tokens].to(self.device, self.dtype)

    def input_groups(self, index: int) -> tuple[InputGroup, ...]:
        """Return the input groups of a block, in the order in which it computes them; those of experts come last."""
        return self.family.input_groups(index, self._source.names)

    @property
    def multiplier(self) -> float:
        """What blocks multiply their outputs by before they add them to the residual stream."""
        key = self.family.multiplier
        return 1.0 if key is None else float(self._source.config.get(key, 1.0))

    def block_name(self, index: int) -> str:
        """Return a block's full name, for messages and tensor names."""
        return f"{self.family.blocks}.{index}"

    def embed(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        """Return what enters the first block, (rows, tokens, hidden size) on the CPU; record how blocks are called.

        Args:
            tokens: Token ids, int64, shape (rows, tokens), on any device.
            table: Token embeddings to take in the place of the model's own, shape (vocabulary, hidden size).
        """
        state = self.new_state(tokens)
        with torch.no_grad(), embedding_rows(self._source, self._model, table, self.device, self.dtype) as rows_of:
            for batch in micro_batches(*tokens.shape):
                state[batch] = self._run_embedding(rows_of(tokens[batch])).cpu()
        return state

    def new_state(self, tokens: Tensor, width: int | None = None) -> Tensor:
        """Return a tensor to be filled, shape (rows, tokens, width), in memory or in files of the offload directory.

        Args:
            tokens: Token ids, shape (rows, tokens).
            width: Values of every token; None for a hidden state.

        Raises:
            WorkDirectoryError: The offload directory has no place for it.
        """
        return new_state((*tokens.shape, width or self.hidden_size), self.dtype, self.offload_dir)

    def embedding_gradient(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at each token's embedding, as it is stored, from that at the first block's input.

        They differ where a family scales its embeddings (Gemma, Granite), or does anything else with them on the way.

        Args:
            tokens: Token ids, int64, shape (rows, tokens).
            gradient: At the first block's input, shape (rows, tokens, hidden size).

        Returns:
            Same shape as ``gradient``, on the CPU.
        """
        embedding = self._model.get_input_embeddings()
        before = self.new_state(tokens)
        with embedding_rows(self._source, self._model, None, self.device, self.dtype) as rows_of:
            for batch in micro_batches(*tokens.shape):
                embedded = self._run_embedding(rows_of(tokens[batch]))
                own = embedding.weight
                (part,) = torch.autograd.grad(embedded, own, gradient[batch].to(own))
                before[batch] = part.view(before[batch].shape).cpu()
        return before

    def _run_embedding(self, tokens: Tensor) -> Tensor:
        with suppress(_EndOfEmbedding):
            self._model(input_ids=tokens, use_cache=False)
        assert self._embedded is not None
        embedded, self._embedded = self._embedded, None
        return embedded

    @contextmanager
    def block(self, index: int) -> Iterator[Any]:
        """Hold one block's weights on the device; they go when the context ends."""
        module, table = self._blocks[index], self.embedding_name
        with loaded_weights(self._source, module, self.block_name(index), table, self.device, self.dtype):
            yield module

    def run_block(self, index: int, hidden: Tensor) -> Tensor:
        """Run one loaded block.

        Args:
            index: Which block; it must be held by ``block``.
            hidden: One micro-batch of hidden states, shape (rows, tokens, hidden size), on the device. ``embed`` must
                have seen a micro-batch of the same rows and tokens.

        Returns:
            The block's output, same shape.
        """
        args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
        output = self._blocks[index](hidden, *args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @contextmanager
    def tail(self) -> Iterator[Any]:
        """Hold all outside the blocks (final norm, head) on the device; yields the head, a ``CastOnUseLinear``."""
        head = self._model.get_submodule(HEAD)
        with loaded_weights(self._source, self._model, "", self.embedding_name, self.device, self.dtype):
            yield head

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply what the model does after its blocks. ``tail`` must be held.

        Args:
            hidden: Output of the last block, shape (rows, tokens, hidden size), on the device.

        Returns:
            Shape (rows, tokens, vocabulary).
        """
        self._injected = hidden
        try:
            logits: Tensor = self._model(inputs_embeds=hidden.detach(), use_cache=False).logits
        finally:
            self._injected = None
        return logits

    def _record(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._injected is not None:
            return self._injected
        calls = self._calls.setdefault(tuple(hidden.shape[:2]), [((), {})] * self.block_count)
        calls[index] = (args, kwargs)
        if index == self.block_count - 1:
            self._embedded = hidden
            raise _EndOfEmbedding
        return hidden


def whole_model(source: TensorSource, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with all of its weights in memory, as Transformers itself would load it.

    Args:
        source: Where configuration and tensors come from; what is quantized is decoded.
        device: Where the model is put.
        dtype: Floating dtype of all weights.

    Returns:
        A ``PreTrainedModel`` in evaluation mode. Its output head shares the token embeddings' memory where the source
        has no head of its own.

    Raises:
        UnsupportedModelError: Transformers does not know the model type.
        CheckpointError: A tensor is missing or has another shape than config.json says.
    """
    language = language_model(source)
    config = {**language.config, "tie_word_embeddings": language.tied_embeddings}
    model = build_skeleton(language, config, dtype, device, pads=True)
    for block in model.get_submodule(language.family.blocks):
        split_block(block, language.family, config)
    table = embedding_name(model)
    for name, parameter in list(model.named_parameters()):  # a tied head is left out here, and follows at the end
        stored = read_weight(language, name, parameter.shape, table)
        set_parameter(model, name, frozen_parameter(stored.to(device, dtype)))
    model.tie_weights()
    return model
