"""A model without weights, as Transformers builds it, and putting stored weights into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.loading.empty import empty_decoder, require_decoder
from ...checkpoint.model.config import explain_transformers, parse_config
from ...checkpoint.source.language import LanguageModel
from ...errors import CheckpointError
from ..layers.attention import attention_for

__all__ = [
    "WeightReader",
    "build_skeleton",
    "loaded_weights",
    "own_tensors",
    "require_stored",
    "set_tensor",
    "stored_tensors",
]


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
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one expert after another, which can be watched
    with explain_transformers(path):
        _compute_buffers(model, device)
    return model


def _compute_buffers(model: Any, device: torch.device) -> None:
    # Buffers that no checkpoint holds (rotary frequencies) are computed by the model's own initialisation, in
    # float32 whatever the dtype of the weights: rounding them ruins long contexts.
    from transformers import PreTrainedModel  # noqa: PLC0415 - seconds to import

    owners = {"": model}
    asked = []
    for path, module in model.named_modules():
        owners[path] = module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        # A model may compute those of its blocks for them.
        if module._non_persistent_buffers_set or owners[path] is module:
            asked.append((owners[path], module))
    for owner, module in reversed(asked):
        owner._init_weights(module)


def require_stored(source: LanguageModel, model: nn.Module) -> None:
    """Refuse a source that lacks a tensor of a skeleton, or has one of another shape; reads no weights.

    Raises:
        CheckpointError: It does.
    """
    head = f"{source.head_name}.weight"
    table = f"{source.embedding_name}.weight"
    for name, tensor in stored_tensors(model).items():
        if name == head and source.tied_embeddings:
            continue
        if name == head and not source.has_parameter(name):
            raise CheckpointError(
                f"{source.directory}: no {name} is stored, but config.json says that the head is not the embedding. "
                "Set tie_word_embeddings to true there if it is; else get the missing file."
            )
        got = source.parameter_shape(name)
        if got == tuple(tensor.shape):
            continue
        hint = "The files do not belong together."
        tables = [each for each in (table, head) if source.has_parameter(each)]
        if name in tables and {source.parameter_shape(each) for each in tables} == {(*got[:1], *tensor.shape[1:])}:
            hint = f"If the vocabulary was resized, as by a merge, set vocab_size to {got[0]} in config.json."
        raise CheckpointError(
            f"{source.directory}: {name} has shape {got}. Expected {tuple(tensor.shape)} from config.json. {hint}"
        )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and stored buffers that a module holds itself, by name."""
    buffers = {name: each for name, each in module.named_buffers(recurse=False) if each is not None}
    stored = {name: each for name, each in buffers.items() if name not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **stored}


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and stored buffers of a module and all that is in it, by name."""
    return {
        f"{path}.{name}" if path else name: each
        for path, inner in module.named_modules()
        for name, each in own_tensors(inner).items()
    }


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter, which takes no gradient, or a buffer in the place of one that a module has.

    Args:
        module: The module.
        name: Name inside it, with dots.
        tensor: The new values.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        setattr(owner, leaf, tensor)
    else:
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        owner.register_parameter(leaf, parameter)


class WeightReader:
    """Reads the weights of a model, for a device and a dtype."""

    def __init__(self, source: LanguageModel, device: torch.device, dtype: torch.dtype) -> None:
        """Hold what to read; nothing is.

        Args:
            source: Where weights are read from.
            device: Where they are used.
            dtype: Floating dtype that they are used in, the output head apart: that is cast as it is used.
        """
        self._source = source
        self._device = device
        self._dtype = dtype
        self._head = f"{source.head_name}.weight"

    def read(self, name: str) -> Tensor:
        """Return a parameter or buffer by its full name, as it is stored, on the CPU."""
        tied = name == self._head and self._source.tied_embeddings
        return self._source.parameter(f"{self._source.embedding_name}.weight" if tied else name)

    def of_block(self, blocks: Sequence[nn.Module], path: str, index: int) -> Iterator[tuple[str, Tensor]]:
        """Read the weights of a decoder block, one after another, as they are used but not on the device.

        Args:
            blocks: All decoder blocks.
            path: Full name of their list.
            index: Which block.

        Returns:
            Names in the block, and weights: for CUDA in page-locked memory, from which a device copies by itself.
        """
        for inner in stored_tensors(blocks[index]):
            weight = self.read(f"{path}.{index}.{inner}")
            dtype = self._dtype if weight.is_floating_point() else weight.dtype
            if self._device.type == "cuda" and weight.device.type == "cpu":
                # Page-locked memory may be limited: a copy from other memory is only waited for.
                with suppress(RuntimeError):
                    weight = torch.empty_like(weight, dtype=dtype, pin_memory=True).copy_(weight)
            yield inner, weight.to(dtype)

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, in the dtype that it is used in, by its full name or that in its block."""
        kept = not tensor.is_floating_point() or name == self._head
        # CUDA copies what is not page-locked before it lets the host go on, so that this is safe for all.
        asynchronous = self._device.type == "cuda"
        return tensor.to(self._device, tensor.dtype if kept else self._dtype, non_blocking=asynchronous)


@contextmanager
def loaded_weights(
    module: nn.Module, weights: Iterable[tuple[str, Tensor]], place: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Hold the weights of a module while the body runs.

    Args:
        module: A decoder block.
        weights: Its parameters and buffers, by their names in it; each is placed before the next is asked for.
        place: Brings one onto the device, in the dtype that it is used in.
    """
    empty = stored_tensors(module)
    try:
        for inner, tensor in weights:
            set_tensor(module, inner, place(inner, tensor))
            del tensor
        yield
    finally:
        for inner, tensor in empty.items():
            set_tensor(module, inner, tensor)
