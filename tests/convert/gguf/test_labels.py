"""Sizes of llama.cpp's mixtures before there is a file, and the labels that follow."""

import re
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.language import LanguageModel
from bpwise.convert.gguf.format import GgufFormat
from bpwise.convert.gguf.labels import LABELS, ComingSizes
from bpwise.convert.gguf.options import GgufOptions
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
def sizes() -> ComingSizes:
    return ComingSizes(LanguageModel(Shapes()))  # type: ignore[arg-type]


def test_sizes_are_those_that_llama_cpp_publishes(sizes: ComingSizes) -> None:
    assert sizes.weights == 8_030_261_248
    bits = {name: 8 * sizes.tensor_bytes[name] / sizes.weights for name in PUBLISHED}
    assert bits == pytest.approx(PUBLISHED, abs=2e-4)  # its own are rounded


@pytest.mark.parametrize(
    ("bpw", "label"),
    [(4.5, "IQ4_XS"), (4.9, "Q4_K_M"), (4.7, "Q4_K_S"), (8.5, "Q8_0"), (1.5, "IQ1_S"), (6.2, "Q6_K"), (16.0, "F16")],
)
def test_a_file_is_labelled_with_the_mixture_nearest_in_size(sizes: ComingSizes, bpw: float, label: str) -> None:
    assert sizes.nearest(bpw=bpw) == label
    assert sizes.nearest(tensor_bytes=int(bpw * 8_030_261_248 / 8)) == label


def test_nominal_sizes_are_the_published_ones() -> None:
    nominal = {name: PUBLISHED[name] for name in LABELS if name in PUBLISHED}
    assert {name: LABELS[name] for name in nominal} == nominal
    assert set(LABELS) - set(nominal) == {"Q3_K_M", "IQ4_XS"}


class Narrow(Shapes):
    """SmolLM2-135M: its rows of 576 weights hold no whole blocks of 256, so K types and most IQ types do not fit."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {4096: 576, 14336: 1536, 1024: 192, 128256: 49152}
        self.shapes = {name: tuple(sizes[size] for size in shape) for name, shape in self.shapes.items()}
        self.config |= {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
        self.config |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


@pytest.mark.parametrize(
    ("bpw", "label"),
    [
        (3.0, "IQ2_M"),
        (4.0, "Q3_K_M"),
        (4.5, "IQ4_XS"),
        (5.0, "Q4_K_M"),
        (5.5, "Q5_K_S"),
        (6.0, "Q5_K_M"),
        (8.0, "Q8_0"),
    ],
)
def test_where_k_types_do_not_fit_nominal_sizes_label_a_file(bpw: float, label: str) -> None:
    narrow = ComingSizes(LanguageModel(Narrow()))  # type: ignore[arg-type]
    assert 8 * narrow.tensor_bytes["IQ2_M"] / narrow.weights > 4.5  # of IQ4_NL, mostly: the nearest in size to 5 bpw
    assert narrow.nearest(bpw=bpw) == label
    assert narrow.nearest(tensor_bytes=int(bpw * narrow.weights / 8)) == label


def test_of_two_as_near_the_larger_is_the_label(sizes: ComingSizes) -> None:
    between = (sizes.tensor_bytes["Q4_K_S"] + sizes.tensor_bytes["Q4_K_M"]) // 2
    assert {sizes.nearest(tensor_bytes=between + step) for step in (-1024, 1024)} == {"Q4_K_S", "Q4_K_M"}
    assert sizes.nearest(tensor_bytes=between) == "Q4_K_M"


# How the Hub finds a label in a file's name (huggingface.js, packages/tasks/src/gguf.ts): the last of these.
# Ollama asks the Hub for `hf.co/USER/REPO:LABEL`.
QUANTS = "F32|F16|Q4_0|Q4_1|Q8_0|Q5_0|Q5_1|Q2_K|Q3_K_S|Q3_K_M|Q3_K_L|Q4_K_S|Q4_K_M|Q5_K_S|Q5_K_M|Q6_K|IQ2_XXS|IQ2_XS|"
QUANTS += "Q2_K_S|IQ3_XS|IQ3_XXS|IQ1_S|IQ4_NL|IQ3_S|IQ3_M|IQ2_S|IQ2_M|IQ4_XS|IQ1_M|BF16|TQ1_0|TQ2_0|MXFP4_MOE"


def found_by_the_hub(name: str) -> str:
    return [match[0] for match in re.finditer(f"(?:UD-)?(?:{QUANTS})(?:_[A-Z]+)?", name.upper())][-1]


def found_by_llama_cpp(files: list[str], tag: str) -> str:
    """Return the file that `-hf USER/REPO:TAG` takes (common/download.cpp), of a repository's files in their order."""
    return next(file for file in sorted(files) if re.search(f"{tag}[.-]", file, re.IGNORECASE))


def llama_cpp_label(name: str) -> str:
    """Return the label at a name's end, by which llama.cpp compares a file with an mmproj file."""
    whole = re.sub(r"-\d{5}-of-\d{5}$", "", name.removesuffix(".gguf"))
    return re.findall(r"[-.]([A-Z0-9_]+)$", whole, re.IGNORECASE)[0].upper()


@pytest.mark.parametrize("ending", [".gguf", "-00001-of-00003.gguf"])
def test_programs_find_every_label_in_names(sizes: ComingSizes, ending: str) -> None:
    names = {}
    for label in LABELS:
        size = sizes.tensor_bytes[label] * 8 / sizes.weights
        assert sizes.nearest(bpw=size) == label
        text = GgufFormat().output_name("meta-llama/Llama-3.1-8B-Instruct", f"{size:.2f}bpw-{label}", GgufOptions())
        names[label] = text.removesuffix(".gguf") + ending
    for label, name in names.items():
        assert found_by_the_hub(name) == llama_cpp_label(name) == label
        assert found_by_llama_cpp(list(names.values()), label) == name
