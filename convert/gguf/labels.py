"""Labels of GGUF files: llama.cpp's mixtures by name, and how large a model is in each of them.

The Hub, Ollama and llama.cpp find a file of a repository by the mixture that its name ends in. A file of types that
bpwise has chosen follows no mixture, and is labelled with the one of nearest size: in this model, or nominally.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from ...checkpoint.source.language import LanguageModel
from .file.header import GgufHeader, GgufTensor
from .ggml.types import GgmlType, ggml_type
from .llama_cpp.assign import mixture_types
from .llama_cpp.mixtures import MIXTURES

__all__ = ["LABELS", "ComingSizes", "coming_header", "mixture_sizes", "tensors_bytes"]

LABELS: Mapping[str, float] = MappingProxyType(
    {
        **{"IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294},
        **{"Q2_K": 3.1593, "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "Q3_K_S": 3.6429},
        **{"Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "IQ4_XS": 4.4231, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944, "Q5_K_S": 5.5704},
        **{"Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005},
    }
)
"""The mixtures that files are labelled with, by their bits: those that publishers make today. Legacy types (Q4_0) and
ternary ones promise types that a mixed file does not hold to. With each its nominal size: bits per weight of Llama 3.1
8B in it, made with an importance matrix (llama.cpp, tools/quantize/README.md; IQ4_XS is computed, as the table has it
without one)."""

_MISLEADING_BITS = 1.0
"""If a mixture is off its nominal size by more bits per weight in a model, the model's files are labelled by nominal
sizes. K types do not fit its rows, so llama.cpp falls back to larger ones, or most of it is a token table: SmolLM2-135M
takes 5.0 bits as IQ2_M, and nobody looks for so good a file under that name. Others are off by 0.4 at most."""

_ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{name: name for name in ("falcon", "olmo", "qwen2")},
}
"""What llama.cpp calls the model types that it treats apart in its mixtures."""

_ATTENTION = re.compile(r"(?:^|\.)(?:self_)?(?:attn|attention)\.")
_STEMS = (
    (True, "attn_qkv", r"qkv(?:_proj)?|query_key_value|[cw]_?attn|wqkv"),
    (True, "attn_q", r"q_proj|wq|query"),
    (True, "attn_k", r"k_proj|wk|key"),
    (True, "attn_v", r"v_proj|wv|value"),
    (True, "attn_output", r"o_proj|out_proj|c_proj|wo|dense"),
    (False, "ffn_gate", r"gate_proj|gate|w1"),
    (False, "ffn_down", r"down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|output_linear"),
    (False, "ffn_up", r"up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h|input_linear"),
)
"""Roles of linears as llama.cpp names them, by whether they are the attention's and by their own name."""


def mixture_sizes(header: GgufHeader) -> dict[str, int]:
    """Return the size of a model in each of llama.cpp's mixtures, made with an importance matrix.

    Args:
        header: The unquantized file's, or ``coming_header``.

    Returns:
        Bytes of all tensors, by the name of the mixture.

    Raises:
        UnsupportedModelError: llama.cpp has rules of its own for this architecture.
    """
    known = header.tensors.keys()
    return {
        name: tensors_bytes(header, mixture_types(each, header, importance=known)) for name, each in MIXTURES.items()
    }


class ComingSizes:
    """How large a model is in llama.cpp's mixtures, from shapes alone: before it is converted, and after it the same.

    Attributes:
        weights: Number of weights in all tensors.
        tensor_bytes: ``mixture_sizes``.
    """

    def __init__(self, source: LanguageModel) -> None:
        """Compute the sizes.

        Raises:
            CheckpointError: A tensor that the family should have is missing.
        """
        header = coming_header(source)
        self.weights = sum(math.prod(each.shape) for each in header.tensors.values())
        self.tensor_bytes = mixture_sizes(header)

    def nearest(self, *, bpw: float | None = None, tensor_bytes: int | None = None) -> str:
        """Return the label of a file: the mixture nearest in size; of two that are as near, the one of more bits.

        Sizes are those of this model, or the nominal ones where its own would mislead.

        Args:
            bpw: Bits per weight over all its tensors.
            tensor_bytes: The same as a number of bytes; one of the two is given.
        """
        assert (bpw is None) != (tensor_bytes is None), "one size"
        wanted = 8 * tensor_bytes / self.weights if tensor_bytes is not None else bpw
        assert wanted is not None
        own = {name: 8 * self.tensor_bytes[name] / self.weights for name in LABELS}
        misleading = any(abs(own[name] - nominal) > _MISLEADING_BITS for name, nominal in LABELS.items())
        sizes = LABELS if misleading else own
        return min(reversed(list(sizes)), key=lambda name: abs(sizes[name] - wanted))


