"""The structure of a whole model, found by one run on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import BpwiseError, UnsupportedModelError, reason
from ..model.structure import BlockStructure, ModelStructure
from .block import read_structure
from .recording import Recording, WithoutValues, record

__all__ = ["discover", "list_of_blocks"]

_TOKENS = 8
"""Length of the sequence that blocks are traced on."""


def discover(model: Any) -> ModelStructure:
    """Return the structure of a causal language model.

    Its own forward runs once, on the meta device; weights need not be there.

    Args:
        model: A ``PreTrainedModel``; it is left as it was.

    Raises:
        UnsupportedModelError: It has no list of decoder blocks, does not run without values, or does not call each
            block once.
    """
    where = str(model.config.model_type)
    name, modules = list_of_blocks(model)
    blocks = list(dict.fromkeys(modules))
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(_ready(model))
        for block in blocks:
            stack.enter_context(watch.over(block))
        _run(model, where)
    if watch.seen != blocks:
        raise UnsupportedModelError(
            f"{where}: its blocks are not run one after another. Got {len(watch.seen)} calls of the {len(blocks)} "
            f"modules of {name}. Expected each once, in their order. Choose another model."
        )
    return ModelStructure(
        blocks=name,
        embedding=_name_of(model, model.get_input_embeddings(), "token embeddings", where),
        head=_name_of(model, model.get_output_embeddings(), "output head", where),
        structures=tuple(watch.structures),
    )


def list_of_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder blocks of a model, and the full name of their list: that which holds most weights.

    Raises:
        UnsupportedModelError: The model has no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no decoder blocks were found. Expected a ModuleList that holds them. Choose "
            "another model."
        )
    return max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))


def _run(model: Any, where: str) -> None:
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), WithoutValues():
            model(input_ids=tokens, use_cache=False)
    except (BpwiseError, MemoryError):
        raise
    except Exception as cause:  # of whatever type modelling code raises
        raise UnsupportedModelError(
            f"{where}: the model does not run without weights ({type(cause).__name__}: {reason(cause)}). Choose "
            "another model."
        ) from cause


class _Watch:
    """Traces blocks while they run.

    Attributes:
        seen: Blocks in the order of their calls.
        structures: One each; those of blocks that compute the same are one object.
    """

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []
        self.structures: list[BlockStructure] = []
        self._kinds: list[tuple[Recording, BlockStructure]] = []

    @contextmanager
    def over(self, block: Any) -> Iterator[None]:
        """Watch a block; it stays in its place, as models look at attributes of their blocks."""
        forward: Callable[..., Any] = block.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            recording = record(block, forward, args, kwargs)
            self.seen.append(block)
            self.structures.append(self._structure(block, recording))
            return recording.result

        block.forward = watched
        try:
            yield
        finally:
            del block.forward

    def _structure(self, block: nn.Module, recording: Recording) -> BlockStructure:
        for known, structure in self._kinds:
            if recording == known:
                return structure
        structure = read_structure(block, recording)
        alike = (x for _, x in self._kinds if x == structure and x.norms == structure.norms)
        structure = next(alike, structure)
        self._kinds.append((recording, structure))
        return structure


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    # In evaluation mode, attention and experts written out: kernels ask for some dtypes and sizes. Afterwards all is as
    # it was, buffers too: rotary embeddings put their frequencies where their input is.
    config, training = model.config, model.training
    attention, experts = config._attn_implementation, config._experts_implementation
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.eval()
    config._attn_implementation = config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = attention, experts
        model.train(training)
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)


def _name_of(model: nn.Module, wanted: nn.Module | None, what: str, where: str) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    if not names:
        raise UnsupportedModelError(
            f"{where}: the model has no {what}. Expected a causal language model. Choose another model."
        )
    return names[0]
