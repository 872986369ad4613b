"""What EXL2 readers know of each model type: data, one entry a type.

Source: ExLlamaV2 0.3.2 (``config.py``, ``architecture.py``), compared with Transformers 5 (``modeling_*.py``). How a
family is cut, whatever it is written as, is in ``checkpoint.model.families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ReaderComposite", "ReaderFamily", "known_architectures", "reader_composite", "reader_family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderFamily:
    """A family as EXL2 readers take it.

    Attributes:
        architectures: Class names in ``architectures`` by which readers know the family; empty if they do not.
        written_as: Class name that a written model gets, where it differs from the original's.
        prefix: What the names of a written model begin with.
        assumptions: Key of config.json -> the values that readers compute alike, whatever it says.
        reads: Keys that readers look at in every family and that this one has in Transformers too, computed alike.
        rope_types: Rope types that readers know; see ``readers`` for those that they compute otherwise.
        local_rope: Rope that readers take blocks with a sliding window to have, of a family where it is another one.
        periodic_windows: Whether readers know the sliding windows: of all blocks but every Nth.
        quirk: What readers compute otherwise in every model of the family, as a sentence.
    """

    architectures: tuple[str, ...] = ()
    written_as: str | None = None
    prefix: str = ""
    assumptions: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "dynamic", "longrope", "yarn")
    local_rope: Mapping[str, Any] | None = None
    periodic_windows: bool = False
    quirk: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderComposite:
    """A model with vision as EXL2 readers take it.

    Attributes:
        architectures: Class names in ``architectures`` by which readers know it; empty if they do not.
        prefix: What the names of the language model's tensors begin with in EXL2 files.
        languages: Model types that readers take the language model for.
        vision: Model type that the vision part must have for readers to know it; None for any.
        tower: What readers want the names of the vision part's tensors to begin with, where Transformers leaves out
            the end of it.
        images: Key of config.json, dotted into a part -> the values of it by which readers make the same of images.
    """

    architectures: tuple[str, ...] = ()
    prefix: str = "language_model."
    languages: tuple[str, ...] = ()
    vision: str | None = None
    tower: str = "vision_tower."
    images: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def file_name(self, other: str) -> str:
        """Return the name in EXL2 files of a tensor that is not the language model's."""
        plain = other.removeprefix("model.")
        short = f"{self.tower.partition('.')[0]}."
        if plain.startswith(short) and not plain.startswith(self.tower):
            return self.tower + plain.removeprefix(short)
        return plain


_SILU = {"hidden_act": ("silu", "swish")}
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh")
"""Names of the approximation by tanh, which readers compute, and of the exact function: they differ by less than
float16 rounds."""

