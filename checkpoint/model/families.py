"""How each model family is cut into blocks and linears, and what its tensors are called: data, one entry a family.

A block is worked through in input groups. The linears of one read a common input and share its Hessian, and none
of them depends on the others. Input groups come in the order in which the block computes them.

Names inside a block are one linear each; where Transformers has one module for several of them, or keeps experts in one
tensor, ``measure.model.surgery`` takes it apart. Source: Transformers 5 (``modeling_*.py``, ``conversion_mapping.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import UnsupportedModelError
from .names import HEAD, config_features, text_config
from .structure import BlockStructure, InputGroup, LinearPlace

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Composite",
    "Experts",
    "Family",
    "composite_of",
    "family_of",
    "is_known",
    "listed_family",
]


EMBEDDING = "model.embed_tokens.weight"
"""Full name of the table of token embeddings."""


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

    def groups(self, expert: int) -> tuple[InputGroup, InputGroup]:
        """Return the two input groups of one expert."""
        prefix = f"{self.path}.{expert}"
        return (
            InputGroup((f"{prefix}.{self.gate}", f"{prefix}.{self.up}"), expert=expert, reads_stream=True),
            InputGroup((f"{prefix}.{self.down}",), expert=expert),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Architecture families that share names and structure.

    Attributes:
        groups: Input groups of decoder blocks, in the order of computation. A block has those whose linears are stored.
        experts: The experts of blocks that have some; their input groups come after the others.
        fused: Modules of Transformers that are several linears: name inside the block -> names of its parts.
        mlp: The linears of an MLP that make its neurons, and the one that reads them.
        renamed: Start of a module's name inside the block in Transformers -> start of its name in files.
        norms: Names inside the block of the norms that attention and MLP read.
        norm_offset: What is added to the stored weight of a norm.
        routers: Linears inside the block that read what the MLP reads, and are not quantized.
        multiplier: Key of config.json whose value multiplies what blocks add to the residual stream.
        wrapped: Whether its tensors may have the names of the model with vision that it is a part of.
        note: What is special, for the table of families in the documentation.
    """

    groups: tuple[InputGroup, ...]
    experts: Experts | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mlp: tuple[tuple[str, ...], str] = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    renamed: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norm_offset: float = 0.0
    routers: tuple[str, ...] = ()
    multiplier: str | None = None
    wrapped: bool = False
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
            names: Names of the language model's tensors.
        """
        groups = [group for group in self.groups if self._stored(index, group, names)]
        if self.experts is not None:
            number = 0
            while self._stored(index, (pair := self.experts.groups(number))[0], names):
                groups += pair
                number += 1
        return tuple(groups)

    def _stored(self, index: int, group: InputGroup, names: Collection[str]) -> bool:
        return any(f"{name}.weight" in names for name in self.linear_names(index, group))

    def linear_names(self, block: int, group: InputGroup) -> tuple[str, ...]:
        """Return the full names of an input group's linears in one block."""
        return tuple(self.file_name(f"{self.blocks}.{block}.{name}") for name in group.linears)

    def structure(self, index: int, names: Collection[str], config: Mapping[str, Any]) -> BlockStructure:
        """Return the linears of one block, under their names in files.

        Args:
            index: Which block.
            names: Names of the language model's tensors.
            config: The language model's config, which gives the sizes of what is fused.
        """
        groups = self.input_groups(index, names)
        prefix = f"{self.blocks}.{index}."
        inside = {name: self.file_name(prefix + name).removeprefix(prefix) for each in groups for name in each.linears}
        scale = 1.0 if self.multiplier is None else float(config[self.multiplier])
        return BlockStructure(
            groups=tuple(
                replace(
                    each,
                    linears=tuple(inside[name] for name in each.linears),
                    scale=scale if each.joins_stream else each.scale,
                )
                for each in groups
            ),
            places={inside[name]: self.place(name, config) for name in inside},
            experts=(self.experts_path,) if any(each.expert is not None for each in groups) else (),
        )

    def place(self, name: str, config: Mapping[str, Any]) -> LinearPlace:
        """Return where the weight of a linear lies in a block of Transformers' model.

        Args:
            name: Its name inside the block, as in ``groups``.
            config: The language model's config.
        """
        outputs = config_features(name, config)[1] or 0
        for fused, parts in self.fused.items():
            if name in parts:
                first = sum(config_features(part, config)[1] or 0 for part in parts[: parts.index(name)])
                return LinearPlace(f"{fused}.weight", rows=(first, first + outputs))
        if self.experts is not None and name.startswith(f"{self.experts.path}."):
            number, kind = name.removeprefix(f"{self.experts.path}.").split(".")
            if kind == self.experts.down:
                return LinearPlace(f"{self.experts.path}.down_proj", expert=int(number))
            rows = (0, outputs) if kind == self.experts.gate else (outputs, 2 * outputs)
            return LinearPlace(f"{self.experts.path}.gate_up_proj", expert=int(number), rows=rows)
        return LinearPlace(f"{name}.weight")

    def file_name(self, name: str) -> str:
        """Return the name in files of a module or parameter that the model has under a full name."""
        for ours, theirs in self.renamed.items():
            head, found, tail = name.partition(f".{ours}")
            if found and name.startswith(f"{self.blocks}."):
                return f"{head}.{theirs}{tail}"
        return name


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

_EACH_OF_QKV = tuple(InputGroup((name,), reads_stream=True) for name in _QKV)
_ATTENTION = (*_EACH_OF_QKV, InputGroup(("self_attn.o_proj",), adds="self_attn"))
_GATED_MLP = (InputGroup(_GATE_UP, reads_stream=True), InputGroup(("mlp.down_proj",), adds="mlp"))
_PRE_NORM = (*_ATTENTION, *_GATED_MLP)


