"""Small GGUF models, made without any library: the same bytes everywhere, so that digests can be committed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.file.emit import Planned, entry, header_bytes, padding
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix

Shapes = dict[str, tuple[int, ...]]

LLAMA = {"attn_q": (256, 256), "attn_k": (64, 256), "attn_v": (64, 256), "attn_output": (256, 256)}
FFN = {"ffn_gate": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}


def experts(count: int) -> Shapes:
    return {"ffn_gate_inp": (count, 256)} | {f"{name}_exps": (count, *shape) for name, shape in FFN.items()}


FUSED = {"attn_qkv": (768, 256), "attn_output": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}
NARROW = {"attn_q": (96, 96), "attn_k": (32, 96), "attn_v": (32, 96), "attn_output": (96, 96)}
NARROW_FFN = {"ffn_gate": (288, 96), "ffn_up": (288, 96), "ffn_down": (96, 288)}

# Architecture, layers, tensors of a layer, width, heads, heads of keys and values, experts, head of its own.
MODELS: Mapping[str, tuple[str, int, Shapes, int, int, int, int, bool]] = {
    "llama": ("llama", 16, LLAMA | FFN, 256, 4, 1, 0, True),
    "tied": ("llama", 9, LLAMA | FFN, 256, 4, 2, 0, False),
    "narrow": ("llama", 8, NARROW | NARROW_FFN, 96, 3, 1, 0, False),
    "odd": ("llama", 2, {"attn_q": (40, 40), "ffn_down": (40, 64), "attn_v": (40, 256)}, 40, 4, 4, 0, True),
    "eight-experts": ("llama", 16, LLAMA | experts(8), 256, 4, 2, 8, True),
    "four-experts": ("llama", 16, LLAMA | experts(4), 256, 4, 2, 4, False),
    "70b": ("llama", 80, LLAMA | FFN, 256, 4, 2, 0, True),
    "qwen-70b": ("qwen2", 80, LLAMA | FFN, 256, 4, 4, 0, True),
    "falcon": ("falcon", 32, FUSED, 256, 4, 4, 0, True),
    "small": ("llama", 2, LLAMA | FFN, 256, 4, 1, 0, False),
    "small-experts": ("llama", 1, LLAMA | experts(2), 256, 4, 2, 2, True),
    "fused": ("phi3", 16, FUSED, 256, 4, 4, 0, True),
}


def model_parts(name: str, vocabulary: int = 64) -> tuple[dict[str, Any], Shapes]:
    """Return the metadata and the tensors' shapes of a model."""
    architecture, layers, layer, width, heads, kv_heads, expert_count, own_head = MODELS[name]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": name,
        "general.file_type": 0,
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": width,
        f"{architecture}.feed_forward_length": layer.get("ffn_down", (0, width))[1],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.attention.layer_norm_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": width // heads,
        f"{architecture}.vocab_size": vocabulary,
        "tokenizer.ggml.model": "no_vocab",
    }
    if expert_count:
        metadata |= {f"{architecture}.expert_count": expert_count, f"{architecture}.expert_used_count": 2}
    shapes: Shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if own_head:
        shapes["output.weight"] = (vocabulary, width)
    for index in range(layers):
        shapes[f"blk.{index}.attn_norm.weight"] = (width,)
        shapes |= {f"blk.{index}.{part}.weight": shape for part, shape in layer.items()}
    return metadata, shapes


def write_model(path: Path, name: str, *, values: bool = True, dtype: str = "F32") -> Path:
    """Write a model; without values its data is a hole in the file."""
    metadata, shapes = model_parts(name)
    planned = [
        Planned(tensor, ggml_type(dtype if len(shape) > 1 else "F32"), shape) for tensor, shape in shapes.items()
    ]
    header = header_bytes({key: entry(value) for key, value in metadata.items()}, planned, 32)
    # RandomState's numbers are frozen by NumPy's promise; sums of four bytes look normal enough and are exact.
    rng = np.random.RandomState(len(shapes))
    with path.open("wb") as file:
        file.write(header)
        for tensor in planned:
            if values:
                draws = rng.randint(-128, 128, (math.prod(tensor.shape), 4)).sum(axis=1)
                weights = torch.from_numpy((draws / 4096).astype(np.float32))
                kept = weights.to(
                    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.type.name]
                )
                file.write(kept.view(torch.uint8).numpy().tobytes() + bytes(padding(tensor.size_bytes, 32)))
            else:
                file.seek(tensor.size_bytes + padding(tensor.size_bytes, 32), 1)
        file.truncate()
    return path


def importance_of(name: str) -> ImportanceMatrix:
    """Return an importance matrix for the layers' tensors of a model, with the same numbers everywhere."""
    rng = np.random.RandomState(7)
    means = {}
    for tensor, shape in model_parts(name)[1].items():
        if tensor.startswith("blk.") and len(shape) > 1:
            experts = shape[0] if len(shape) > 2 else 1
            means[tensor] = torch.from_numpy((rng.randint(1, 257, (experts, shape[-1])) / 64).astype(np.float32))
    tokens = {tensor: torch.full((len(mean),), 512.0) for tensor, mean in means.items()}
    return ImportanceMatrix.from_means(means, tokens, datasets=("text.txt",), chunks=1, chunk_tokens=512)


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    def build(name: str, **options: Any) -> Path:
        return write_model(tmp_path / f"{name}.gguf", name, **options)

    return build


@pytest.fixture
def make_importance() -> Callable[[str], ImportanceMatrix]:
    return importance_of


@pytest.fixture
def model_names() -> list[str]:
    return list(MODELS)