_CAUSAL = {"use_bidirectional_attention": (False,)}
_CAPPED = ("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_HEAD_NORMS = "EXL2 readers take the norms of queries and keys for layer norms"

_FAMILIES = {
    "llama": ReaderFamily(architectures=("LlamaForCausalLM",), assumptions=_SILU, reads=("attention_bias", "mlp_bias")),
    "mistral": ReaderFamily(architectures=("MistralForCausalLM",), assumptions=_SILU),
    "mixtral": ReaderFamily(architectures=("MixtralForCausalLM",), assumptions={**_SILU, "moe_intermediate_size": ()}),
    "qwen2": ReaderFamily(
        architectures=("Qwen2ForCausalLM",),
        assumptions=_SILU,
        reads=("attention_bias",),  # no reader looks at it here: q, k and v always have biases
    ),
    "qwen3": ReaderFamily(
        architectures=("Qwen3ForCausalLM",),
        assumptions={**_SILU, "use_qk_norm": (True,)},
        reads=("attention_bias", "use_qk_norm"),
        quirk=_HEAD_NORMS,
    ),
    "qwen3_moe": ReaderFamily(
        architectures=("Qwen3MoeForCausalLM",),
        assumptions={
            **_SILU,
            "use_qk_norm": (True,),
            "norm_topk_prob": (True,),
            "mlp_only_layers": ([],),
            "decoder_sparse_step": (1,),
        },
        reads=("attention_bias", "use_qk_norm"),
        quirk=_HEAD_NORMS,
    ),
    "gemma": ReaderFamily(
        architectures=("GemmaForCausalLM",), assumptions={"hidden_act": _GELU, **_CAUSAL}, reads=("attention_bias",)
    ),
    "gemma2": ReaderFamily(
        architectures=("Gemma2ForCausalLM",),
        assumptions={"hidden_activation": _GELU, **_CAUSAL},
        reads=_CAPPED,
        periodic_windows=True,
    ),
    "gemma3_text": ReaderFamily(
        architectures=("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        written_as="Gemma3ForConditionalGeneration",
        prefix="language_model.",
        assumptions={"hidden_activation": _GELU, "use_qk_norm": (True,), **_CAUSAL},
        reads=(*_CAPPED, "use_qk_norm"),
        rope_types=("default", "linear"),
        local_rope={"rope_type": "default", "rope_theta": 10000},
        periodic_windows=True,
    ),
    "phi3": ReaderFamily(architectures=("Phi3ForCausalLM",), assumptions=_SILU, reads=("partial_rotary_factor",)),
    "granite": ReaderFamily(
        architectures=("GraniteForCausalLM",),
        # Its biases are refused: readers multiply weights of o_proj and down_proj, but not biases.
        assumptions={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        reads=(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "residual_multiplier",
        ),
    ),
    "glm4": ReaderFamily(
        architectures=("Glm4ForCausalLM",), assumptions=_SILU, reads=("attention_bias", "partial_rotary_factor")
    ),
    "cohere": ReaderFamily(
        architectures=("CohereForCausalLM",), assumptions=_SILU, reads=("attention_bias", "logit_scale", "use_qk_norm")
    ),
    "cohere2": ReaderFamily(
        architectures=("Cohere2ForCausalLM",),
        assumptions=_SILU,
        reads=("attention_bias", "logit_scale"),
        periodic_windows=True,
        quirk="EXL2 readers rotate positions in blocks with full attention too, where this family does not",
    ),
    "starcoder2": ReaderFamily(
        architectures=("Starcoder2ForCausalLM",),
        assumptions={"hidden_act": _GELU, "use_bias": (True,)},
        reads=("attention_bias", "mlp_bias"),  # no reader looks at them here: all linears always have biases
    ),
}

_PIXTRAL = {
    "vision_config.hidden_act": ("silu", "swish"),
    "projector_hidden_act": _GELU,
    "vision_feature_layer": (-1, [-1]),
    "vision_feature_select_strategy": ("full",),
}

_COMPOSITES = {
    "gemma3": ReaderComposite(
        architectures=("Gemma3ForConditionalGeneration",),
        languages=("gemma3_text",),
        images={"vision_config.hidden_act": _GELU},
        tower="vision_tower.vision_model.",
    ),
    "llava": ReaderComposite(
        architectures=("LlavaForConditionalGeneration",),
        languages=("llama", "mistral"),
        vision="pixtral",
        images=_PIXTRAL,
    ),
    "mistral3": ReaderComposite(
        architectures=("Mistral3ForConditionalGeneration",),
        languages=("llama", "mistral"),
        vision="pixtral",
        images=_PIXTRAL,
    ),
    "qwen2_vl": ReaderComposite(
        architectures=("Qwen2VLForConditionalGeneration",),
        languages=("qwen2",),
        prefix="",
        images={"vision_config.hidden_act": ("quick_gelu",)},
    ),
    "qwen2_5_vl": ReaderComposite(
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        languages=("qwen2",),
        prefix="",
        images={"vision_config.hidden_act": ("silu", "swish")},
    ),
}


def reader_family(config: Mapping[str, Any]) -> ReaderFamily:
    """Return the entry of a language model by ``model_type``; one without architectures where readers know none."""
    return _FAMILIES.get(str(config.get("model_type")), ReaderFamily())


def reader_composite(config: Mapping[str, Any]) -> ReaderComposite:
    """Return the entry of a model with vision by ``model_type``; one without architectures where readers know none."""
    return _COMPOSITES.get(str(config.get("model_type")), ReaderComposite())


def known_architectures() -> list[str]:
    """Return the names of all architectures that EXL2 readers know, sorted."""
    entries: list[ReaderFamily | ReaderComposite] = [*_FAMILIES.values(), *_COMPOSITES.values()]
    return sorted({name for entry in entries for name in entry.architectures})
