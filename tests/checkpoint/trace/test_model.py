"""Whole models: against the table of families, against what their code says, and that none of many is refused."""

import time
from typing import Any

import pytest
import torch
from bpwise.checkpoint.model.families import Family, family_of
from bpwise.checkpoint.model.structure import BlockStructure, InputGroup
from bpwise.checkpoint.trace.model import discover
from bpwise.errors import UnsupportedModelError
from torch import nn

from ...decoders import DECODERS, empty_model, empty_model_of
from ...tiny_models import FAMILIES


def of_table(model: Any, family: Family, index: int, scale: float) -> list[tuple[Any, ...]]:
    """Input groups that the table gives a block; what Transformers has fused or stacked is one linear."""
    prefix = f"{family.blocks}.{index}."
    shapes = {name.removeprefix(prefix): each.shape for name, each in model.named_parameters() if prefix in name}
    fused = {part: whole for whole, parts in family.fused.items() for part in parts}
    names = {f"{prefix}{name}" for name in shapes}
    names |= {f"{prefix}{part}.weight" for part, whole in fused.items() if f"{whole}.weight" in shapes}
    experts = family.experts
    if experts is not None and f"{experts.path}.gate_up_proj" in shapes:
        numbers = range(shapes[f"{experts.path}.gate_up_proj"][0])
        names |= {family.file_name(f"{prefix}{experts.path}.{number}.{experts.gate}.weight") for number in numbers}
    groups = []
    for group in family.input_groups(index, names):
        linears = tuple(dict.fromkeys(fused.get(name, name) for name in group.linears))
        if experts is not None and group.expert is not None:
            stacked = "gate_up_proj" if group.reads_stream else "down_proj"
            linears = (f"{experts.path}.{group.expert}.{stacked}",)
        joined = group.adds, group.normed, scale if group.adds else 1.0
        groups.append((linears, group.expert, group.reads_stream, *joined))
    return list(dict.fromkeys(groups))


def as_in_table(group: InputGroup, family: Family) -> tuple[Any, ...]:
    """The same of a traced group; the table names the module around a linear that adds, if no norm follows."""
    adds = group.adds
    if adds is not None and not group.normed:
        assert adds == group.first
        adds = next(each.adds for each in family.groups if each.linears == group.linears)
        assert group.first.startswith(f"{adds}.")
    return group.linears, group.expert, group.reads_stream, adds, group.normed, group.scale


@pytest.mark.parametrize("name", FAMILIES)
def test_agrees_with_the_table(name: str) -> None:
    # Nor does the trace see more: what experts and a gated shared one add is left open by the table, too.
    model = empty_model(name)
    family = family_of({"model_type": name})
    traced = discover(model)
    assert (traced.blocks, traced.embedding, traced.head) == (family.blocks, "model.embed_tokens", "lm_head")
    scale = getattr(model.config, family.multiplier) if family.multiplier else 1.0
    for index, block in enumerate(traced.structures):
        assert [as_in_table(group, family) for group in block.groups] == of_table(model, family, index, scale)
        for linear, place in block.places.items():
            module, _, parameter = linear.rpartition(".")
            stacked = f"{family.experts_path}.{parameter}"
            assert place.parameter == (f"{linear}.weight" if place.expert is None else stacked)
            assert place.expert is None or module == f"{family.experts_path}.{place.expert}"
            assert place.rows is None
            assert not place.turned
    assert len({id(block) for block in traced.structures}) == (2 if name == "qwen2_moe" else 1)


def test_routers_of_the_table() -> None:
    dense, sparse = discover(empty_model("qwen2_moe")).structures
    assert dense.routers == dense.experts == ()
    assert sparse.routers == ("mlp.gate", "mlp.shared_expert_gate")
    assert sparse.experts == ("mlp.experts",)
    assert discover(empty_model("mixtral")).structures[0].routers == ("mlp.gate",)


