"""Gradients at the rows of tables of embeddings, from those at what blocks read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.batches import micro_batches
from ..model.calls import Calls
from ..model.stream import StreamedModel, as_hidden

__all__ = ["embedding_gradients"]


def embedding_gradients(
    model: StreamedModel, tokens: Tensor, gradient: Tensor, layer_gradients: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Return the gradients at each token's embeddings, as they are stored, from those at the blocks' inputs.

    They differ where a family scales its embeddings (Gemma, Granite), or does anything else with them on the way.

    Args:
        model: The model.
        tokens: Token ids, int64, shape (rows, tokens).
        gradient: At the first block's input, shape (rows, tokens, width).
        layer_gradients: At the embeddings of its own that every block reads, each of shape (rows, tokens, layer
            width); none where the model has no table for them.

    Returns:
        By name of the table, shape (rows, tokens, width of its rows), on the CPU: the token embeddings, and those of
        all blocks.
    """
    own = model.source.layer_embedding if layer_gradients else None
    tables = {name: model.table(name) for name in filter(None, (model.source.embedding_name, own))}
    found = {name: model.new_state(tokens, table.weight.shape[1]) for name, table in tables.items()}
    with model.outside.held():
        for batch in micro_batches(*tokens.shape):
            calls = Calls()
            outputs, gradients = [model.record(tokens[batch], batch.start, calls)], [gradient[batch]]
            shape = tuple(as_hidden(outputs[0], model.hidden_size).shape)
            for index, of_block in enumerate(layer_gradients):
                read = calls.layer_input(index, batch.start, shape, of_block.shape[-1])
                assert read is not None
                outputs.append(read)
                gradients.append(of_block[batch])
            weights = [table.weight for table in tables.values()]
            parts = torch.autograd.grad(outputs, weights, [each.to(model.device, model.dtype) for each in gradients])
            for state, part in zip(found.values(), parts, strict=True):
                state[batch] = part.view(state[batch].shape).cpu()
    return found
