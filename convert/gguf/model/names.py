"""What llama.cpp calls the tensors of each architecture: data, one entry an architecture.

llama.cpp rotates neighbouring rows of a head together (2j, 2j + 1) where Transformers rotates rows half a head apart
(j, j + d/2). For some architectures its converter therefore reorders the rows of the query and key projections; for
the others the engine rotates as Transformers does, and rows stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ROPE_FREQS",
    "Architecture",
    "architecture_of",
    "gguf_name",
    "hf_name",
    "row_order",
    "tensor_shapes",
]

ROPE_FREQS = "rope_freqs.weight"
"""Factors that divide the rotary frequencies: how llama.cpp stores ``rope_type: llama3``. No tensor of the model."""

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_WHOLE_BACK = {theirs: ours for ours, theirs in _WHOLE.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}

_GGUF_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", re.ASCII)
_HF_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?([a-z_.]+)\.(weight|bias)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One value of ``general.architecture``.

    Attributes:
        model_type: What config.json calls it.
        model_class: Its class in Transformers.
        permuted: Whether the rows of query and key projections are reordered within each head.
        biased: Whether query, key and value projections always have biases, unasked.
        head_norms: Whether queries and keys are normalised head by head.
        optional_biases: Whether config.json can ask for biases of the attention (``attention_bias``).
        optional_mlp_biases: Whether it can ask for those of the MLP (``mlp_bias``).
    """

    model_type: str
    model_class: str
    permuted: bool = False
    biased: bool = False
    head_norms: bool = False
    optional_biases: bool = False
    optional_mlp_biases: bool = False


_ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        permuted=True,
        optional_biases=True,
        optional_mlp_biases=True,
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM", biased=True),
    "qwen3": Architecture(model_type="qwen3", model_class="Qwen3ForCausalLM", head_norms=True, optional_biases=True),
}


def architecture_of(name: object) -> Architecture:
    """Return the entry of an architecture.

    Args:
        name: Value of ``general.architecture``.

    Raises:
        UnsupportedModelError: It is unknown; the message lists those that are known.
    """
    architecture = _ARCHITECTURES.get(str(name))
    if architecture is None:
        raise UnsupportedModelError(
            f"general.architecture: not readable without the original. Got {name!r}. Expected one of "
            f"{', '.join(_ARCHITECTURES)}. Name the original beside the file."
        )
    return architecture


def hf_name(name: str) -> str | None:
    """Return what Transformers calls a tensor of a GGUF file; None if it is not known."""
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return None
    block, stem, part = match.groups()
    if block is None:
        return f"{_WHOLE[stem]}.{part}" if stem in _WHOLE else None
    return f"model.layers.{block}.{_BLOCK[stem]}.{part}" if stem in _BLOCK else None


def gguf_name(name: str) -> str | None:
    """Return what llama.cpp calls a tensor of a Transformers model; None if it is not known."""
    match = _HF_NAME.fullmatch(name)
    if match is None:
        return None
    block, stem, part = match.groups()
    if block is None:
        return f"{_WHOLE_BACK[stem]}.{part}" if stem in _WHOLE_BACK else None
    return f"blk.{block}.{_BLOCK_BACK[stem]}.{part}" if stem in _BLOCK_BACK else None


def row_order(name: str, architecture: Architecture, config: Mapping[str, Any]) -> Tensor | None:
    """Return where the rows of a tensor of a GGUF file come from.

    Args:
        name: Name in Transformers, such as ``model.layers.0.self_attn.q_proj.weight``.
        architecture: The file's.
        config: config.json of the model: the numbers of heads and the size of a head.

    Returns:
        ``order``, int64, shape (rows,), such that row i of the file is row ``order[i]`` in Transformers; None if rows
        stay in place. Biases follow their rows.
    """
    if not architecture.permuted:
        return None
    module = name.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        heads = config["num_attention_heads"]
    elif module.endswith("self_attn.k_proj"):
        heads = config["num_key_value_heads"]
    else:
        return None
    rows = heads * config["head_dim"]
    import torch  # noqa: PLC0415 - names are asked for without any tensor

    return torch.arange(rows).view(heads, 2, config["head_dim"] // 2).transpose(1, 2).reshape(-1)


def tensor_shapes(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors that a model must have, as Transformers calls them.

    Args:
        architecture: The file's.
        config: config.json of the model.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    for name, (rows, _) in linears.items():
        always = architecture.biased and name.endswith(("q_proj", "k_proj", "v_proj"))
        asked = config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias")
        if always or asked:
            block[f"{name}.bias"] = (rows,)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block[f"{norm}.weight"] = (hidden,)
    if architecture.head_norms:
        block |= {f"self_attn.{norm}.weight": (config["head_dim"],) for norm in ("q_norm", "k_norm")}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
