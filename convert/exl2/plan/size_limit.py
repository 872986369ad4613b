"""Sizes that an EXL2 model has to keep below: on the disk, or in the memory of a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ....checkpoint.files.shards import header_bytes
from ....checkpoint.model.families import EMBEDDING
from ....checkpoint.source.checkpoint import Checkpoint
from ....checkpoint.source.language import LanguageModel, language_model
from ....checkpoint.source.linears import Linear, model_linears
from ..file.layout import padded_columns
from ..file.store import QUANTIZED_SUFFIXES
from ..readers.names import Exl2Names
from .problem import SizeLimit
from .vram import exl2_overhead_bytes

__all__ = ["disk_limit", "gpu_limit"]

_FLOAT16_BYTES = 2


def disk_limit(checkpoint: Checkpoint, max_bytes: int, *, shard_bytes: int) -> SizeLimit:
    """Return the limit of all files with tensors together.

    Args:
        checkpoint: The original model.
        max_bytes: Their largest size, headers included.
        shard_bytes: Largest size of one of them.
    """
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    biases = _biases(source, [*linears, head])
    replaced = {f"{linear.name}.weight" for linear in (*linears, head)} | biases.keys()
    carried = source.names - replaced
    parts = (*QUANTIZED_SUFFIXES, "bias")  # as the writer announces them
    names = carried | source.others | {f"{linear.name}.{part}" for linear in (*linears, head) for part in parts}
    prefix = Exl2Names(source).prefix
    files = 1 + 2 * max_bytes // shard_bytes
    taken = sum(source.stored_bytes(name) for name in source.names & replaced)
    data = checkpoint.total_bytes - taken + sum(biases.values())
    return SizeLimit(
        total_bytes=max_bytes,
        other_bytes=data + files * (8 + header_bytes(prefix + name for name in names)),
        float16_head_bytes=0 if source.tied_embeddings else _float16_bytes(head),
    )


def gpu_limit(checkpoint: Checkpoint, vram_bytes: int, *, context_tokens: int | None, cache_bits: int) -> SizeLimit:
    """Return the limit of a model that is to run on one GPU by ExLlamaV2, which keeps the embeddings off it.

    Args:
        checkpoint: The original model.
        vram_bytes: Memory of the GPU.
        context_tokens: Length of the context to keep in it; None for the model's own.
        cache_bits: As ``exl2_overhead_bytes`` takes them.

    Raises:
        BudgetError: Nothing is left for weights.
    """
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    planned = {f"{linear.name}.weight" for linear in (*linears, head)}
    # Norms and biases. The table of embeddings stays in main memory.
    others = source.names - planned - {EMBEDDING}
    context = context_tokens or int(source.config["max_position_embeddings"])
    beside = exl2_overhead_bytes(vram_bytes, source.config, context, cache_bits=cache_bits)
    return SizeLimit(
        total_bytes=vram_bytes,
        other_bytes=beside + sum(_FLOAT16_BYTES * math.prod(source.shape(name)) for name in others),
        float16_head_bytes=_float16_bytes(head),
    )


def _biases(source: LanguageModel, linears: Sequence[Linear]) -> dict[str, int]:
    # Bytes of each linear's bias: stored in float16, and padded beside quantized weights.
    names = {f"{linear.name}.bias": linear.out_features for linear in linears}
    return {name: _FLOAT16_BYTES * padded_columns(out) for name, out in names.items() if name in source.names}


def _float16_bytes(linear: Linear) -> int:
    return _FLOAT16_BYTES * linear.in_features * linear.out_features
