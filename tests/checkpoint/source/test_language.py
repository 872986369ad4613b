"""Language models of any family, their tensors compared with those of Transformers' own model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.loading.memory import ModelInMemory
from bpwise.checkpoint.model.config import parse_config
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import LanguageModel, WeightOverlay, language_model
from bpwise.checkpoint.source.linears import model_linears
from bpwise.checkpoint.source.original import open_model
from bpwise.errors import CheckpointError, UnsupportedModelError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from tests.decoders import DECODERS
from tests.saved_decoders import ALL, COMPOSITES, decoder_config, fill, save_decoder


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def opened(directory: Path) -> LanguageModel:
    return language_model(open_model(directory))


def change_weights(directory: Path, **changes: Tensor | None) -> None:
    """Store other tensors too, or leave some out; dots are written as two underscores."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, file, {"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def seen_as_linear(reference: nn.Module, name: str, place: Any) -> Tensor:
    """A linear's weight as (out, in), by what its module in Transformers' model says of itself."""
    module, _, leaf = name.rpartition(".")
    owner: Any = reference.get_submodule(module)
    weight: Tensor = getattr(owner, leaf).detach()
    if place.expert is not None:
        weight = weight[place.expert]
    if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False):
        weight = weight.T
    return weight if place.rows is None else weight[slice(*place.rows)]


@pytest.mark.parametrize("name", sorted(ALL))
def test_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    reference, model = loaded(tmp_path), opened(tmp_path)
    for parameter, expected in reference.state_dict().items():
        assert model.has_parameter(parameter)
        assert model.parameter_shape(parameter) == tuple(expected.shape)
        assert torch.equal(model.parameter(parameter), expected), parameter
    assert not model.has_parameter("model.layers.0.self_attn.nothing.weight")
    for tensor in model.names:
        assert tuple(model.tensor(tensor).shape) == model.shape(tensor)
    assert (model.others, model.tied_embeddings) == (frozenset(), reference.config.tie_word_embeddings)
    assert reference.get_submodule(model.embedding_name) is reference.get_input_embeddings()
    assert reference.get_submodule(model.head_name) is reference.get_output_embeddings()
    assert len(reference.get_submodule(model.blocks)) == model.block_count == len(model.structure.structures)
    for index, block in enumerate(model.structure.structures):
        prefix = f"{model.blocks}.{index}."
        assert block.places
        for linear, place in block.places.items():
            expected = seen_as_linear(reference, prefix + place.parameter, place)
            assert torch.equal(model.tensor(f"{prefix}{linear}.weight"), expected), linear


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt2", "gpt_oss", "mixtral", "phi3", "qwen3_5_text"])
def test_every_stored_byte_counts_once(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    model = opened(tmp_path)
    expected = (tmp_path / "model.safetensors").stat().st_size
    total = sum(model.stored_bytes(tensor) for tensor in model.names)
    assert 0 <= expected - total < 32 * len(load_file(tmp_path / "model.safetensors")) * 8  # the header


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_the_config_says_what_the_class_fills_in(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    meant, config = decoder_config(name), opened(tmp_path).config
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):
        assert config[key] == getattr(meant, key)
    again = parse_config(config, tmp_path / "config.json")
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(each) for each in (meant, again)]
    shapes, same = ({name: each.shape for name, each in model.state_dict().items()} for model in models)
    assert shapes == same


def test_names_of_experts_and_of_turned_weights(tmp_path: Path) -> None:
    save_decoder(tmp_path / "gpt_oss", "gpt_oss")
    model = opened(tmp_path / "gpt_oss")
    experts = "model.layers.1.mlp.experts"
    assert {f"{experts}.3.gate_up_proj.weight", f"{experts}.gate_up_proj_bias"} <= model.names
    assert f"{experts}.gate_up_proj" not in model.names
    assert model.shape(f"{experts}.3.gate_up_proj.weight") == (192, 64)
    assert model.parameter_shape(f"{experts}.gate_up_proj") == (4, 64, 192)
    save_decoder(tmp_path / "gpt2", "gpt2")
    model = opened(tmp_path / "gpt2")
    assert model.shape("transformer.h.0.attn.c_attn.weight") == (192, 64)
    assert model.parameter_shape("transformer.h.0.attn.c_attn.weight") == (64, 192)


