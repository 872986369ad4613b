"""What a target leaves for the tensors of a GGUF file, and the plans that are possible before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoint.source.language import LanguageModel
from ...checkpoint.source.linears import Linear, model_linears
from ...errors import BudgetError, ConfigError
from ...measure.text.context import context_tokens
from ..conversion import Target
from .file.header import GgufHeader
from .file.writer import planned_bytes
from .ggml.curves import measured_types
from .llama_cpp.vram import room_for_weights
from .plan.layout import Layout
from .plan.plan import TypeOverride
from .plan.problem import PlanProblem, estimated_problem, unmeasured_problem

__all__ = ["coming_problem", "largest_file", "room_for_tensors"]

_ALIGNMENT_BYTES = 32


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


def largest_file(target: Target, source: LanguageModel) -> int | None:
    """Return how large a file may be, in bytes; None where bits per weight are asked for.

    Raises:
        BudgetError: The memory of a GPU leaves nothing for weights.
        ConfigError: The length of the context is not known.
    """
    if target.vram_bytes is None:
        return target.max_bytes
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
    room = max_bytes - (overhead - tensors) - _ALIGNMENT_BYTES * len(header.tensors)
    if room <= 0:
        raise BudgetError(
            f"a file of {max_bytes} bytes has no room for tensors: metadata and vocabulary take "
            f"{max_bytes - room}. Ask for a larger file."
        )
    return room
