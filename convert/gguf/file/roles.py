"""What llama.cpp sees in a tensor's name: its role, its layer, and whether it is quantized at all.

The facts are those of llama.cpp's ``src/llama-quant.cpp`` and ``src/llama-model-loader.h``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

from ..ggml.types import GgmlType
from ..rows.rowmap import LEAST_COLUMNS
from .header import GgufHeader

__all__ = ["HALVES", "Role", "layer_of", "matrices_of", "quantizable", "role_of", "trimmed", "writing_order"]

HALVES = ("F16", "BF16")
"""Types of 16 bits that the converter stores matrices in."""

_NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""Tensors whose names hold one of these stay as they are: small, and sensitive."""

_NEVER_NAMED = ("position_embd.weight", "token_types.weight")


class Stored(Protocol):
    """A tensor's type and shape."""

    @property
    def type(self) -> GgmlType:
        """How its values are stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions, outermost first."""


class Role(Enum):
    """What a tensor is for, as far as the mixtures care."""

    EMBEDDING = auto()
    OUTPUT = auto()
    Q = auto()
    K = auto()
    V = auto()  # and what holds it: fused QKV, the latent KV of MLA
    ATTENTION_OUTPUT = auto()
    UP = auto()
    GATE = auto()
    DOWN = auto()
    OTHER = auto()


# In llama.cpp's order: the first that a name holds decides.
_ROLES = (
    ("attn_qkv.weight", Role.V),
    ("attn_kv_b.weight", Role.V),
    ("attn_v.weight", Role.V),
    ("attn_k.weight", Role.K),
    ("attn_q.weight", Role.Q),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.UP),
    ("ffn_gate", Role.GATE),
    ("ffn_down", Role.DOWN),
)


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether llama.cpp quantizes a tensor at all: matrices of weights, but not norms, routers and the like."""
    matrix = len(trimmed(shape)) > 1
    named = name.endswith("weight") and name not in _NEVER_NAMED
    return matrix and named and not any(part in name for part in _NEVER)


def matrices_of(tensors: Mapping[str, Stored]) -> tuple[str, ...]:
    """Return the tensors of an unquantized file that may be quantized, as far as their types tell.

    llama.cpp's converter leaves what must not be quantized (routers, convolutions) in F32 where it may write 16 bits.
    In a file that is F32 throughout any matrix may be one.

    Args:
        tensors: By name.
    """
    kinds = HALVES if any(each.type.name in HALVES for each in tensors.values()) else ("F32",)
    return tuple(
        name
        for name, each in tensors.items()
        if len(trimmed(each.shape)) > 1 and each.shape[-1] >= LEAST_COLUMNS and each.type.name in kinds
    )


def writing_order(header: GgufHeader) -> list[str]:
    """Return the tensors' names in the order of files that llama-quantize writes: by layer, then by name."""
    return sorted(header.tensors, key=lambda name: (layer_of(name), name.encode("utf-8", "surrogateescape")))


def role_of(name: str) -> Role:
    """Return the role of the tensor of that name."""
    if name == "output.weight":
        return Role.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Role.EMBEDDING
    return next((role for part, role in _ROLES if part in name), Role.OTHER)


def layer_of(name: str) -> int:
    """Return the number of a tensor's layer, -1 if it belongs to none."""
    match = re.match(r"blk\.(\d+)", name)
    return int(match[1]) if match else -1


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without outer dimensions of 1, which ggml does not count."""
    first = next((i for i, size in enumerate(shape[:-1]) if size > 1), len(shape) - 1)
    return shape[first:]