def test_linears_are_listed_in_the_order_of_the_groups(tmp_path: Path) -> None:
    save_decoder(tmp_path, "olmoe")
    linears, head = model_linears(opened(tmp_path))
    assert [linear.name for linear in linears[:4]] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    expected = ("model.layers.1.mlp.experts.3.down_proj", 96, 64)
    assert expected in [(linear.name, linear.in_features, linear.out_features) for linear in linears]
    assert len(linears) == 2 * (4 + 4 * 2)
    assert (head.name, head.in_features, head.out_features) == ("lm_head", 64, 264)


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gpt_oss", "mixtral", "phi3"])
def test_a_block_is_loaded_without_the_others(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    read: list[str] = []

    class Watched(Checkpoint):
        def stored(self, name: str, index: int | None = None) -> Tensor:
            read.append(name)
            return super().stored(name, index)

    model = LanguageModel(Watched.open(tmp_path))
    assert model.structure and read == []
    inner = loaded(tmp_path).model.layers[1].state_dict()
    for parameter in inner:
        model.parameter(f"model.layers.1.{parameter}")
    assert read
    assert all(name.startswith("model.layers.1.") for name in read)
    assert len(read) == len(set(read))


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "mixtral", "minimax_m2"])
def test_an_expert_is_loaded_without_the_others(name: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, name)
    read: list[tuple[str, int | None]] = []

    class Watched(Checkpoint):
        def stored(self, name: str, index: int | None = None) -> Tensor:
            read.append((name, index))
            return super().stored(name, index)

    model = LanguageModel(Watched.open(tmp_path))
    for weight in (each for each in sorted(model.names) if ".experts.3." in each):
        read.clear()
        model.tensor(weight)
        # One matrix, or two of which Transformers makes one.
        assert 1 <= len(read) <= 2
        assert all(".experts.3." in stored or index == 3 for stored, index in read)


def test_the_skeleton_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_decoder(tmp_path, "qwen3_5_text")
    built = []
    init = ModelInMemory.__init__
    monkeypatch.setattr(ModelInMemory, "__init__", lambda self, *args: (built.append(1), init(self, *args))[1])
    source = open_model(tmp_path)
    assert language_model(source).structure is language_model(source).structure
    assert len(built) == 1


class TestParts:
    @pytest.mark.parametrize("name", sorted(COMPOSITES))
    def test_the_language_model_inside(self, name: str, tmp_path: Path) -> None:
        config = AutoConfig.for_model(name, **COMPOSITES[name])
        whole = fill(AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16))
        whole.save_pretrained(tmp_path)
        expected = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
        model = opened(tmp_path)
        with torch.device("meta"):
            alone = AutoModelForCausalLM.from_config(parse_config(model.config, tmp_path / "config.json"))
        inside = {f"model.{key.removeprefix('model.language_model.')}" for key in expected if ".language_model." in key}
        assert inside | {"lm_head.weight"} == alone.state_dict().keys()
        for key in alone.state_dict():
            there = key if key.startswith("lm_head.") else key.replace("model.", "model.language_model.", 1)
            assert torch.equal(model.parameter(key), expected[there]), key
        stored = load_file(tmp_path / "model.safetensors").keys()
        assert model.others == {key for key in stored if re.search(r"visual|vision|projector|audio", key)}
        assert model.others
        for index, block in enumerate(model.structure.structures):
            for linear, place in block.places.items():
                weight = expected[f"model.language_model.layers.{index}.{place.parameter}"]
                weight = weight if place.expert is None else weight[place.expert]
                weight = weight if place.rows is None else weight[slice(*place.rows)]
                assert torch.equal(model.tensor(f"model.layers.{index}.{linear}.weight"), weight)

    @pytest.mark.parametrize(
        "prefix", ["model.language_model.", "language_model.model."], ids=["in-memory", "as-older-hubs"]
    )
    def test_a_whole_that_cannot_be_built(self, prefix: str, tmp_path: Path) -> None:
        # Gemma 3n's tower needs timm: its language model is found by the names alone.
        expected = save_decoder(tmp_path, "gemma3n_text").state_dict()
        file = tmp_path / "model.safetensors"
        weights = {name.replace("model.", prefix, 1): tensor for name, tensor in load_file(file).items()}
        save_file({**weights, "model.vision_tower.conv.weight": torch.ones(2, 2)}, file, {"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        parts = {"text_config": config, "vision_config": {"model_type": "gemma3n_vision"}, "audio_config": {}}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", **parts}))
        model = opened(tmp_path)
        assert (model.config["model_type"], model.tied_embeddings) == ("gemma3n_text", True)
        assert model.others == {"model.vision_tower.conv.weight"}
        for name, tensor in expected.items():
            assert torch.equal(model.parameter(name), tensor)

    def test_an_expert_of_a_stack_that_is_stored_turned(self, tmp_path: Path) -> None:
        config = AutoConfig.for_model("qwen3_vl_moe", **COMPOSITES["qwen3_vl_moe"])
        fill(AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)).save_pretrained(tmp_path)
        file, name = tmp_path / "model.safetensors", "model.language_model.layers.1.mlp.experts.gate_up_proj"
        # As the Hub has them: (experts, inputs, outputs).
        stored = {key: each.mT.contiguous() if each.ndim == 3 else each for key, each in load_file(file).items()}
        save_file(stored, file, {"format": "pt"})
        expected = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).get_parameter(name)

        class Watched(Checkpoint):
            def stored(self, name: str, index: int | None = None) -> Tensor:
                assert index == 2
                return super().stored(name, index)

        model = LanguageModel(Watched.open(tmp_path))
        up = model.tensor("model.layers.1.mlp.experts.2.up_proj.weight")
        assert torch.equal(up, expected[2, 24:])
        assert torch.equal(up, stored[name][2].T[24:])

    def test_what_no_text_needs(self, tmp_path: Path) -> None:
        # As Qwen3.5 and GLM have them: blocks that predict further tokens.
        save_decoder(tmp_path, "glm4_moe")
        names = ("mtp__fc__weight", "model__layers__2__mlp__experts__0__up_proj__weight")
        extra = {name: torch.ones(2, 2) for name in names}
        change_weights(tmp_path, **extra)
        model = opened(tmp_path)
        assert model.others == {name.replace("__", ".") for name in extra}
        assert model.block_count == 2


