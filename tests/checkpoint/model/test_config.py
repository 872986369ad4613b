"""config.json completed and checked: beside what AutoConfig makes of the same file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.model.config import complete_config, parse_config
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.errors import CheckpointError, UnsupportedModelError
from bpwise.measure.model.stream import StreamedModel
from transformers import AutoConfig, AutoModelForCausalLM

from ...tiny_models import FAMILIES, SIZES, VISION

# What makers leave out: Gemma 3 4B and 12B, Llama 2, Mistral, Qwen 2.5, and others say no more of their language model.
STATED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "moe_intermediate_size")
WHERE = Path("m/config.json")


def parsed_by_transformers(directory: Path, config: dict[str, Any]) -> Any:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sizes_that_a_file_leaves_out_are_those_of_the_class(kind: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**SIZES, **FAMILIES[kind], "model_type": kind}.items() if key in STATED}
    config |= {"hidden_size": 4096, "num_hidden_layers": 6}  # to be divided by any number of heads
    expected = parsed_by_transformers(tmp_path / "m", config)
    got = complete_config(config, WHERE, embedding_rows=777)
    for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_parameters"):
        assert got[key] == getattr(expected, key), key
    epsilon = next(key for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon") if hasattr(expected, key))
    assert got[epsilon] == getattr(expected, epsilon)
    if getattr(expected, "head_dim", None) is not None:
        assert got["head_dim"] == expected.head_dim
    assert got["vocab_size"] == 777


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_makes_the_same_of_a_completed_file(kind: str, tmp_path: Path) -> None:
    config = {**SIZES, **FAMILIES[kind], "model_type": kind}
    del config["max_position_embeddings"]
    completed = complete_config(config, WHERE, embedding_rows=None)
    first, second = (parsed_by_transformers(tmp_path / str(len(c)), c).to_dict() for c in (config, completed))
    assert {**second, "_name_or_path": ""} == {**first, "_name_or_path": ""}


@pytest.mark.parametrize("kind", VISION)
def test_the_language_part_is_completed(kind: str, tmp_path: Path) -> None:
    whole = {**VISION[kind], "model_type": kind, "text_config": {**VISION[kind]["text_config"]}}
    for key in ("vocab_size", "max_position_embeddings"):
        del whole["text_config"][key]
    expected = parsed_by_transformers(tmp_path / "m", whole).get_text_config()
    got = complete_config(whole, WHERE, embedding_rows=264)
    assert got["text_config"]["max_position_embeddings"] == expected.max_position_embeddings
    assert got["text_config"]["vocab_size"] == 264  # stored, and not the class's
    assert got["vision_config"].items() >= whole["vision_config"].items()
    assert "max_position_embeddings" not in whole["text_config"], "the original is not modified"


def test_stated_values_and_ids_are_left_alone() -> None:
    config = {**SIZES, "model_type": "llama", "rms_norm_eps": 1e-3, "head_dim": 24, "rope_theta": 3e4}
    config["is_llama_config"] = True  # as SmolLM2 is shipped
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
        del config[key]
    got = complete_config(config, WHERE, embedding_rows=None)
    assert {key: got[key] for key in config} == config
    assert not got.keys() & {"bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range"}
    assert got["rope_parameters"]["rope_theta"] == 3e4


def test_null_means_that_the_class_decides() -> None:
    config = {**SIZES, "model_type": "llama", "head_dim": None, "num_key_value_heads": None}
    got = complete_config(config, WHERE, embedding_rows=None)
    assert (got["head_dim"], got["num_key_value_heads"]) == (64 // 4, 4)  # as configuration_llama.py computes them


def test_an_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    written = AutoConfig.for_model("granitemoehybrid", time_step_limit=(0.0, float("inf")))
    written.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    assert list(parse_config(config, WHERE).time_step_limit) == [0.0, float("inf")]


def test_su_is_longrope(tmp_path: Path) -> None:
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    config = {**SIZES, "model_type": "phi3", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    got = complete_config({**config, "rope_scaling": {"type": "su", **factors}}, WHERE, embedding_rows=None)
    again = parsed_by_transformers(tmp_path / "m", {**config, "rope_scaling": {"type": "longrope", **factors}})
    want = {key: value for key, value in again.rope_parameters.items() if key != "type"}  # the older of two keys
    assert got["rope_parameters"] == want


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no-layers": ({"num_hidden_layers": 0}, "impossible num_hidden_layers. Got 0"),
    "endless-layers": ({"num_hidden_layers": 10**7}, "impossible num_hidden_layers. Got 10000000"),
    "huge": ({"hidden_size": 10**12}, "impossible hidden_size. Got 1000000000000"),
    "no-groups": ({"num_key_value_heads": 0}, "impossible num_key_value_heads. Got 0"),
    "groups": (
        {"num_key_value_heads": 3},
        "num_attention_heads and num_key_value_heads do not fit together. Got 4 and 3",
    ),
    "text": ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "not a multiple of the number of attention heads"),
    "padding": ({"pad_token_id": 300}, "pad_token_id is outside the vocabulary. Got 300"),
    "rope-type": ({"rope_scaling": {"type": "ntk-by-parts", "factor": 4.0}}, "unknown rope_type. Got 'ntk-by-parts'"),
    "rope-key": ({"rope_scaling": {"type": "linear"}}, "Missing required keys"),
    "rope-theta": ({"rope_theta": None}, "impossible rope_theta. Got None"),
    "two-bases": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "two different rotary bases. Got rope_theta 10000.0 at the top level and 500000.0",
    ),
    "rope-share": ({"partial_rotary_factor": 64}, "impossible partial_rotary_factor. Got 64"),
    "rope-type-list": ({"rope_scaling": {"type": ["linear"]}}, "unknown rope_type. Got ['linear']"),
    "rope-base-bool": ({"rope_theta": True}, "impossible rope_theta. Got True. Expected a positive number"),
    "rope-base-huge": ({"rope_theta": 10**400}, "impossible rope_theta. Got 1000"),
    "rope-share-null": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": None}},
        "impossible partial_rotary_factor. Got None",
    ),
    "rope-of-a-kind": (
        {"rope_parameters": {"full_attention": "x", "rope_type": "default", "rope_theta": 1e4}},
        "unknown rope_type. Got 'x'",
    ),
    "linear-list": ({"rope_scaling": {"type": "linear", "factor": [2.0]}}, "impossible factor. Got [2.0]"),
    "dynamic-text": ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "impossible factor. Got '2'"),
    "activation": ({"hidden_act": "silu_and_mul"}, "unknown hidden_act. Got 'silu_and_mul'"),
    "activation-list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "architectures-text": ({"architectures": "LlamaForCausalLM"}, "wrong architectures. Got 'LlamaForCausalLM'"),
    "architectures-object": ({"architectures": {"a": 1}}, "wrong architectures. Got {'a': 1}"),
    "architectures-number": ({"architectures": 5}, "wrong architectures. Got 5"),
    "architectures-numbers": ({"architectures": [5]}, "wrong architectures. Got [5]"),
}


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_what_no_model_can_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        complete_config({**SIZES, "model_type": "llama", **changes}, WHERE, embedding_rows=264)
    assert str(caught.value).startswith("m/config.json: ")
    assert message in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
LONGROPE |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "key", "values"),
    [
        (YARN, "factor", (None, "4", 0, -1.0, True, [4.0], float("nan"), float("inf"), 10**400)),
        (YARN, "attention_factor", ("x", True, 0, -1.0, [1.0])),
        (YARN, "mscale", ("a", True, -1.0, {})),
        (YARN, "mscale_all_dim", ("a", True, -1.0)),
        (YARN, "beta_fast", ("3", True, -32, float("nan"))),
        (YARN, "beta_slow", ("1", True, -1)),
        (YARN, "original_max_position_embeddings", (None, "64", True, 0, 1)),
        (LLAMA3, "low_freq_factor", (None, "1", True, 0, 4.0)),
        (LLAMA3, "high_freq_factor", (None, "4", True, 1.0)),
        (LLAMA3, "original_max_position_embeddings", (None, "64", 0)),
        (LONGROPE, "original_max_position_embeddings", ("64", True, 0, 1)),
        (LONGROPE, "short_factor", (None, "x", 1.0, [0.0] * 8, [True] * 8, ["1"] * 8, [None] * 8, [1.0] * 5, [1.0])),
        (LONGROPE, "long_factor", (None, {"a": 1}, [-1.0] * 8, [float("nan")] * 8)),
    ],
)
def test_no_rope_has_such_numbers(rope: dict[str, Any], key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        config = {**SIZES, "model_type": "llama", "rope_scaling": {**rope, key: value}}
        with pytest.raises(CheckpointError) as caught:
            complete_config(config, WHERE, embedding_rows=None)
        message = str(caught.value)
        # What Transformers stumbles over itself is said in its own words.
        assert message.startswith("m/config.json: ")
        assert any(x in message for x in (f"impossible {key}. Got ", "impossible high_freq_factor", "does not accept"))


@pytest.mark.parametrize(
    "rope",
    [
        {**YARN, "mscale": 0, "mscale_all_dim": 0},  # as in DeepSeek's files
        {**YARN, **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"))},
        {**LONGROPE, "factor": None},
        {"rope_type": "default", "factor": None},
    ],
    ids=["zero", "yarn-null", "longrope-null", "default-null"],
)
def test_ropes_that_transformers_computes_are_accepted(rope: dict[str, Any], tmp_path: Path) -> None:
    config = {**SIZES, "model_type": "llama", "rope_scaling": rope}
    model = AutoModelForCausalLM.from_config(parsed_by_transformers(tmp_path / "m", config))
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
    got = complete_config(config, WHERE, embedding_rows=None)["rope_parameters"]
    assert got.items() >= rope.items()


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"text_config": []}, "wrong text_config. Got []"),
        ({"vision_config": 3}, "wrong vision_config. Got 3"),
        ({"text_config": {"hidden_size": 3}}, "a text_config that no llama model has"),
        ({"other": nested(300)}, "nested too deeply"),
    ],
    ids=["list", "number", "stray", "deep"],
)
def test_parts_that_are_no_configs_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        complete_config({**SIZES, "model_type": "llama", **extra}, WHERE, embedding_rows=None)
    assert str(caught.value).startswith("m/config.json: ")
    assert message in str(caught.value)


def test_no_token_has_more_experts_than_there_are() -> None:
    config = {**SIZES, **FAMILIES["mixtral"], "model_type": "mixtral", "num_experts_per_tok": 5}
    with pytest.raises(CheckpointError, match=r"Got 5. Expected at most 4"):
        complete_config(config, WHERE, embedding_rows=None)


def test_an_unknown_model_type_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^m/config\.json: .* does not know model_type 'llama9'"):
        complete_config({"model_type": "llama9"}, WHERE, embedding_rows=None)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"Got no tensor of model\.layers\.2. Expected num_hidden_layers 3"),
        ({"intermediate_size": 96}, r"Got shape \(64, 32\) for \S+mlp\.\S+\.weight. Expected \(96, 32\)"),
        ({"head_dim": 16}, r"Got shape \(32, 32\) for \S+q_proj\.weight. Expected \(64, 32\)"),
    ],
    ids=["blocks", "neurons", "heads"],
)
def test_sizes_are_compared_with_the_weights(
    changes: dict[str, Any], message: str, make_model: Callable[..., Path]
) -> None:
    directory = make_model("m")
    change_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        language_model(Checkpoint.open(directory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, r"nothing is stored for model\.layers\.0\.self_attn\.\w_proj\.bias"),
        ({"vocab_size": 300}, r"model\.embed_tokens\.weight has shape \(264, 32\). Expected \(300, 32\)"),
    ],
    ids=["biases", "vocabulary"],
)
def test_every_parameter_is_compared_before_any_is_read(
    changes: dict[str, Any], message: str, make_model: Callable[..., Path]
) -> None:
    directory = make_model("m")
    change_config(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        StreamedModel(Checkpoint.open(directory), device=torch.device("cpu"), dtype=torch.float32)


def test_values_that_are_nested_too_deep_are_a_sentence(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = {"a": deep}
    with pytest.raises(
        CheckpointError, match=r"config\.json: Transformers does not accept this config \(RecursionError"
    ):
        parse_config({"model_type": "llama", "vocab_size": 8, "extra": deep}, tmp_path / "config.json")
