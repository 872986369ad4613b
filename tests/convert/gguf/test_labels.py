"""Sizes of llama.cpp's mixtures before there is a file, and the labels that follow."""

from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.language import LanguageModel
from bpwise.convert.gguf.labels import LABELS, coming_header, mixture_sizes, nearest_label, tensor_weights
from transformers import LlamaConfig

# Bits per weight of Llama 3.1 8B in llama.cpp's tools/quantize/README.md. IQ4_XS and IQ4_NL are left out: there they
# were made without an importance matrix, which makes them larger.
PUBLISHED = {
    **{"IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294},
    **{"IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628},
    **{"Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944},
    **{"Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005},
}


class Shapes:
    """A checkpoint of which only the shapes are known: Llama 3.1 8B."""

    directory = Path("Llama-3.1-8B")
    fingerprint = ""
    tied_embeddings = False

    def __init__(self) -> None:
        self.config: dict[str, Any] = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        ).to_dict()
        self.shapes = {f"{name}.weight": (128256, 4096) for name in ("model.embed_tokens", "lm_head")}
        self.shapes["model.norm.weight"] = (4096,)
        for index in range(32):
            layer = {f"self_attn.{name}_proj": (4096 if name in "qo" else 1024, 4096) for name in "qkvo"}
            layer |= {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
            layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (4096,))  # type: ignore[arg-type]
            self.shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        self.names = frozenset(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


@pytest.fixture(scope="module")
def bits() -> dict[str, float]:
    header = coming_header(LanguageModel(Shapes()))  # type: ignore[arg-type]
    weights = tensor_weights(header)
    assert weights == 8_030_261_248
    return {name: 8 * size / weights for name, size in mixture_sizes(header).items()}


def test_sizes_are_those_that_llama_cpp_publishes(bits: dict[str, float]) -> None:
    ours = {name: round(bits[name], 4) for name in PUBLISHED}
    assert ours == pytest.approx(PUBLISHED, abs=2e-4)  # its own are rounded


@pytest.mark.parametrize(
    ("bpw", "label"),
    [(4.5, "IQ4_XS"), (4.9, "Q4_K_M"), (4.7, "Q4_K_S"), (8.5, "Q8_0"), (1.5, "IQ1_S"), (6.2, "Q6_K"), (16.0, "F16")],
)
def test_a_file_is_labelled_with_the_mixture_nearest_in_size(bits: dict[str, float], bpw: float, label: str) -> None:
    assert nearest_label({name: int(1e9 * each) for name, each in bits.items()}, 1e9 * bpw) == label
    assert label in LABELS


def test_of_two_as_near_the_larger_is_the_label() -> None:
    sizes = dict.fromkeys(LABELS, 1000) | {"Q4_K_S": 10, "Q4_K_M": 20}
    assert nearest_label(sizes, 15) == "Q4_K_M"
