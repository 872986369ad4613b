"""Tiny random models of families that llama.cpp computes each in a way of its own, converted as they are stored."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.gguf.llama_cpp.converter import find_converter
from bpwise.errors import BpwiseError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 32}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, "sliding_window": 64, "rope_parameters": {**_YARN, "truncate": False}}),
    "gpt_oss-truncated": (
        "gpt_oss",
        {**_EXPERTS, "sliding_window": 64, "rope_parameters": {**_YARN, "truncate": True}},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_EXPERTS,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "shared_expert_intermediate_size": 64,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_EXPERTS,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "kv_lora_rank": 64,
            "q_lora_rank": 96,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "scoring_func": "sigmoid",
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_EXPERTS,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"] * 2,
            "residual_multiplier": 0.22,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 64,
        },
    ),
}
"""By name: the model type, and what differs from ``_SIZES``."""

_AS_ON_THE_HUB = {"granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2}}
"""What config.json says otherwise than Transformers writes it."""

_CONVERT = """
import json, runpy, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows real vocabularies only
def as_it_is_stored(dir_model, is_mistral_format=False):
    return json.loads((Path(dir_model) / "config.json").read_text())
ModelBase.load_hparams = staticmethod(as_it_is_stored)
main = runpy.run_path(sys.argv[1] + "/convert_hf_to_gguf.py", run_name="converter")["main"]
known = main.__globals__["get_model_class"]
def with_plain_vocabulary(*arguments, **options):
    kind = known(*arguments, **options)
    kind.set_vocab = TextModel._set_vocab_gpt2
    return kind
main.__globals__["get_model_class"] = with_plain_vocabulary
for source, target, options in json.loads(sys.argv[2]):
    sys.argv[1:] = [source, "--outfile", target, "--outtype", "bf16", "--model-name", "tiny", *options]
    main()
"""


@dataclass(frozen=True)
class Family:
    """A checkpoint in bfloat16, and the GGUF file that llama.cpp's converter made of it."""

    directory: Path
    file: Path


Families = dict[str, Family]
ConvertFamilies = Callable[[Sequence[str]], Families]


@pytest.fixture(scope="session")
def convert_families(tmp_path_factory: pytest.TempPathFactory) -> ConvertFamilies:
    """Builds and converts families, all in one process."""

    def convert(names: Sequence[str]) -> Families:
        try:
            converter = find_converter().parent
        except BpwiseError as cause:
            pytest.skip(str(cause))
        folder = tmp_path_factory.mktemp("families")
        families = {name: Family(folder / name, folder / f"{name}.gguf") for name in names}
        for name, family in families.items():
            _build(name).save_pretrained(family.directory)
            _tokenizer().save_pretrained(family.directory)
            config = json.loads((family.directory / "config.json").read_text()) | _AS_ON_THE_HUB.get(name, {})
            (family.directory / "config.json").write_text(json.dumps(config))
        jobs = [
            (str(family.directory), str(family.file), ["--no-nextn"] if name == "qwen3_next" else [])
            for name, family in families.items()
        ]
        command = [sys.executable, "-c", _CONVERT, str(converter), json.dumps(jobs)]
        run = subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        return families

    return convert


def _build(name: str) -> Any:
    model_type, changes = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **changes}))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim > 1:
                parameter.copy_(1.2 * noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * noise)
    return model.to(torch.bfloat16)


def _tokenizer() -> PreTrainedTokenizerFast:
    # One token a byte, and one merge: llama.cpp wants some.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"\u0120t": 256}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
