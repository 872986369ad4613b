"""What a target leaves for the tensors of a GGUF file, and the plans that are possible before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...checkpoint.source.language import LanguageModel, language_model
from ...checkpoint.source.linears import Linear, model_linears
from ...errors import BudgetError, ConfigError
from ...measure.text.context import context_tokens
from ...tables import bytes_text
from ..conversion import Conversion, Target
from ..names import size_text
from .file.header import GgufHeader
from .file.writer import planned_bytes
from .ggml.curves import measured_types
from .labels import ComingSizes, coming_header, tensors_bytes
from .llama_cpp.assign import mixture_types
from .llama_cpp.mixtures import Mixture, mixture
from .llama_cpp.vram import room_for_weights
from .options import GgufOptions
from .plan.layout import ALIGNMENT_BYTES, Layout
from .plan.plan import TypeOverride
from .plan.problem import PlanProblem, estimated_problem, unmeasured_problem

__all__ = ["LabelledConversion", "coming_problem", "largest_file", "room_for_tensors", "room_in_vram"]


def coming_problem(source: LanguageModel, layout: Layout | None, overrides: Sequence[TypeOverride]) -> PlanProblem:
    """Return the problem that a measurement will pose.

    Args:
        source: The model.
        layout: The unquantized file; None if there is none yet, which makes it an estimate.
        overrides: Types that tensors must have.

    Raises:
        ConfigError: An override matches nothing or does not fit.
    """
    types = [kind.name for kind in measured_types()]
    linears, head = model_linears(source)
    table = Linear(source.embedding_name, head.in_features, head.out_features)
    matrices = [*linears, *([] if source.tied_embeddings else [head]), table]
    if source.layer_embedding is not None:
        tokens, width = source.shape(f"{source.layer_embedding}.weight")
        matrices.append(Linear(source.layer_embedding, width, tokens))
    if layout is not None:
        return unmeasured_problem(layout, [each.name for each in matrices], types, overrides)
    planned = {f"{linear.name}.weight" for linear in (*matrices, head)}
    other_weights = sum(math.prod(source.shape(name)) for name in source.names - planned)
    return estimated_problem(matrices, other_weights, types, overrides)


def largest_file(target: Target, source: LanguageModel, header: GgufHeader | None = None) -> int | None:
    """Return how large a file may be, in bytes; None where bits per weight are asked for.

    Args:
        target: What is asked for.
        source: The model.
        header: The unquantized file's; None if there is none yet, which makes sizes of mixtures estimates. What goes
            into the memory of a GPU is one in any case: see ``bytes_for_vram``.

    Raises:
        BudgetError: The memory of a GPU leaves nothing for weights.
        ConfigError: The length of the context is not known, or the mixture to be as large as.
        UnsupportedModelError: llama.cpp has rules of its own for this architecture.
    """
    if target.size_of is not None:
        return _mixture_file(mixture(target.size_of), source, header)
    if target.vram_bytes is None:
        return target.max_bytes
    return round(room_in_vram(target, source) / (1 - _share_in_main_memory(source)))


def room_in_vram(target: Target, source: LanguageModel) -> int:
    """Return the bytes of a GPU's memory that are left for tensors.

    Args:
        target: Names the memory, and maybe the context.
        source: The model.

    Raises:
        BudgetError: Nothing is left.
        ConfigError: The length of the context is not known.
    """
    assert target.vram_bytes is not None
    context = target.context_tokens or context_tokens(source)
    if context is None:
        raise ConfigError("config.json: max_position_embeddings is missing. Give the length of the context: --context.")
    return room_for_weights(target.vram_bytes, source.config, context)


def room_for_tensors(max_bytes: int, header: GgufHeader, metadata: Mapping[str, Any]) -> int:
    """Return the bytes that a largest file leaves for its tensors.

    Args:
        max_bytes: Size of the file.
        header: The unquantized file's.
        metadata: Entries that are added to its own.

    Raises:
        BudgetError: It leaves none.
    """
    tensors = sum(tensor.size_bytes for tensor in header.tensors.values())
    overhead = planned_bytes(header, {}, file_type=0, metadata=metadata)
    room = max_bytes - (overhead - tensors) - ALIGNMENT_BYTES * len(header.tensors)
    if room <= 0:
        raise BudgetError(
            f"a file of {bytes_text(max_bytes)} has no room for tensors: metadata and vocabulary take "
            f"{bytes_text(max_bytes - room)}. Ask for a larger file."
        )
    return room


def _share_in_main_memory(source: LanguageModel) -> float:
    # Of all weights, those that llama.cpp keeps there: the table of embeddings, unless it is the head, too.
    table = 0 if source.tied_embeddings else math.prod(source.shape(f"{source.embedding_name}.weight"))
    return table / sum(math.prod(source.shape(name)) for name in source.names)


def _mixture_file(chosen: Mixture, source: LanguageModel, header: GgufHeader | None) -> int:
    # Size of llama-quantize's file, made with an importance matrix; its own notes on that aside.
    known = coming_header(source) if header is None else header
    types = mixture_types(chosen, known, importance=known.tensors.keys())
    return tensors_bytes(known, types) if header is None else planned_bytes(header, types, file_type=chosen.file_type)


class LabelledConversion(Conversion):
    """An original on its way to GGUF files, as far as their names go."""

    options: GgufOptions

    @cached_property
    def source(self) -> LanguageModel:
        """The language model."""
        return language_model(self.checkpoint)

    def size_label(self, target: Target | None) -> float | str:
        """Return the size with the mixture nearest to it: ``4.5bpw-Q4_K_M``. See ``Conversion``."""
        size = super().size_label(target)
        if target is None or target.size_of is not None:
            return size
        label = self.sizes.nearest(bpw=target.bpw, tensor_bytes=largest_file(target, self.source))
        return f"{size_text(size)}-{label}"

    @cached_property
    def sizes(self) -> ComingSizes:
        """How large it is in llama.cpp's mixtures."""
        return ComingSizes(self.source)
