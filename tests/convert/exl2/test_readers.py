"""What ExLlamaV2 would take from a written config.json beside what Transformers takes from the original's."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.model.config import complete_config
from bpwise.checkpoint.model.families import composite_of
from bpwise.convert.exl2.file.config import dense_config, exl2_config
from bpwise.convert.exl2.readers.limits import reader_warnings, require_reader
from bpwise.convert.exl2.readers.table import reader_composite, reader_family
from bpwise.errors import UnsupportedModelError
from transformers import AutoConfig

from ...tiny_models import FAMILIES, SIZES, VISION

PATH = Path("config.json")
ROWS = 264
"""Of the stored embeddings: the vocabulary, where a config does not state it."""

# ---- The reader: ExLlamaV2 0.3.2, config.py, architecture.py, model.py, attn.py. ----

ABSENT = object()


def look(config: dict[str, Any], *keys: str, default: Any = ABSENT, nested: bool = True) -> Any:
    """Its ``read``: all keys outside, then all in text_config; null counts as absent."""
    for part in (config, config.get("text_config") or {}) if nested else (config,):
        for key in keys:
            if part.get(key) is not None:
                return part[key]
    assert default is not ABSENT, f"ExLlamaV2 refuses a config without {keys}"
    return default


DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemma3ForConditionalGeneration": {
        "vocab_size": 262208,
        "eps": 1e-6,
        "head_dim": 256,
        "heads": 8,
        "groups": 4,
        "head_norms": True,
        "period": 6,
        "theta": 1e6,
    },
    "Qwen3ForCausalLM": {"head_norms": True},
    "Qwen3MoeForCausalLM": {"head_norms": True},
}
EPSILON = {"Starcoder2ForCausalLM": "layer_norm_epsilon"}
EPSILON |= dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM"), "layer_norm_eps")
BIASES_OF_QKV = ("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
WINDOWS = ("Gemma2ForCausalLM", "Gemma3ForConditionalGeneration", "Cohere2ForCausalLM")
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")


def taken(config: dict[str, Any]) -> dict[str, Any]:
    name = config["architectures"][0]
    default = DEFAULTS.get(name, {})
    hidden = look(config, "hidden_size")
    heads = look(config, "num_attention_heads", default=0)
    head = look(config, "head_dim", default=default.get("head_dim", hidden // heads if heads else ABSENT))
    heads = heads or default.get("heads", hidden // head)
    attention = look(config, "attention_multiplier", default=None)
    before = look(config, "query_pre_attn_scalar", default=None)
    scaling = look(config, "logits_scaling", default=None, nested=False)
    intermediate = look(config, "intermediate_size")
    rope = look(config, "rope_scaling", default={})
    assert not ("type" in rope and "rope_type" in rope)
    blocks = look(config, "num_hidden_layers")
    window = look(config, "sliding_window", "sliding_window_size", default=0)
    period = look(config, "sliding_window_pattern", default=default.get("period", 1), nested=False)
    full = [index % 2 if period <= 1 else (index + 1) % period == 0 for index in range(blocks)]
    biases = bool(config.get("attention_bias"))
    starcoder = name == "Starcoder2ForCausalLM"
    qkv = biases or starcoder or name in BIASES_OF_QKV
    return {
        "vocab_size": look(config, "vocab_size", default=default.get("vocab_size", ABSENT)),
        "blocks": blocks,
        "hidden": hidden,
        "intermediate": look(config, "moe_intermediate_size", default=intermediate, nested=False)
        if name in EXPERTS
        else intermediate,
        "eps": look(config, EPSILON.get(name, "rms_norm_eps"), default=default.get("eps", ABSENT)),
        "heads": heads,
        "head_dim": head,
        "groups": look(config, "num_key_value_heads", default=default.get("groups", heads)),
        "head_norms": look(config, "use_qk_norm", default=default.get("head_norms", False), nested=False),
        "attention": attention or (before or head) ** -0.5,
        "experts": look(config, "num_local_experts", "num_experts", default=None, nested=False)
        if name in EXPERTS
        else None,
        "experts of a token": look(config, "num_experts_per_tok", default=None, nested=False)
        if name in EXPERTS
        else None,
        "logits": 1 / scaling if scaling else look(config, "logit_scale", default=1, nested=False),
        "embeddings": look(config, "scale_emb", "embedding_multiplier", default=1, nested=False),
        "residual": look(config, "residual_multiplier", default=1, nested=False),
        "attention cap": look(config, "attn_logit_softcapping", default=None, nested=False),
        "logit cap": look(config, "final_logit_softcapping", default=None, nested=False),
        "theta": look(config, "rope_theta", default=default.get("theta", 10000)),
        "rotated": look(config, "partial_rotary_factor", default=1.0, nested=False),
        "rope": {"mrope": "default"}.get(kind := rope.get("type", rope.get("rope_type", "default")), kind),
        "positions": look(config, "max_position_embeddings", default=2048),
        "trained on": config["original_max_position_embeddings"]
        if kind == "longrope"
        else rope.get("original_max_position_embeddings"),
        "factor": rope.get("factor"),
        "windows": [0 if every else window for every in full] if name in WINDOWS else None,
        "biases": (qkv, starcoder or (biases and name not in BIASES_OF_QKV and not name.startswith("Glm4"))),
        "mlp biases": starcoder or bool(config.get("mlp_bias")),
        "tied": bool(config.get("tie_word_embeddings")),
    }


# ---- What Transformers computes with, its classes' attributes: modeling_*.py. ----


def computed(config: dict[str, Any]) -> dict[str, Any]:
    whole = AutoConfig.for_model(**{key: value for key, value in deepcopy(config).items() if key != "architectures"})
    text = whole.get_text_config()
    name = config["architectures"][0]
    kind = text.model_type

    def get(key: str, default: Any = None) -> Any:
        value = getattr(text, key, None)
        return default if value is None else value

    head = get("head_dim") or text.hidden_size // text.num_attention_heads
    capped = kind in ("gemma2", "gemma3_text")
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    moe = kind in ("mixtral", "qwen3_moe")
    biases = {"starcoder2": get("use_bias"), "mistral": False, "mixtral": False, "phi3": False}
    always = kind.startswith("qwen2")
    attention = bool(biases.get(kind, get("attention_bias", False)))
    return {
        "vocab_size": text.vocab_size,
        "blocks": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": text.moe_intermediate_size if kind == "qwen3_moe" else text.intermediate_size,
        "eps": {
            "starcoder2": get("norm_epsilon"),
            "cohere": get("layer_norm_eps"),
            "cohere2": get("layer_norm_eps"),
        }.get(kind, get("rms_norm_eps")),
        "heads": text.num_attention_heads,
        "head_dim": head,
        "groups": text.num_key_value_heads,
        "head_norms": kind in ("qwen3", "qwen3_moe", "gemma3_text") or (kind == "cohere" and text.use_qk_norm),
        "attention": text.attention_multiplier
        if kind == "granite"
        else (text.query_pre_attn_scalar if capped else head) ** -0.5,
        "experts": text.num_local_experts if moe else None,
        "experts of a token": text.num_experts_per_tok if moe else None,
        "logits": 1 / text.logits_scaling if kind == "granite" else get("logit_scale", 1),
        "embeddings": get("embedding_multiplier", 1),
        "residual": get("residual_multiplier", 1),
        "attention cap": text.attn_logit_softcapping if capped else None,
        "logit cap": text.final_logit_softcapping if capped else None,
        "theta": rope["rope_theta"],
        "rotated": rope.get("partial_rotary_factor", 1.0),
        "rope": rope["rope_type"],
        "positions": text.max_position_embeddings,
        "trained on": rope.get("original_max_position_embeddings"),
        "factor": rope.get("factor"),
        "windows": [text.sliding_window if kind == "sliding_attention" else 0 for kind in text.layer_types]
        if name in WINDOWS
        else None,
        "biases": (always or attention, False if always or kind == "glm4" else attention),
        "mlp biases": bool(get("use_bias")) if kind == "starcoder2" else bool(get("mlp_bias", False)),
        "tied": whole.tie_word_embeddings,
    }


# ---- The configs. ----

# Other than what Transformers' classes and ExLlamaV2 have for defaults.
OTHER: dict[str, Any] = {
    "rms_norm_eps": 3e-4,
    "layer_norm_eps": 3e-4,
    "norm_epsilon": 3e-4,
    "num_attention_heads": 128,  # a multiple of every class's num_key_value_heads
    "num_key_value_heads": 1,
    "hidden_size": 1024,
    "head_dim": 24,
    "attention_bias": True,
    "mlp_bias": True,
    "logit_scale": 0.3,
    "logits_scaling": 5.0,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "attn_logit_softcapping": 11.0,
    "final_logit_softcapping": 7.0,
    "query_pre_attn_scalar": 100,
    "sliding_window": 24,
    "num_experts_per_tok": 3,
    "num_local_experts": 9,  # no fewer than any class has for a token
    "moe_intermediate_size": 32,
    "max_position_embeddings": 160,
    "use_qk_norm": True,
}


def rope_of(kind: str) -> dict[str, Any]:
    if kind in ("gemma3_text", "gemma3"):
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"full_attention": {"rope_type": "default", "rope_theta": 54321.0}, "sliding_attention": local}
    sections = {"mrope_section": [2, 3, 3]} if "_vl" in kind else {}
    share = {"partial_rotary_factor": 0.25} if kind in ("glm4", "phi3") else {}
    return {"rope_type": "default", "rope_theta": 54321.0, **sections, **share}


def original(kind: str) -> dict[str, Any]:
    """A config.json that states everything, with hardly a value that is the default of anyone."""
    if kind in FAMILIES:
        config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]}).to_dict()
    else:
        config = AutoConfig.for_model(kind, **VISION[kind]).to_dict()
    text = config.get("text_config", config)
    text |= {key: value for key, value in OTHER.items() if key in text}
    text |= {"rope_parameters": rope_of(kind), "num_hidden_layers": 6}
    if kind == "glm4":
        text["attention_bias"] = False  # its class has them
    if "layer_types" in text:
        text["layer_types"] = AutoConfig.for_model(
            text["model_type"], num_hidden_layers=6, sliding_window=24
        ).layer_types
    known = (reader_composite if composite_of(config) else reader_family)(config).architectures
    return {**config, "architectures": [(known or ("Qwen2MoeForCausalLM",))[0]]}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    return complete_config(config, PATH, embedding_rows=ROWS)


def written(config: dict[str, Any]) -> dict[str, Any]:
    tied = AutoConfig.for_model(**config).tie_word_embeddings
    return exl2_config(complete(config), {"version": "0"}, tied_embeddings=tied)


_UNUSED = {"sliding_window"}
IGNORED: dict[str, set[str]] = {
    "llama": set(),
    **dict.fromkeys(("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "starcoder2"), _UNUSED),
    **dict.fromkeys(("llava", "mistral3", "qwen2_vl", "qwen2_5_vl"), _UNUSED),
}
"""Keys that ExLlamaV2 does not look at: it leaves windows out."""

KINDS = [kind for kind in (*FAMILIES, *VISION) if kind != "qwen2_moe"]  # unknown to ExLlamaV2


@pytest.mark.parametrize("kind", KINDS)
def test_stated_values_are_taken(kind: str) -> None:
    config = original(kind)
    assert taken(written(config)) == computed(config)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_a_file_leaves_to_its_class_are_taken(kind: str) -> None:
    config = original(kind)
    text, stated, told = config.get("text_config", config), computed(config), set()
    for key in sorted(text.keys() - {"model_type", "architectures"}):
        silent = deepcopy(config)
        part = silent.get("text_config", silent)
        del part[key]
        if key == "num_hidden_layers":
            part.pop("layer_types", None)
        want = computed(silent)
        if key == "vocab_size":
            want[key] = ROWS
        assert taken(written(silent)) == want, key
        if want != stated:
            told.add(key)
    # The class has other values: leaving them out means another model.
    differing = {"num_attention_heads", "num_key_value_heads", "rope_parameters", "max_position_embeddings"}
    assert told >= (differing | OTHER.keys()) & text.keys() - IGNORED.get(kind, set())


# Keys of their makers' files: google/gemma-3-4b-it (all else from the class), meta-llama/Llama-2-7b-hf,
# mistralai/Mixtral-8x7B-v0.1.
PUBLISHED: dict[str, set[str]] = {
    "gemma3": {"hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window", "model_type"},
    "llama": {*SIZES, "rms_norm_eps", "hidden_act"},
    "mixtral": {*SIZES, "rms_norm_eps", "hidden_act", "num_local_experts", "num_experts_per_tok", "sliding_window"},
}


def published(kind: str) -> dict[str, Any]:
    config = original(kind)
    text = config.get("text_config", config)
    for key in text.keys() - PUBLISHED[kind] - {"model_type", "architectures"}:
        del text[key]
    text["vocab_size"] = ROWS
    return config


@pytest.mark.parametrize(
    "config",
    [*(original(kind) for kind in (*KINDS, "qwen2_moe")), *map(published, PUBLISHED)],
    ids=[*KINDS, "qwen2_moe", *(f"{kind}-published" for kind in PUBLISHED)],
)
def test_the_dense_model_has_the_original_config(config: dict[str, Any]) -> None:
    tied = AutoConfig.for_model(**config).tie_word_embeddings
    dense = dense_config(complete(written(config)), tied_embeddings=tied)
    before, after = AutoConfig.for_model(**config).to_dict(), AutoConfig.for_model(**dense).to_dict()
    for made in (before, after):
        for part in (made, made.get("text_config", {})):
            part.pop("dtype", None)
            part.pop("torch_dtype", None)
    assert before == after


@pytest.mark.parametrize("kind", PUBLISHED)
def test_files_as_their_makers_write_them_are_taken(kind: str) -> None:
    assert taken(written(published(kind))) == computed(published(kind))


def llama(**changes: Any) -> dict[str, Any]:
    return model("llama", **changes)


def model(kind: str, **changes: Any) -> dict[str, Any]:
    plain = {key: value for key, value in changes.items() if key != "rope_scaling"}
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **plain}).to_dict() | changes
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    return complete({**config, "architectures": [reader_family(config).architectures[0]]})


ROPE = {"rope_theta": 10000.0}
GEMMA3_LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
GEMMA3_FULL = {"rope_type": "default", "rope_theta": 1e6}
IRREGULAR = ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama(hidden_act="relu"), "hidden_act is 'relu', but EXL2 readers take it for 'silu'"),
        (model("granite", hidden_act="gelu"), "hidden_act is 'gelu', but EXL2 readers take it for 'silu'"),
        (
            model("gemma2", hidden_activation="silu"),
            "hidden_activation is 'silu', but .* take it for 'gelu_pytorch_tanh'",
        ),
        (model("starcoder2", use_bias=False), "use_bias is False, but EXL2 readers take it for True"),
        (model("granite", attention_bias=True), "attention_bias is True, but EXL2 readers take it for False"),
        (model("qwen3_moe", norm_topk_prob=False), "norm_topk_prob is False"),
        (model("gemma", use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (llama(logit_scale=0.25), "logit_scale is 0.25, which EXL2 readers compute with and Transformers does not"),
        (llama(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0, which EXL2 readers compute with"),
        (model("mistral", attention_bias=True), "attention_bias is True, which EXL2 readers compute with"),
        (model("qwen3", use_qk_norm=False), "use_qk_norm is False, but EXL2 readers take it for True"),
        (
            llama(partial_rotary_factor=0.5),
            r"^config.json: partial_rotary_factor is 0.5, which EXL2 \w+ compute with and Transformers does not\. Use",
        ),
        (
            llama(rope_parameters={"rope_type": "proportional", **ROPE, "factor": 2.0}),
            "leave out rope_type 'proportional', expected one of default, linear",
        ),
        (
            model("gemma3_text", rope_parameters={"full_attention": GEMMA3_FULL, "sliding_attention": GEMMA3_LOCAL}),
            "rope_theta of blocks with a sliding window is 5000.0, but EXL2 readers take it for 10000",
        ),
        (
            model(
                "gemma3_text",
                rope_parameters={
                    "full_attention": {**GEMMA3_FULL, "rope_type": "yarn", "factor": 2.0},
                    "sliding_attention": {**GEMMA3_LOCAL, "rope_theta": 10000.0},
                },
            ),
            "leave out rope_type 'yarn', expected one of default, linear",
        ),
        (model("gemma3_text", num_hidden_layers=3, layer_types=IRREGULAR), "layer_types has no period"),
        (
            model(
                "phi3",
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    **ROPE,
                    "long_factor": [2.0] * 8,
                    "short_factor": [1.0] * 8,
                    "attention_factor": 1.5,
                    "original_max_position_embeddings": 64,
                },
            ),
            r"scales attention by 1.5, but EXL2 readers by 1\.08",
        ),
        (
            {**llama(), "architectures": ["LlamaModel"]},
            "do not know the architecture .*LlamaForCausalLM",
        ),
    ],
)
def test_other_models_for_readers_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_reader(config)
    # Forced ones say so where they are shown.
    first = reader_warnings(config)[0]
    assert first.endswith(("Rows of any length differ from the original.", "know the architecture 'LlamaModel'."))


def test_a_language_model_inside_another_is_looked_at() -> None:
    config = original("llava")
    require_reader(complete(config))
    config["text_config"]["hidden_act"] = "relu"
    with pytest.raises(UnsupportedModelError, match="hidden_act is 'relu'"):
        require_reader(complete(config))


@pytest.mark.parametrize(
    "config",
    [
        llama(hidden_act="swish"),
        model("gemma", hidden_act="gelu"),
        model("mistral", attention_bias=False, partial_rotary_factor=1.0),
        model("qwen3", use_qk_norm=True),  # as Qwen3-Coder's file has it
        model("qwen2", attention_bias=True),  # neither looks at it
        llama(query_pre_attn_scalar=None, logit_scale=1),
        model("gemma3_text", num_hidden_layers=3),
    ],
)
def test_other_words_for_the_same_are_not_refused(config: dict[str, Any]) -> None:
    require_reader(config)


LONG = {"max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(), []),
        (llama(sliding_window=16, layer_types=["sliding_attention"] * 2, **LONG), []),  # no fields of the class
        (llama(sliding_window="x"), []),
        (model("mistral", **LONG), ["sliding_window 16: .*Rows of more than 16 tokens"]),
        (model("mistral", sliding_window=None), []),
        (model("mistral", sliding_window=128), []),  # no shorter than the longest row
        (model("mixtral", sliding_window=32), ["Rows of more than 32 tokens"]),
        (model("phi3", sliding_window=32), ["Rows of more than 32 tokens"]),
        (model("starcoder2", sliding_window=32), ["Rows of more than 32 tokens"]),
        (
            model("qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=1),
            ["Rows of more than 32 tokens"],
        ),
        (model("qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=2), []),
        (model("qwen2", sliding_window=32, use_sliding_window=False), []),
        (model("gemma2"), []),
        (
            model("gemma2", num_hidden_layers=3, layer_types=IRREGULAR),
            ["to have a period.*Rows of more than 16 tokens"],
        ),
        (model("cohere2"), []),  # two blocks, both with a window
        (model("cohere2", num_hidden_layers=4), ["rotate positions in blocks with full attention.*of any length"]),
        (model("qwen3"), ["layer norms.*Rows of any length"]),
        (
            llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, **ROPE}),
            ["leave out rope_type 'dynamic'. Rows of more than 128 tokens"],
        ),
        (
            llama(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}),
            ["trained on 128 positions instead of 32. Rows of any length"],
        ),
        (
            llama(
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **ROPE}
            ),
            ["leave out rope_type 'yarn'"],
        ),
        (
            model(
                "phi3",
                original_max_position_embeddings=64,
                rope_scaling={"type": "su", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8},
            ),
            ["long_factor for short rows too. Rows of up to 64 tokens"],
        ),
        (llama(rope_parameters={"rope_type": "linear", "factor": 4.0, **ROPE}), []),
    ],
)
def test_what_matters_for_some_rows_is_said_with_their_length(config: dict[str, Any], expected: list[str]) -> None:
    require_reader(config)
    said = reader_warnings(config)
    assert len(said) == len(expected)
    for sentence, pattern in zip(said, expected, strict=True):
        assert re.search(pattern, sentence), sentence


def test_towers_that_readers_compute_otherwise_are_said() -> None:
    config = complete(original("llava"))
    config["text_config"]["sliding_window"] = None
    assert config["vision_config"]["hidden_act"] == "gelu"
    (sentence,) = reader_warnings(config)
    assert "vision_config.hidden_act is 'gelu', but EXL2 readers take it for 'silu'. Answers about images" in sentence
    config["vision_config"]["hidden_act"] = "silu"
    assert reader_warnings(config) == ()
    config |= {"vision_feature_layer": -2}
    assert "vision_feature_layer is -2" in reader_warnings(config)[0]
