"""How each model family is cut into blocks and linears, and what its tensors are called: data, one entry a family.

A block is worked through in stages. The linears of a stage read one common input and share its Gram matrix, and none
of them depends on the others. Stages come in the order in which the block computes them.

Names inside a block are those of EXL2 files, one linear each; where Transformers has one module for several of them,
or keeps experts in one tensor, ``measure.surgery`` takes it apart. Source of the names and of which readers know what:
Transformers 5 (``modeling_*.py``, ``conversion_mapping.py``), ExLlamaV2 0.3.2 (``architecture.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UnsupportedModelError
from .names import HEAD

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Composite",
    "Experts",
    "Family",
    "InputGroup",
    "composite_of",
    "family_of",
    "is_known",
    "known_readers",
]


EMBEDDING = "model.embed_tokens.weight"
"""Full name of the table of token embeddings."""


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears of a block that read the same input and share its statistics.

    Queries, keys and values are stages of their own: their gradients lie on different tokens, so that one Gram matrix
    for all three would take queries for several times less than they matter.

    Attributes:
        linears: Names inside the block, for example ``self_attn.q_proj``.
        adds: Module whose output is added to the residual stream once the stage is done; None for a stage whose output
            stays inside the block.
        normed: Whether that module is a norm, which the stage's one linear feeds.
        expert: Number of the expert that the linears belong to; None outside of experts.
    """

    linears: tuple[str, ...]
    adds: str | None = None
    normed: bool = False
    expert: int | None = None

    @property
    def first(self) -> str:
        """The first of the linears: its input is that of all."""
        return self.linears[0]

    @property
    def joins_stream(self) -> bool:
        """Whether the output is added to the residual stream."""
        return self.adds is not None

    @property
    def reads_stream(self) -> bool:
        """Whether the linears read what a norm makes of the residual stream, and not values or neurons."""
        return self.adds is None and not self.linears[0].endswith((".down_proj", ".w2"))


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a mixture: gated MLPs of which a router chooses a few for every token.

    Attributes:
        path: Module that holds them, inside the block.
        gate: Name of the gate's linear inside an expert.
        up: Name of the up projection.
        down: Name of the down projection.
    """

    path: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def stages(self, expert: int) -> tuple[InputGroup, InputGroup]:
        """Return the two stages of one expert."""
        prefix = f"{self.path}.{expert}"
        return (
            InputGroup((f"{prefix}.{self.gate}", f"{prefix}.{self.up}"), expert=expert),
            InputGroup((f"{prefix}.{self.down}",), expert=expert),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Architecture families that share names and structure.

    Attributes:
        readers: Class names in ``architectures`` by which EXL2 readers know the family; empty if they do not.
        stages: Stages of decoder blocks, in the order of computation. A block has those whose linears are stored.
        experts: The experts of blocks that have some; their stages come after the others.
        fused: Modules of Transformers that EXL2 files hold in parts: name inside the block -> names of its parts.
        mlp: The linears of an MLP that make its neurons, and the one that reads them.
        renamed: Start of a module's name inside the block in Transformers -> start of its name in files.
        multiplier: Key of config.json whose value multiplies what blocks add to the residual stream.
        written_as: Class name that a written model gets, where it differs from the original's.
        prefix: What the names of a written model begin with.
        reader_assumptions: Key of config.json -> the values that EXL2 readers compute alike, whatever it says.
        reads: Keys that EXL2 readers look at in every family and that this one has in Transformers too, computed alike.
        rope_types: Rope types that readers know; see ``exl2.readers`` for those that they compute otherwise.
        local_rope: Rope that readers take blocks with a sliding window to have, of a family where it is another one.
        periodic_windows: Whether readers know the sliding windows: of all blocks but every Nth.
        quirk: What readers compute otherwise in every model of the family, as a sentence.
        note: What is special, for the table of families in the documentation.
    """

    readers: tuple[str, ...]
    stages: tuple[InputGroup, ...]
    experts: Experts | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mlp: tuple[tuple[str, ...], str] = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    renamed: Mapping[str, str] = field(default_factory=dict)
    multiplier: str | None = None
    written_as: str | None = None
    prefix: str = ""
    reader_assumptions: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "dynamic", "longrope", "yarn")
    local_rope: Mapping[str, Any] | None = None
    periodic_windows: bool = False
    quirk: str = ""
    note: str = ""

    blocks = "model.layers"
    """Name of the list of decoder blocks; block i is ``{blocks}.{i}``."""

    @property
    def experts_path(self) -> str:
        """Module that holds the experts, inside the block; empty where there are none."""
        return "" if self.experts is None else self.experts.path

    def input_groups(self, index: int, names: Collection[str]) -> tuple[InputGroup, ...]:
        """Return the input groups of one block: those of which any linear is stored.

        Args:
            index: Which block.
            names: Names of the model's tensors, as EXL2 files have them but for ``prefix``.
        """
        stages = [stage for stage in self.stages if self._stored(index, stage, names)]
        if self.experts is not None:
            number = 0
            while self._stored(index, (pair := self.experts.stages(number))[0], names):
                stages += pair
                number += 1
        return tuple(stages)

    def _stored(self, index: int, stage: InputGroup, names: Collection[str]) -> bool:
        return any(f"{name}.weight" in names for name in self.linear_names(index, stage))

    def linear_names(self, block: int, stage: InputGroup) -> tuple[str, ...]:
        """Return the full names of a stage's linears in one block."""
        return tuple(self.file_name(f"{self.blocks}.{block}.{name}") for name in stage.linears)

    def file_name(self, name: str) -> str:
        """Return the name in files of a module or parameter that the model has under a full name."""
        for ours, theirs in self.renamed.items():
            head, found, tail = name.partition(f".{ours}")
            if found and name.startswith(f"{self.blocks}."):
                return f"{head}.{theirs}{tail}"
        return name


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

