"""A model without weights, as Transformers builds it, and putting stored weights into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.loading.empty import empty_decoder, require_decoder
from ...checkpoint.model.config import explain_transformers, parse_config
from ...checkpoint.model.families import HEAD
from ...checkpoint.source.language import LanguageModel
from ...errors import CheckpointError
from .attention import attention_for

__all__ = [
    "build_skeleton",
    "embedding_name",
    "embedding_rows",
    "frozen_parameter",
    "loaded_weights",
    "read_weight",
    "set_parameter",
    "stored_name",
]


def embedding_name(model: Any) -> str:
    """Return the full name of the module of a model that holds its token embeddings."""
    embedding = model.get_input_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is embedding)
    return name


def read_weight(source: LanguageModel, name: str, shape: torch.Size, table: str) -> Tensor:
    """Return a parameter's values as they are stored; arguments as for ``stored_name``."""
    return source.tensor(stored_name(source, name, shape, table))


def stored_name(source: LanguageModel, name: str, shape: torch.Size, table: str) -> str:
    """Return the name under which a source has a parameter, made sure that it is there.

    Args:
        source: Where tensors come from.
        name: The parameter's name in Transformers.
        shape: Its shape there.
        table: Full name of the token embeddings' module.

    Raises:
        CheckpointError: It is missing, or has another shape.
    """
    name = source.family.file_name(name)
    if name == f"{HEAD}.weight":
        if source.tied_embeddings:
            name = f"{table}.weight"
        elif name not in source.names:
            raise CheckpointError(
                f"{source.directory}: no {name} is stored, but config.json says that the head is not the embedding. "
                "Set tie_word_embeddings to true there if it is; else get the missing file."
            )
    got = source.shape(name)
    if got == tuple(shape):
        return name
    hint = "The files do not belong together."
    tables = [each for each in (f"{table}.weight", f"{HEAD}.weight") if each in source.names]
    if name in tables and {source.shape(each) for each in tables} == {(got[0], *shape[1:])}:
        hint = f"If the vocabulary was resized, as by a merge, set vocab_size to {got[0]} in config.json."
    raise CheckpointError(
        f"{source.directory}: {name} has shape {got}. Expected {tuple(shape)} from config.json. {hint}"
    )


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def build_skeleton(
    source: LanguageModel, config: dict[str, Any], dtype: torch.dtype, device: torch.device, *, pads: bool = False
) -> Any:
    """Return a model of Transformers on the meta device; reads no weights.

    Args:
        source: Says where config.json is, for messages.
        config: What it holds.
        dtype: Floating dtype of weights and activations.
        device: Where buffers that no checkpoint holds are put.
        pads: Whether rows will be padded: attention is Transformers' own then, which heeds it.

    Raises:
        UnsupportedModelError: Transformers does not know the model type.
        CheckpointError: It does not accept config.json.
    """
    path = source.directory / "config.json"
    parsed = parse_config(config, path)
    kind = require_decoder(parsed, path)
    plain_attention = "sdpa" if kind._supports_sdpa else "eager"
    attention = plain_attention if pads else attention_for(kind)
    model = empty_decoder(parsed, path, dtype=dtype, attn_implementation=attention)
    with explain_transformers(path):
        _compute_buffers(model, device)
    return model


def _compute_buffers(model: Any, device: torch.device) -> None:
    # Buffers that no checkpoint holds (rotary frequencies) are computed by the model's own initialisation, in
    # float32 whatever the dtype of the weights: rounding them ruins long contexts.
    for module in model.modules():
        names = module._non_persistent_buffers_set
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:
            model._init_weights(module)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter into a module, under its full name there."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path).register_parameter(leaf, parameter)


@contextmanager
def loaded_weights(
    source: LanguageModel, module: nn.Module, name: str, table: str, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Hold the weights of a module on a device while the body runs; an output head's in the dtype it is stored in.

    Args:
        source: Where tensors come from.
        module: A decoder block, or the whole skeleton, of which only what is outside the blocks holds weights.
        name: Full name of the module; empty for the skeleton, whose token embeddings stay out.
        table: Full name of the module that holds the token embeddings.
        device: Where the weights go.
        dtype: Their floating dtype.
    """
    empty = dict(module.named_parameters(remove_duplicate=False))
    for inner, parameter in empty.items():
        full = f"{name}.{inner}" if name else inner
        if name or not full.startswith(f"{table}."):
            kept = None if full == f"{HEAD}.weight" else dtype
            weight = read_weight(source, full, parameter.shape, table)
            set_parameter(module, inner, frozen_parameter(weight.to(device=device, dtype=kept)))
            del weight
    try:
        yield
    finally:
        for inner, parameter in empty.items():
            set_parameter(module, inner, parameter)


@contextmanager
def embedding_rows(
    source: LanguageModel, model: Any, table: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a skeleton's embedding the rows of some tokens alone; the table as a whole stays as it is stored.

    Args:
        source: Where the table comes from.
        model: The skeleton.
        table: Token embeddings, shape (vocabulary, hidden size); None for the model's own.
        device: Where the rows go.
        dtype: Their floating dtype.

    Yields:
        A function that takes token ids and returns their places among the rows: each token has one of its own, so that
        none shares its gradient.
    """
    embedding = model.get_input_embeddings()
    if table is None:
        name = embedding_name(model)
        table = read_weight(source, f"{name}.weight", embedding.weight.shape, name)
    empty, padding = embedding.weight, embedding.padding_idx

    def rows_of(tokens: Tensor) -> Tensor:
        embedding.weight = nn.Parameter(table[tokens.flatten()].to(device, dtype))
        return torch.arange(tokens.numel(), device=device).view(tokens.shape)

    try:
        embedding.padding_idx = None  # no row is without gradient
        yield rows_of
    finally:
        embedding.weight, embedding.padding_idx = empty, padding