class TestTies:
    @pytest.mark.parametrize("stored", [None, "same", "other"])
    @pytest.mark.parametrize("flag", [True, False])
    def test_as_transformers_ties(self, stored: str | None, flag: bool, tmp_path: Path) -> None:
        save_decoder(tmp_path, "gpt_neox", tie_word_embeddings=True)
        table = load_file(tmp_path / "model.safetensors")["gpt_neox.embed_in.weight"]
        if stored:
            change_weights(tmp_path, embed_out__weight=table.clone() if stored == "same" else table + 1)
        change_config(tmp_path, tie_word_embeddings=flag)
        model = opened(tmp_path)
        assert model.tied_embeddings == (flag and stored != "other")
        if stored is None and not flag:
            with pytest.raises(CheckpointError, match=r"nothing is stored for lm_head\.weight"):
                model.parameter("lm_head.weight")
        else:
            assert torch.equal(model.parameter("lm_head.weight"), table + 1 if stored == "other" else table)


class TestOverlay:
    @pytest.mark.parametrize("name", ["gpt_oss", "gpt2", "qwen3_5_moe_text", "mixtral", "phi3", "llama"])
    def test_parameters_hold_the_other_weights(self, name: str, tmp_path: Path) -> None:
        save_decoder(tmp_path, name)
        source = open_model(tmp_path)
        model, reference = language_model(source), loaded(tmp_path)
        block = model.structure.structures[1]
        prefix = f"{model.blocks}.1."
        others = {prefix + each: 2 * model.tensor(f"{prefix}{each}.weight") for each in list(block.places)[::2]}
        others["lm_head"] = torch.full_like(model.parameter("lm_head.weight"), 3)
        overlay = WeightOverlay(source, {each: lambda w=weight: w for each, weight in others.items()})
        for linear, place in block.places.items():
            made = overlay.parameter(prefix + place.parameter)
            got = made if place.expert is None else made[place.expert]
            got = got.T if place.turned else got
            got = got if place.rows is None else got[slice(*place.rows)]
            unchanged = seen_as_linear(reference, prefix + place.parameter, place)
            assert torch.equal(got, others.get(prefix + linear, unchanged)), linear
            assert made.shape == reference.get_parameter(prefix + place.parameter).shape
        assert torch.equal(overlay.parameter("lm_head.weight"), others["lm_head"])
        assert overlay.parameter_shape("lm_head.weight") == tuple(others["lm_head"].shape)
        assert overlay.has_parameter("lm_head.weight") and not overlay.tied_embeddings
        norms = (each for each, tensor in reference.named_parameters() if each.startswith(prefix) and tensor.ndim == 1)
        norm = next(norms)
        assert torch.equal(overlay.parameter(norm), reference.get_parameter(norm))


OWN_CODE = {"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_model"}, "does not know model_type 'no_such_model'"),
        ({"model_type": "vit"}, "model_type 'vit' is not a decoder"),
        ({"model_type": "bart"}, "model_type 'bart' is not a decoder"),
        (OWN_CODE, "code that comes with a model is never run"),
    ],
    ids=["unknown", "no-language-model", "encoder-and-decoder", "own-code"],
)
def test_what_is_no_decoder_of_transformers(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, "smollm3")
    change_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        opened(tmp_path)


def test_an_encoder(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'bert' is not a decoder that Transformers"):
        opened(tmp_path)


def test_family_of_what_is_not_listed(tmp_path: Path) -> None:
    save_decoder(tmp_path, "smollm3")
    with pytest.raises(UnsupportedModelError, match=r"'smollm3' is not supported\. Expected one of cohere"):
        _ = opened(tmp_path).family


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layers.1.mlp.up_proj.weight", r"none of them for model\.layers\.1\.mlp\.up_proj\.weight\. Expected all"),
        ("layers.1.", r"Got no tensor of model\.layers\.1\. Expected 2 blocks by config\.json"),
        ("embed_tokens", r"none of them for model\.embed_tokens\.weight"),
    ],
    ids=["linear", "block", "embedding"],
)
def test_missing_weights(lost: str, message: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, "smollm3")
    stored = load_file(tmp_path / "model.safetensors")
    change_weights(tmp_path, **{name.replace(".", "__"): None for name in stored if lost in name})
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path)


def test_missing_tensor_of_another_name(tmp_path: Path) -> None:
    save_decoder(tmp_path, "smollm3")
    for read in (opened(tmp_path).tensor, opened(tmp_path).shape):
        with pytest.raises(CheckpointError, match=r"tensor 'model\.nothing' is missing"):
            read("model.nothing")