_EACH_OF_QKV = tuple(InputGroup((name,)) for name in _QKV)
_ATTENTION = (*_EACH_OF_QKV, InputGroup(("self_attn.o_proj",), adds="self_attn"))
_GATED_MLP = (InputGroup(_GATE_UP), InputGroup(("mlp.down_proj",), adds="mlp"))
_PRE_NORM = (*_ATTENTION, *_GATED_MLP)


def _post_norm(attention: str, mlp: str) -> tuple[InputGroup, ...]:
    return (
        *_EACH_OF_QKV,
        InputGroup(("self_attn.o_proj",), adds=attention, normed=True),
        InputGroup(_GATE_UP),
        InputGroup(("mlp.down_proj",), adds=mlp, normed=True),
    )


_GEMMA2 = _post_norm("post_attention_layernorm", "post_feedforward_layernorm")
_FUSED_MLP = {"mlp.gate_up_proj": _GATE_UP}

_SILU = {"hidden_act": ("silu", "swish")}
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh")
"""Names of the approximation by tanh, which readers compute, and of the exact function: they differ by less than
float16 rounds."""

_CAUSAL = {"use_bidirectional_attention": (False,)}
_CAPPED = ("attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_HEAD_NORMS = "EXL2 readers take the norms of queries and keys for layer norms"

_FAMILIES = {
    "llama": Family(
        readers=("LlamaForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions=_SILU,
        reads=("attention_bias", "mlp_bias"),
        note="all rope types; biases",
    ),
    "mistral": Family(
        readers=("MistralForCausalLM",), stages=_PRE_NORM, reader_assumptions=_SILU, note="sliding window"
    ),
    "mixtral": Family(
        readers=("MixtralForCausalLM",),
        stages=_ATTENTION,
        experts=Experts("mlp.experts", gate="w1", up="w3", down="w2"),
        renamed={"mlp.": "block_sparse_moe."},
        reader_assumptions={**_SILU, "moe_intermediate_size": ()},
        note="experts",
    ),
    "qwen2": Family(
        readers=("Qwen2ForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions=_SILU,
        reads=("attention_bias",),  # no reader looks at it here: q, k and v always have biases
        note="biases of q, k and v",
    ),
    "qwen2_moe": Family(
        readers=(),
        stages=(
            *_PRE_NORM,
            InputGroup(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
            InputGroup(("mlp.shared_expert.down_proj",)),
        ),
        experts=Experts("mlp.experts"),
        note="experts beside a shared one",
    ),
    "qwen3": Family(
        readers=("Qwen3ForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions={**_SILU, "use_qk_norm": (True,)},
        reads=("attention_bias", "use_qk_norm"),
        quirk=_HEAD_NORMS,
        note="norms of queries and keys",
    ),
    "qwen3_moe": Family(
        readers=("Qwen3MoeForCausalLM",),
        stages=_PRE_NORM,
        experts=Experts("mlp.experts"),
        reader_assumptions={
            **_SILU,
            "use_qk_norm": (True,),
            "norm_topk_prob": (True,),
            "mlp_only_layers": ([],),
            "decoder_sparse_step": (1,),
        },
        reads=("attention_bias", "use_qk_norm"),
        quirk=_HEAD_NORMS,
        note="experts; norms of queries and keys",
    ),
    "gemma": Family(
        readers=("GemmaForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions={"hidden_act": _GELU, **_CAUSAL},
        reads=("attention_bias",),
        note="scaled embeddings, norms of 1 + weight",
    ),
    "gemma2": Family(
        readers=("Gemma2ForCausalLM",),
        stages=_GEMMA2,
        reader_assumptions={"hidden_activation": _GELU, **_CAUSAL},
        reads=_CAPPED,
        periodic_windows=True,
        note="norms before and after; soft-capping; every other block with a sliding window",
    ),
    "gemma3_text": Family(
        readers=("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        stages=_GEMMA2,
        written_as="Gemma3ForConditionalGeneration",
        prefix="language_model.",
        reader_assumptions={"hidden_activation": _GELU, "use_qk_norm": (True,), **_CAUSAL},
        reads=(*_CAPPED, "use_qk_norm"),
        rope_types=("default", "linear"),
        local_rope={"rope_type": "default", "rope_theta": 10000},
        periodic_windows=True,
        note="as Gemma 2; norms of queries and keys; five of six blocks with a sliding window and a rope of their own; "
        "written under the names of the model with vision, which are those that readers look for",
    ),
    "phi3": Family(
        readers=("Phi3ForCausalLM",),
        stages=_PRE_NORM,
        fused={"self_attn.qkv_proj": _QKV, **_FUSED_MLP},
        reader_assumptions=_SILU,
        reads=("partial_rotary_factor",),
        note="fused q, k, v and gate, up: split in the output",
    ),
    "granite": Family(
        readers=("GraniteForCausalLM",),
        stages=_PRE_NORM,
        multiplier="residual_multiplier",
        # Its biases are refused: readers multiply weights of o_proj and down_proj, but not biases.
        reader_assumptions={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        reads=(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "residual_multiplier",
        ),
        note="multipliers of embeddings, attention, residuals and logits",
    ),
    "glm4": Family(
        readers=("Glm4ForCausalLM",),
        stages=_post_norm("post_self_attn_layernorm", "post_mlp_layernorm"),
        fused=_FUSED_MLP,
        reader_assumptions=_SILU,
        reads=("attention_bias", "partial_rotary_factor"),
        note="norms before and after; fused gate, up: split in the output; rope on half of each head",
    ),
    "cohere": Family(
        readers=("CohereForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions=_SILU,
        reads=("attention_bias", "logit_scale", "use_qk_norm"),
        note="attention beside the MLP; scaled logits",
    ),
    "cohere2": Family(
        readers=("Cohere2ForCausalLM",),
        stages=_PRE_NORM,
        reader_assumptions=_SILU,
        reads=("attention_bias", "logit_scale"),
        periodic_windows=True,
        quirk="EXL2 readers rotate positions in blocks with full attention too, where this family does not",
        note="attention beside the MLP; scaled logits; three of four blocks with a sliding window, others without rope",
    ),
    "starcoder2": Family(
        readers=("Starcoder2ForCausalLM",),
        stages=(*_ATTENTION, InputGroup(("mlp.c_fc",)), InputGroup(("mlp.c_proj",), adds="mlp")),
        mlp=(("mlp.c_fc",), "mlp.c_proj"),
        reader_assumptions={"hidden_act": _GELU, "use_bias": (True,)},
        reads=("attention_bias", "mlp_bias"),  # no reader looks at them here: all linears always have biases
        note="no gate in the MLP; biases everywhere: its neurons are reordered instead of c_proj's rows",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A model whose language model is one part of several, as with vision.

    Attributes:
        text: Model type that the language model alone has; None where ``text_config`` says it.
        readers: Class names by which EXL2 readers know it.
        prefix: What the names of the language model's tensors begin with in EXL2 files.
        languages: Model types that readers take the language model for.
        vision: Model type that the vision part must have for readers to know it; None for any.
        tower: What readers want the names of the vision part's tensors to begin with, where Transformers leaves out
            the end of it.
        images: Key of config.json, dotted into a part -> the values of it by which readers make the same of images.
        note: What is special, for the table of families in the documentation.
    """

    text: str | None = None
    readers: tuple[str, ...]
    prefix: str = "language_model."
    languages: tuple[str, ...]
    vision: str | None = None
    tower: str = "vision_tower."
    images: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    note: str = ""

    def file_name(self, other: str) -> str:
        """Return the name in EXL2 files of a tensor that is not the language model's."""
        plain = other.removeprefix("model.")
        short = f"{self.tower.partition('.')[0]}."
        if plain.startswith(short) and not plain.startswith(self.tower):
            return self.tower + plain.removeprefix(short)
        return plain


_PIXTRAL = {
    "vision_config.hidden_act": ("silu", "swish"),
    "projector_hidden_act": _GELU,
    "vision_feature_layer": (-1, [-1]),
    "vision_feature_select_strategy": ("full",),
}

_COMPOSITES = {
    "gemma3": Composite(
        readers=("Gemma3ForConditionalGeneration",),
        languages=("gemma3_text",),
        images={"vision_config.hidden_act": _GELU},
        tower="vision_tower.vision_model.",
        note="Gemma 3 with a SigLIP tower",
    ),
    "llava": Composite(
        readers=("LlavaForConditionalGeneration",),
        languages=("llama", "mistral"),
        vision="pixtral",
        images=_PIXTRAL,
        note="Llama or Mistral with a Pixtral tower",
    ),
    "mistral3": Composite(
        readers=("Mistral3ForConditionalGeneration",),
        languages=("llama", "mistral"),
        vision="pixtral",
        images=_PIXTRAL,
        note="Mistral with a Pixtral tower and a patch merger",
    ),
    # On text alone their rope of three positions is that of Qwen2.
    "qwen2_vl": Composite(
        text="qwen2",
        readers=("Qwen2VLForConditionalGeneration",),
        languages=("qwen2",),
        prefix="",
        images={"vision_config.hidden_act": ("quick_gelu",)},
        note="Qwen2 with a tower; measured with the rope of text",
    ),
    "qwen2_5_vl": Composite(
        text="qwen2",
        readers=("Qwen2_5_VLForConditionalGeneration",),
        languages=("qwen2",),
        prefix="",
        images={"vision_config.hidden_act": ("silu", "swish")},
        note="as Qwen2-VL",
    ),
}


def composite_of(config: Mapping[str, Any]) -> Composite | None:
    """Return the entry of a model with several parts, by ``model_type``; None for a language model alone."""
    return _COMPOSITES.get(str(config.get("model_type")))


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether ``model_type`` names a family or a model of several parts that stands in the tables here."""
    return str(config.get("model_type")) in _FAMILIES.keys() | _COMPOSITES.keys()


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a language model that a config.json names in ``model_type``.

    Raises:
        UnsupportedModelError: The model type is unknown; the message lists those that are known.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        known = ", ".join(sorted(_FAMILIES.keys() | _COMPOSITES.keys()))
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not supported, expected one of {known}."
        )
    return family


def known_readers() -> list[str]:
    """Return the names of all architectures that EXL2 readers know, sorted."""
    entries: list[Family | Composite] = [*_FAMILIES.values(), *_COMPOSITES.values()]
    return sorted({name for entry in entries for name in entry.readers})
