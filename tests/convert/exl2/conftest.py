"""A second decoder, written from the format document alone, and tiny models to convert."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from safetensors.torch import save_file
from torch import Tensor

LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# 24 is no divisor of 32, so that 2 key heads give 48 output features: padded to 64 on disk.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 100,
    "num_hidden_layers": 2,
}


@pytest.fixture
def naive_decode() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return _naive_decode


def _naive_decode(name: str, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes [K, N] in stored order, weight [N, K] in float16), with plain integers, bit by bit."""
    words = tensors[f"{name}.q_weight"].numpy().view(np.uint32)
    scale_words = tensors[f"{name}.q_scale"].numpy().view(np.uint32)
    max_scales = tensors[f"{name}.q_scale_max"].numpy()
    table = tensors[f"{name}.q_groups"].tolist()
    invperm = tensors[f"{name}.q_invperm"].tolist()
    total_words, columns = words.shape
    codes = np.zeros((len(invperm), columns), dtype=np.int64)
    stored = np.zeros((len(invperm), columns), dtype=np.float16)
    ends = [*table[3::2], total_words]
    row = 0
    for group, (bits, first, last) in enumerate(zip(table[0::2], table[1::2], ends, strict=True)):
        t = np.float16(float(max_scales[group]) / 256)
        for column in range(columns):
            stream = sum(int(words[w, column]) << (32 * (w - first)) for w in range(first, last))
            s = (int(scale_words[group, column // 8]) >> (4 * (column % 8))) & 15
            scale = np.float16(float((s + 1) ** 2) * float(t))
            for i in range((last - first) * 32 // bits):
                code = (stream >> (i * bits)) & ((1 << bits) - 1)
                codes[row + i, column] = code
                stored[row + i, column] = np.float16((code - 2 ** (bits - 1)) * float(scale))
        row += (last - first) * 32 // bits
    assert row == len(invperm)
    weight = np.zeros((columns, len(invperm)), dtype=np.float16)
    for feature, position in enumerate(invperm):
        weight[:, feature] = stored[position]
    return codes, weight


@pytest.fixture
def make_linear() -> Callable[..., QuantizedLinear]:
    return random_linear


def random_linear(
    out_features: int,
    groups: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    bias: bool = False,
    reorder: bool = True,
) -> QuantizedLinear:
    rng = torch.Generator().manual_seed(seed)
    rows = sum(n for _, n in groups)
    codes = [torch.randint(0, 1 << bits, (n, out_features), generator=rng, dtype=torch.uint8) for bits, n in groups]
    shape = (len(groups), out_features)
    # Ceilings from 1e-4 to 1e-1: most of them divide into subnormal steps, which is where readers round.
    max_scales = (10 ** (torch.rand(len(groups), generator=rng) * 3 - 4)).half()
    return QuantizedLinear(
        groups=tuple(RowGroup(bits, n) for bits, n in groups),
        codes=torch.cat(codes),
        scale_codes=torch.randint(0, 16, shape, generator=rng, dtype=torch.uint8),
        max_scales=max_scales,
        order=torch.randperm(rows, generator=rng) if reorder else torch.arange(rows),
        bias=torch.randn(out_features, generator=rng).half() if bias else None,
    )


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    def build(*, tied: bool = False, biases: bool = False, name: str = "llama", **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        settings = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            "attention_bias": biases,
            "mlp_bias": biases,
            "tie_word_embeddings": tied,
            "dtype": "bfloat16",
            **SIZES,
            **config,
        }
        (directory / "config.json").write_text(json.dumps(settings))
        (directory / "tokenizer.json").write_text("{}")
        (directory / "LICENSE.txt").write_text("as you like")
        (directory / "modeling_llama.py").write_text("raise SystemExit")
        save_file(_llama_tensors(tied, biases), directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return build


def _llama_tensors(tied: bool, biases: bool) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    hidden, middle, vocabulary = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    sizes = ((96, hidden), (48, hidden), (48, hidden), (hidden, 96))
    sizes += ((middle, hidden), (middle, hidden), (hidden, middle))
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for linear, shape in zip(LAYER_LINEARS, sizes, strict=True):
            shapes[f"{prefix}.{linear}.weight"] = shape
            if biases:
                shapes[f"{prefix}.{linear}.bias"] = shape[:1]
    return {name: (torch.randn(shape, generator=rng) * 0.05).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def llama_linears() -> Callable[..., dict[str, Callable[[], QuantizedLinear]]]:
    """Random replacements for every linear of the tiny model, each made when asked for."""

    def build(*, head: bool = True, reorder: bool = True) -> dict[str, Callable[[], QuantizedLinear]]:
        sizes = [(96, 64), (48, 64), (48, 64), (64, 96), (96, 64), (96, 64), (64, 96)]
        result: dict[str, Callable[[], QuantizedLinear]] = {}
        for layer in range(SIZES["num_hidden_layers"]):
            for linear, (out, rows) in zip(LAYER_LINEARS, sizes, strict=True):
                groups = [(6, 32), (4, rows - 64), (3, 32)] if rows > 64 else [(5, 32), (2, 32)]
                result[f"model.layers.{layer}.{linear}"] = _Maker(out, groups, len(result), reorder)
        if head:
            result["lm_head"] = _Maker(100, [(8, 32), (6, 32)], 99, reorder)
        return result

    return build


class _Maker:
    def __init__(self, out: int, groups: list[tuple[int, int]], seed: int, reorder: bool) -> None:
        self.arguments = (out, groups)
        self.options = {"seed": seed, "reorder": reorder}

    def __call__(self) -> QuantizedLinear:
        return random_linear(*self.arguments, **self.options)


@pytest.fixture
def quantization() -> dict[str, Any]:
    calibration = {"rows": 1, "length": 8, "dataset": "none"}
    return {"version": "0.3.2", "bits": 4.0, "head_bits": 7, "calibration": calibration}