def tensors_bytes(header: GgufHeader, types: Mapping[str, GgmlType]) -> int:
    """Return the bytes of all tensors of a file in other types.

    Args:
        header: The file's.
        types: By name of tensor; what is missing stays as it is.
    """
    return sum(
        math.prod(each.shape[:-1]) * types.get(name, each.type).row_bytes(each.shape[-1])
        for name, each in header.tensors.items()
    )


def coming_header(source: LanguageModel) -> GgufHeader:
    """Return about the header that the unquantized file of a model will have, from shapes alone.

    It has what mixtures look at: shapes and roles of tensors, layers, heads and experts.

    Args:
        source: The model.

    Raises:
        CheckpointError: A tensor that the family should have is missing.
    """
    architecture = _ARCHITECTURES.get(str(source.config.get("model_type")), "other")
    heads = source.config.get("num_attention_heads") or 0
    experts = [group.expert for block in source.structure.structures for group in block.groups]
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.block_count": source.block_count,
        f"{architecture}.expert_count": 1 + max((each for each in experts if each is not None), default=-1),
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": source.config.get("num_key_value_heads") or heads,
    }
    return GgufHeader(
        path=source.directory,
        version=3,
        metadata=metadata,
        entries={},
        tensors={each.name: each for each in _coming_tensors(source)},
        alignment_bytes=32,
        data_offset_bytes=0,
        file_bytes=0,
        sha256="",
    )


def _coming_tensors(source: LanguageModel) -> Iterator[GgufTensor]:
    whole = {source.embedding_name: "token_embd", source.head_name: "output"}
    if source.tied_embeddings:
        del whole[source.head_name]
    if source.layer_embedding is not None:
        whole[source.layer_embedding] = "per_layer_token_embd"
    for name, stem in whole.items():
        yield _tensor(f"{stem}.weight", "F16", source.shape(f"{name}.weight"))
    taken = {f"{name}.weight" for name in (*whole, source.head_name)}
    for index, block in enumerate(source.structure.structures):
        prefix = f"{source.blocks}.{index}"
        stacks: dict[str, list[tuple[int, int]]] = {}
        for group in block.groups:
            for linear in group.linears:
                full = f"{prefix}.{linear}.weight"
                taken.add(full)
                rows, columns = source.shape(full)
                place = block.places.get(linear)
                # Linears that are one tensor in Transformers are one in the file, but for experts.
                fused = place is not None and place.expert is None and place.rows is not None
                stem = _stem(place.parameter.removesuffix(".weight") if place is not None and fused else linear)
                stacks.setdefault(stem if group.expert is None else f"{stem}_exps", []).append((rows, columns))
        for stem, shapes in stacks.items():
            columns = shapes[0][1]
            rows = sum(each[0] for each in shapes)
            stacked = stem.endswith("_exps")
            shape = (len(shapes), shapes[0][0], columns) if stacked else (rows, columns)
            yield _tensor(f"blk.{index}.{stem}.weight", "F16", shape)
    for name in sorted(source.names - taken):  # norms, biases, routers: they stay
        yield _tensor(f"{name}.kept", "F32", source.shape(name))


def _stem(linear: str) -> str:
    """Return what llama.cpp calls a linear, or the parameter that several are one of; its own name if unknown."""
    inside = _ATTENTION.search(linear) is not None
    leaf = linear.rpartition(".")[2]
    if leaf == "gate_up_proj":
        return "ffn_up"
    shared = "_shexp" if "shared" in linear else ""
    for attention, stem, pattern in _STEMS:
        if attention is inside and re.fullmatch(pattern, leaf, re.IGNORECASE):
            return f"{stem}{shared}"
    return linear


def _tensor(name: str, kind: str, shape: tuple[int, ...]) -> GgufTensor:
    stored = ggml_type(kind)
    return GgufTensor(name, stored, shape, 0, math.prod(shape[:-1]) * stored.row_bytes(shape[-1]), Path())