def lines(block: BlockStructure) -> list[str]:
    """A block in words; of its experts the first."""
    text = []
    for group in block.groups:
        if not group.expert:
            turned = {block.places[linear].turned for linear in group.linears}
            assert len(turned) == 1
            scale = "" if group.scale == 1 else f" x {group.scale}"
            through = f" through {group.adds}" if group.normed else ""
            assert group.adds in (None, group.first) or group.normed
            text.append(
                " + ".join(group.linears)
                + (" (in, out)" if turned == {True} else "")
                + (" < normed stream" if group.reads_stream else "")
                + (f" > stream{through}{scale}" if group.adds else "")
            )
    return [*text, *(f"router {router}" for router in block.routers)]


def attention(output: str = "self_attn.o_proj > stream", reads: str = " < normed stream") -> list[str]:
    return [*(f"self_attn.{linear}_proj{reads}" for linear in "qkv"), output]


GATED_MLP = ["mlp.gate_proj + mlp.up_proj < normed stream", "mlp.down_proj > stream"]
ROUTED = ["mlp.experts.0.gate_up_proj < normed stream", "mlp.experts.0.down_proj", "router mlp.gate"]
SHARED = ["mlp.shared_experts.gate_proj + mlp.shared_experts.up_proj < normed stream"]
SHARED += ["mlp.shared_experts.down_proj > stream"]
GATED_SHARED = ["mlp.shared_expert.gate_proj + mlp.shared_expert.up_proj < normed stream"]
GATED_SHARED += ["mlp.shared_expert.down_proj", *ROUTED, "router mlp.shared_expert_gate"]
LATENT = ["self_attn.q_a_proj < normed stream", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa < normed stream"]
LATENT += ["self_attn.kv_b_proj", "self_attn.o_proj > stream"]
GEMMA = attention("self_attn.o_proj > stream through post_attention_layernorm")
GEMMA_MLP = ["mlp.gate_proj + mlp.up_proj < normed stream"]
SHARED_MLP = ["shared_mlp.input_linear < normed stream", "shared_mlp.output_linear > stream x 0.4"]
SHARED_MLP += [line.replace("mlp.", "block_sparse_moe.").replace("moe.gate", "moe.router") for line in ROUTED]
EXPERTS_AND_SHARED = ["mixer.shared_experts.up_proj < normed stream", "mixer.shared_experts.down_proj > stream"]

EXPECTED: dict[str, dict[int, list[str]]] = {
    "gpt_oss": {
        0: [
            *attention(),
            "mlp.experts.0.gate_up_proj (in, out) < normed stream",
            "mlp.experts.0.down_proj (in, out)",
            "router mlp.router",
        ]
    },
    "qwen3_next": {
        0: [
            "linear_attn.in_proj_qkvz < normed stream",
            "linear_attn.in_proj_ba < normed stream",
            "linear_attn.out_proj > stream",
            *GATED_SHARED,
        ],
        1: [*attention(), *GATED_SHARED],
    },
    "qwen3_5_text": {
        0: [
            *(f"linear_attn.in_proj_{part} < normed stream" for part in ("qkv", "z", "b", "a")),
            "linear_attn.out_proj > stream",
            *GATED_MLP,
        ]
    },
    "deepseek_v3": {0: [*LATENT, *GATED_MLP], 1: [*LATENT, *SHARED, *ROUTED]},
    "gpt2": {
        0: [
            "attn.c_attn (in, out) < normed stream",
            "attn.c_proj (in, out) > stream",
            "mlp.c_fc (in, out) < normed stream",
            "mlp.c_proj (in, out) > stream",
        ]
    },
    "falcon_h1": {  # two mixers side by side, each with its own scale
        0: [
            "mamba.in_proj < normed stream",
            "mamba.out_proj > stream x 0.125",
            *attention("self_attn.o_proj > stream x 0.25"),
            "feed_forward.up_proj + feed_forward.gate_proj < normed stream",
            "feed_forward.down_proj > stream",
        ]
    },
    "granitemoehybrid": {
        0: ["mamba.in_proj < normed stream", "mamba.out_proj > stream x 0.4", *SHARED_MLP],
        1: [*attention("self_attn.o_proj > stream x 0.4"), *SHARED_MLP],
    },
    "nemotron_h": {
        0: ["mixer.in_proj < normed stream", "mixer.out_proj > stream"],
        1: ["mixer.up_proj < normed stream", "mixer.down_proj > stream"],
        2: [line.replace("self_attn", "mixer") for line in attention()],
    },
    "nemotron_h_moe": {
        1: [
            *EXPERTS_AND_SHARED,
            "mixer.experts.0.up_proj < normed stream",
            "mixer.experts.0.down_proj",
            "router mixer.gate",
        ]
    },
    "nemotron_h_latent": {  # the experts work on less than a hidden state, which one linear makes and one takes back
        1: [
            "mixer.fc1_latent_proj < normed stream",
            "mixer.fc2_latent_proj > stream",
            *EXPERTS_AND_SHARED,
            "mixer.experts.0.up_proj",
            "mixer.experts.0.down_proj",
            "router mixer.gate",
        ]
    },
    "gemma4_per_layer": {
        0: [
            *GEMMA,
            *GEMMA_MLP,
            "mlp.down_proj > stream through post_feedforward_layernorm",
            "per_layer_input_gate",  # the stream as it is
            "per_layer_projection > stream through post_per_layer_input_norm",
        ],
        3: [  # takes keys and values of another block
            GEMMA[0],
            GEMMA[-1],
            *GEMMA_MLP,
            "mlp.down_proj > stream through post_feedforward_layernorm",
            "per_layer_input_gate",
            "per_layer_projection > stream through post_per_layer_input_norm",
        ],
    },
    "gemma4_moe": {  # the sum of experts and MLP, each with a norm of its own, goes through one more
        0: [
            *GEMMA,
            *GEMMA_MLP,
            "mlp.down_proj",
            *(line.removeprefix("mlp.") for line in ROUTED[:2]),
            "router router.proj",
        ],
        1: [  # keys are values
            *GEMMA[:2],
            GEMMA[-1],
            *GEMMA_MLP,
            "mlp.down_proj",
            *(line.removeprefix("mlp.") for line in ROUTED[:2]),
            "router router.proj",
        ],
    },
    "gemma3n_text": {  # four streams, of which one is read; no sum is plain
        0: [
            "altup.prediction_coefs",
            "laurel.linear_left < normed stream",
            "laurel.linear_right",
            *attention("self_attn.o_proj"),
            *GEMMA_MLP,
            "mlp.down_proj",
            "altup.correction_coefs",
            "per_layer_input_gate",
            "per_layer_projection",
        ]
    },
    "olmo2": {  # no norm before
        0: [
            *attention("self_attn.o_proj > stream through post_attention_layernorm", reads=""),
            "mlp.gate_proj + mlp.up_proj",
            "mlp.down_proj > stream through post_feedforward_layernorm",
        ]
    },
    "lfm2_moe": {
        0: [
            "conv.in_proj < normed stream",
            "conv.out_proj > stream",
            "feed_forward.w1 + feed_forward.w3 < normed stream",
            "feed_forward.w2 > stream",
        ],
        1: [
            *attention("self_attn.out_proj > stream"),
            *(line.replace("mlp.", "feed_forward.") for line in ROUTED),
        ],
    },
    "jamba": {
        0: [
            "mamba.in_proj < normed stream",
            "mamba.x_proj",
            "mamba.out_proj > stream",
            *(line.replace("mlp.", "feed_forward.") for line in GATED_MLP),
        ],
    },
    "gpt_neox": {
        0: [
            "attention.query_key_value < normed stream",
            "attention.dense > stream",
            "mlp.dense_h_to_4h < normed stream",
            "mlp.dense_4h_to_h > stream",
        ]
    },
}
"""Read by hand from Transformers' modeling files: by family and block."""


@pytest.mark.parametrize("name", EXPECTED)
def test_agrees_with_the_code_of_a_family(name: str) -> None:
    structures = discover(empty_model(name)).structures
    for index, expected in EXPECTED[name].items():
        assert lines(structures[index]) == expected


LEFT_OUT = {
    "jamba": {"mamba.dt_proj"},  # multiplies from the left, outside of its module
    "gemma3n_text": {"altup.modality_router"},  # called twice
}


@pytest.mark.parametrize("name", [*FAMILIES, *DECODERS])
def test_every_linear_is_found(name: str) -> None:
    model = empty_model(name)
    started = time.process_time()
    structure = discover(model)
    assert time.process_time() - started < 5
    for block, found in zip(model.get_submodule(structure.blocks), structure.structures, strict=True):
        modules = dict(block.named_modules())
        linears = {path for path, module in modules.items() if type(module).__name__ in ("Linear", "Conv1D")}
        parameters = dict(block.named_parameters())
        stacked = {path for path, each in parameters.items() if each.ndim == 3 and "conv" not in path}
        places = found.places.values()
        assert {place.parameter for place in places if place.expert is not None} == stacked
        in_groups = {place.parameter.removesuffix(".weight") for place in places if place.expert is None}
        assert not in_groups & {*found.routers}
        assert in_groups | ({*found.routers} & linears) == linears - LEFT_OUT.get(name, set())
        assert {name: place.expert for name, place in found.places.items()} == {
            name: group.expert for group in found.groups for name in group.linears
        }
        experts = {number for path in stacked for number in range(parameters[path].shape[0])}
        assert {group.expert for group in found.groups} - {None} == experts


A_MOE = {"attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8}
A_MOE |= {"moe_intermediate_size": 704, "hidden_size": 2816, "intermediate_size": 2112, "num_attention_heads": 16}
A_MOE |= {"num_key_value_heads": 8, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0}
A_MOE |= {"num_kv_shared_layers": 0, "num_hidden_layers": 30, "vocab_size": 262144}


@pytest.mark.parametrize(
    ("model_type", "settings", "weights", "kinds"),
    [
        pytest.param("deepseek_v3", {}, 671.0, 2, id="DeepSeek-V3"),
        pytest.param("gpt_oss", {}, 116.8, 1, id="gpt-oss-120b"),
        pytest.param("qwen3_5_moe_text", {}, 34.7, 2, id="Qwen3.5-35B-A3B"),
        pytest.param("gemma4_text", A_MOE, 25.2, 2, id="gemma-4-26B-A4B"),
    ],
)
def test_real_sizes(model_type: str, settings: dict[str, Any], weights: float, kinds: int) -> None:
    model = empty_model_of(model_type, **settings)  # what is not set is what the class has: the sizes of these models
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(weights, abs=0.05)
    started = time.process_time()
    structure = discover(model)
    assert time.process_time() - started < 10  # about 1 on an idle core
    assert len({id(block) for block in structure.structures}) == kinds
    in_places = [place for block in structure.structures for place in block.places.values()]
    assert len(in_places) > len(structure.structures) * 8


def test_the_model_is_left_as_it_was() -> None:
    model = empty_model("falcon_h1").train()
    for module in model.modules():  # as measuring has it: what no checkpoint holds lies on the CPU
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.ones_like(getattr(module, name), device="cpu"))
    config = model.config.to_dict(), model.config._attn_implementation, model.config._experts_implementation
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = discover(empty_model("falcon_h1"))
    assert discover(model) == expected
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert (model.config.to_dict(), model.config._attn_implementation, model.config._experts_implementation) == config
    assert model.training
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_weights_may_be_there() -> None:
    settings = {"num_hidden_layers": 1}
    with torch.device("meta"):
        empty = empty_model("gpt_oss", **settings)
    assert discover(empty.to_empty(device="cpu")) == discover(empty_model("gpt_oss", **settings))


def test_models_that_do_not_run_are_refused() -> None:
    model = empty_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(3, 64, device="meta")
    with pytest.raises(UnsupportedModelError, match=r"llama: the model does not run without weights \(RuntimeError: "):
        discover(model)
    assert "forward" not in vars(model.model.layers[0])


def test_blocks_that_run_twice_are_refused() -> None:
    model = empty_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="its blocks are not run one after another"):
        discover(model)


def test_models_without_a_head_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="llama: the model has no output head"):
        discover(empty_model("llama").model)