def _post_norm(attention: str, mlp: str) -> tuple[InputGroup, ...]:
    return (
        *_EACH_OF_QKV,
        InputGroup(("self_attn.o_proj",), adds=attention, normed=True),
        InputGroup(_GATE_UP, reads_stream=True),
        InputGroup(("mlp.down_proj",), adds=mlp, normed=True),
    )


_GEMMA2 = _post_norm("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
_ONE_NORM = ("input_layernorm", "input_layernorm")
_FUSED_MLP = {"mlp.gate_up_proj": _GATE_UP}

_FAMILIES = {
    "llama": Family(groups=_PRE_NORM, note="all rope types; biases"),
    "mistral": Family(groups=_PRE_NORM, note="sliding window"),
    "mixtral": Family(
        groups=_ATTENTION,
        experts=Experts("mlp.experts", gate="w1", up="w3", down="w2"),
        renamed={"mlp.": "block_sparse_moe."},
        routers=("mlp.gate",),
        note="experts",
    ),
    "qwen2": Family(groups=_PRE_NORM, note="biases of q, k and v"),
    "qwen2_moe": Family(
        groups=(
            *_PRE_NORM,
            InputGroup(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), reads_stream=True),
            InputGroup(("mlp.shared_expert.down_proj",)),
        ),
        experts=Experts("mlp.experts"),
        routers=("mlp.gate", "mlp.shared_expert_gate"),
        note="experts beside a shared one",
    ),
    "qwen3": Family(groups=_PRE_NORM, note="norms of queries and keys"),
    "qwen3_moe": Family(
        groups=_PRE_NORM,
        experts=Experts("mlp.experts"),
        routers=("mlp.gate",),
        note="experts; norms of queries and keys",
    ),
    "gemma": Family(groups=_PRE_NORM, norm_offset=1.0, note="scaled embeddings, norms of 1 + weight"),
    "gemma2": Family(
        groups=_GEMMA2,
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        note="norms before and after; soft-capping; every other block with a sliding window",
    ),
    "gemma3_text": Family(
        groups=_GEMMA2,
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        wrapped=True,
        note="as Gemma 2; norms of queries and keys; five of six blocks with a sliding window and a rope of their own",
    ),
    "phi3": Family(
        groups=_PRE_NORM,
        fused={"self_attn.qkv_proj": _QKV, **_FUSED_MLP},
        note="fused q, k, v and gate, up: split in the output",
    ),
    "granite": Family(
        groups=_PRE_NORM,
        multiplier="residual_multiplier",
        note="multipliers of embeddings, attention, residuals and logits",
    ),
    "glm4": Family(
        groups=_post_norm("post_self_attn_layernorm", "post_mlp_layernorm"),
        fused=_FUSED_MLP,
        note="norms before and after; fused gate, up: split in the output; rope on half of each head",
    ),
    "cohere": Family(groups=_PRE_NORM, norms=_ONE_NORM, note="attention beside the MLP; scaled logits"),
    "cohere2": Family(
        groups=_PRE_NORM,
        norms=_ONE_NORM,
        note="attention beside the MLP; scaled logits; three of four blocks with a sliding window, others without rope",
    ),
    "starcoder2": Family(
        groups=(*_ATTENTION, InputGroup(("mlp.c_fc",), reads_stream=True), InputGroup(("mlp.c_proj",), adds="mlp")),
        mlp=(("mlp.c_fc",), "mlp.c_proj"),
        note="no gate in the MLP; biases everywhere: its neurons are reordered instead of c_proj's rows",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A model whose language model is one part of several, as with vision.

    Attributes:
        text: Model type that the language model alone has; None where ``text_config`` says it.
        note: What is special, for the table of families in the documentation.
    """

    text: str | None = None
    note: str = ""


_COMPOSITES = {
    "gemma3": Composite(note="Gemma 3 with a SigLIP tower"),
    "llava": Composite(note="Llama or Mistral with a Pixtral tower"),
    "mistral3": Composite(note="Mistral with a Pixtral tower and a patch merger"),
    # On text alone their rope of three positions is that of Qwen2.
    "qwen2_vl": Composite(text="qwen2", note="Qwen2 with a tower; measured with the rope of text"),
    "qwen2_5_vl": Composite(text="qwen2", note="as Qwen2-VL"),
    "qwen3_vl": Composite(text="qwen3", note="Qwen3 with a tower; measured with the rope of text"),
    "qwen3_vl_moe": Composite(text="qwen3_moe", note="Qwen3-MoE with a tower; measured with the rope of text"),
}


def composite_of(config: Mapping[str, Any]) -> Composite | None:
    """Return what is known of a model with several parts, whether it is listed here or not.

    Returns:
        None for a language model alone.
    """
    listed = _COMPOSITES.get(str(config.get("model_type")))
    return Composite() if listed is None and text_config(config) is not config else listed


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether ``model_type`` names a family or a model of several parts that stands in the tables here."""
    return str(config.get("model_type")) in _FAMILIES.keys() | _COMPOSITES.keys()


def listed_family(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a language model by ``model_type``; None if it is not listed here."""
    return _FAMILIES.get(str(config.get("model_type")))


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a language model that a config.json names in ``model_type``.

    Raises:
        UnsupportedModelError: The model type is unknown; the message lists those that are known.
    """
    model_type = config.get("model_type")
    family = listed_family(config)
    if family is None:
        known = ", ".join(sorted(_FAMILIES.keys() | _COMPOSITES.keys()))
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not supported. Expected one of {known}. Choose another model."
        )
    return family
