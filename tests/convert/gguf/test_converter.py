"""llama.cpp's converter itself, on tiny models as the Hub and as Transformers have them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.gguf import base
from bpwise.convert.gguf.base import projector_path, write_projector
from bpwise.convert.gguf.file.header import GgufHeader, read_gguf_header
from bpwise.convert.gguf.llama_cpp.check import check_base
from bpwise.convert.gguf.llama_cpp.converter import COMPLETED, RAW, make_base, make_projector, projector_type
from bpwise.convert.gguf.llama_cpp.staging import stores_mtp, vision_tensors
from bpwise.convert.gguf.options import GgufOptions
from bpwise.errors import CheckpointError, WorkDirectoryError
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ...byte_converter import BYTE_VOCABULARY
from ...conftest import llama_cpp_dir
from ...quantize.runs import arguments
from ...tiny_models import EXPERTS, SIZES, randomize, save_with_vision
from .conftest import write_model

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 64}
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
DELTA |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
SLIDING = {"sliding_window": 16, "tie_word_embeddings": True}

MODELS: Mapping[str, dict[str, Any]] = {
    "glm4": {"head_dim": 16},
    "deepseek_v3": {**EXPERTS, **LATENT, **ROUTED, "num_key_value_heads": 4},
    "glm4_moe": {**EXPERTS, **ROUTED, "head_dim": 16},
    "ministral3": {"head_dim": 16},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "gemma2": {**SLIDING, "head_dim": 256, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **SLIDING,
        "vocab_size": 258,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 258,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 64,
    },
    "gpt_neox": {},
    "qwen3_next": {**EXPERTS, **DELTA, "head_dim": 16, "shared_expert_intermediate_size": 64},
    "qwen3_5_text": {**DELTA, "head_dim": 16},
    "exaone_moe": {**EXPERTS, "head_dim": 16, "sliding_window": 16},
}
"""Model types, and what differs from ``SIZES``."""

_NO_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
HUB: Mapping[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "exaone_moe": {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    "minimax_m2": {"scoring_func": "sigmoid", "rotary_dim": 8},
    "gpt_neox": {"rotary_pct": 0.25},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "layers_block_type": None}
    | dict.fromkeys(_NO_EXPERTS),
    "gemma2": {"head_dim": None},
}
"""Keys of config.json that the Hub has and Transformers does not write; those that are None the Hub leaves out."""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("converter") / "llama.cpp"
    shutil.copytree(llama_cpp_dir(), copy)
    with (copy / "conversion" / "__init__.py").open("a") as file:
        file.write(BYTE_VOCABULARY)
    return copy


def save(directory: Path, model_type: str, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    config = AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type]})
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, 0)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    change_config(directory, **HUB.get(model_type, {}))
    return Checkpoint.open(directory)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    left_out = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))


def read(header: GgufHeader, name: str) -> torch.Tensor:
    """The values of a tensor that is stored unquantized."""
    tensor = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(tensor.offset_bytes)
        data = torch.frombuffer(bytearray(file.read(tensor.size_bytes)), dtype=torch.uint8)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.type.name]
    return data.view(dtype).reshape(tensor.shape).float()


def own(header: GgufHeader, key: str) -> Any:
    return header.metadata.get(f"{header.metadata['general.architecture']}.{key}")


def convert(checkpoint: Checkpoint, output: Path, llama_cpp: Path) -> tuple[str, GgufHeader]:
    used = make_base(checkpoint, output, llama_cpp=llama_cpp, check=lambda path: check_base(path, checkpoint))
    return used, read_gguf_header(output)


def test_config_json_is_shown_as_it_is_first(
    llama_cpp: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    # Without the key of the Hub there is nothing to convert by.
    checkpoint = save(tmp_path / "model", "gpt_neox", byte_tokenizer)
    used, header = convert(checkpoint, tmp_path / "x.gguf", llama_cpp)
    assert used == RAW
    assert own(header, "rope.dimension_count") == 4
    fails = rf"{checkpoint.directory}: .* failed on this model of type 'gpt_neox' \(KeyError: 'rotary_pct'\)"
    with pytest.raises(CheckpointError, match=fails):
        make_base(checkpoint, tmp_path / "y.gguf", llama_cpp=llama_cpp, configs=(COMPLETED,))
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.slow
def test_config_json_is_shown_as_transformers_completes_it_then(
    llama_cpp: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    checkpoint = save(tmp_path / "model", "gemma2", byte_tokenizer)
    used, header = convert(checkpoint, tmp_path / "x.gguf", llama_cpp)
    assert used == COMPLETED
    assert own(header, "attention.key_length") == 256


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODELS.keys() - {"gemma2", "gpt_neox"}))
def test_families(model_type: str, llama_cpp: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = save(tmp_path / "model", model_type, byte_tokenizer)
    used, header = convert(checkpoint, tmp_path / "x.gguf", llama_cpp)
    assert used == RAW
    assert not any("left parts out" in each for each in check_base(header.path, checkpoint))
    assert own(header, "block_count") == checkpoint.config["num_hidden_layers"]
    if model_type == "nemotron_h":  # with Transformers' config it would be a mixture of experts
        assert header.metadata["general.architecture"] == "nemotron_h"
        assert list(own(header, "attention.head_count_kv")) == [0, 0, 2, 0]
    if model_type == "granitemoehybrid":
        assert list(own(header, "attention.head_count_kv")) == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "glm4_moe"])
def test_stored_layers_for_multi_token_prediction_are_kept(
    model_type: str, llama_cpp: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    directory = save(tmp_path / "model", model_type, byte_tokenizer).directory
    weights = load_file(directory / "model.safetensors")
    last, hidden = "model.layers.1.", SIZES["hidden_size"]
    if model_type == "glm4_moe":
        prefix, joins, key = "model.layers.2.", "eh_proj", "num_nextn_predict_layers"
        norms = ("enorm", "hnorm", "shared_head.norm")
    else:
        prefix, joins, key = "mtp.layers.0.", "fc", "mtp_num_hidden_layers"
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    front = "mtp." if prefix.startswith("mtp.") else prefix
    mtp = {prefix + name.removeprefix(last): 2 * weights[name] for name in weights if name.startswith(last)}
    mtp |= {f"{front}{norm}.weight": torch.ones(hidden).bfloat16() for norm in norms}
    mtp[f"{front}{joins}.weight"] = torch.ones(hidden, 2 * hidden).bfloat16()
    assert not stores_mtp(Checkpoint.open(directory))
    save_file(weights | mtp, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, **{key: 1})
    checkpoint = Checkpoint.open(directory)
    assert stores_mtp(checkpoint)
    _, header = convert(checkpoint, tmp_path / "x.gguf", llama_cpp)
    assert (own(header, "block_count"), own(header, "nextn_predict_layers")) == (3, 1)
    assert header.tensors["blk.2.nextn.eh_proj.weight"].shape == (hidden, 2 * hidden)
    torch.testing.assert_close(
        read(header, "blk.2.attn_output.weight"), mtp[f"{prefix}self_attn.o_proj.weight"].float(), rtol=0, atol=0
    )


def in_memory(name: str) -> str:
    """Names as Transformers has them in memory, of models whose checkpoints have older ones."""
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_projector.", "visual.")) else name


VISION_PARTS = {
    "gemma3": ("v.blk.0.attn_out.weight", "vision_tower.encoder.layers.0.self_attn.out_proj.weight"),
    "qwen2_5_vl": ("v.blk.0.attn_out.weight", "visual.blocks.0.attn.proj.weight"),
    "mistral3": ("v.blk.0.attn_out.weight", "vision_tower.transformer.layers.0.attention.o_proj.weight"),
}
"""A tensor as llama.cpp calls it, and as Transformers writes it."""


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [False, True], ids=["as-written", "as-in-memory"])
@pytest.mark.parametrize("model_type", VISION_PARTS)
def test_what_sees_images(
    model_type: str, renamed: bool, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    rename = in_memory if renamed else None
    directory = save_with_vision(tmp_path / "model", model_type, byte_tokenizer, rename)
    with_break_token(directory)
    checkpoint = Checkpoint.open(directory)
    assert projector_type(checkpoint) == "f16"
    llama_cpp_dir()
    make_projector(checkpoint, tmp_path / "mmproj.gguf")
    header = read_gguf_header(tmp_path / "mmproj.gguf")
    assert header.metadata["general.type"] == "mmproj"
    theirs, ours = VISION_PARTS[model_type]
    stored = checkpoint.tensor(in_memory(ours) if renamed else ours)
    assert torch.equal(read(header, theirs), stored.float())


def with_break_token(directory: Path) -> None:
    # Pixtral's tower wants a token that the tokenizers of its models have.
    path = directory / "tokenizer_config.json"
    tokens = {"added_tokens_decoder": {"10": {"content": "[IMG_BREAK]"}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))


def test_a_model_with_vision_to_a_file_and_a_companion(
    llama_cpp: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    directory = save_with_vision(tmp_path / "some-model", "gemma3", byte_tokenizer)
    change_text_config(directory, vocab_size=258)
    config = QuantizeConfig(options=GgufOptions(mixture="Q8_0", llama_cpp=llama_cpp), evaluate=None)
    output, companion = tmp_path / "out" / "x.gguf", tmp_path / "out" / "mmproj-some-model-F16.gguf"
    companion.parent.mkdir()
    foreign = write_model(companion, "small").read_bytes()
    with pytest.raises(WorkDirectoryError, match=r"mmproj-some-model-F16\.gguf: exists already"):
        quantize_model(directory, output, **arguments(config))
    assert companion.read_bytes() == foreign
    companion.unlink()
    result = quantize_model(directory, output, **arguments(config))
    assert result.beside == (companion,)
    assert f"beside      {companion}" in result.summary_lines()
    assert {path.name for path in companion.parent.iterdir()} == {
        *(companion.name, "x.gguf", "x.gguf.work", "x.recipe.yaml"),
    }


def test_a_companion_is_made_once_for_a_model_and_a_converter(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(save_with_vision(tmp_path / "model", "gemma3", byte_tokenizer))
    companion = tmp_path / "mmproj-model-F16.gguf"
    made: list[Path] = []

    def convert(_: Checkpoint, output: Path, **__: Any) -> None:
        made.append(write_model(output, "small"))

    def fail(_: Checkpoint, output: Path, **__: Any) -> None:
        raise CheckpointError("model: the converter failed. Try another one.")

    monkeypatch.setattr(base, "converter_digest", lambda _: "one")
    monkeypatch.setattr(base, "make_projector", fail)
    said = write_projector(checkpoint, companion, None)
    assert (
        said == "There is no mmproj file, and the model sees no images: model: the converter failed. Try another one."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    monkeypatch.setattr(base, "make_projector", convert)
    for digest, expected in (("one", 1), ("one", 1), ("two", 2)):
        monkeypatch.setattr(base, "converter_digest", lambda _, digest=digest: digest)
        assert write_projector(checkpoint, companion, None) is None
        assert len(made) == expected
        run = read_gguf_header(companion).metadata["bpwise.run"]
        assert run.startswith(checkpoint.fingerprint[:8])
    foreign = write_model(companion, "small").read_bytes()
    with pytest.raises(WorkDirectoryError, match="in the way"):
        write_projector(checkpoint, companion, None)
    assert companion.read_bytes() == foreign


def change_text_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= changes
    path.write_text(json.dumps(config))


def test_vision_is_what_is_stored_of_it(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    directory = save_with_vision(tmp_path / "model", "gemma3", byte_tokenizer)
    checkpoint = Checkpoint.open(directory)
    stored = {name for name in checkpoint.names if not name.startswith("language_model.")}
    assert set(vision_tensors(checkpoint).values()) == stored
    assert projector_path(checkpoint, tmp_path / "x.gguf") == tmp_path / "mmproj-model-F16.gguf"
    weights = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name not in stored}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    assert projector_path(Checkpoint.open(directory), tmp_path / "x.gguf") is None


def test_text_alone_has_no_companion(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    assert projector_path(checkpoint, tmp_path / "x.gguf") is None
    assert not stores_mtp(checkpoint)
