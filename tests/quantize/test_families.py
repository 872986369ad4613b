"""Every family through the whole line: measured, quantized, written, read back, loaded by Transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.dense import dequantize_model
from bpwise.convert.exl2.reader import Exl2Model
from bpwise.convert.exl2.verify import verify_model
from bpwise.convert.families import require_reader
from bpwise.convert.original import open_model
from bpwise.errors import UnsupportedModelError
from bpwise.measure.calibration import CalibrationConfig
from bpwise.measure.run import MeasureConfig
from bpwise.measure.stream import StreamedModel
from bpwise.quantize.pipeline import QuantizeConfig, quantize_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0], "shared_expert_intermediate_size": 96},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "glm4": {"head_dim": 16, "attention_bias": True},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 16},
    "starcoder2": {"use_bias": True, "tie_word_embeddings": True},
}
UNREAD = {"qwen2_moe"}


def randomize(model: torch.nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            around = 0.0 if "gemma" in type(model).__name__.lower() else 1.0
            parameter.copy_(around + 0.1 * noise if "norm" in name and parameter.ndim == 1 else 0.1 * noise)


def save_family(directory: Path, model_type: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]}))
    randomize(model, 0)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def logits_of(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


def streamed_logits(source: Any, tokens: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)
    hidden = model.embed(tokens)
    with torch.no_grad():
        for index in range(model.block_count):
            with model.block(index):
                hidden = model.run_block(index, hidden)
        with model.tail():
            return model.logits(hidden)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Path, Path, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    original = save_family(folder / "model", request.param, byte_tokenizer)
    measure = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), types=False, device="cpu")
    config = QuantizeConfig(bpw=7.5, head_bits=8, measure=measure, evaluate=None, force=request.param in UNREAD)
    result = quantize_model(original, folder / "out", config)
    yield original, folder / "out", result


def test_streaming_gives_what_transformers_gives(quantized: tuple[Path, Path, Any], tokens: torch.Tensor) -> None:
    original = quantized[0]
    torch.testing.assert_close(
        streamed_logits(open_model(original), tokens), logits_of(original, tokens), rtol=1e-4, atol=1e-4
    )


def test_the_output_is_the_dense_model_of_its_decoded_weights(
    quantized: tuple[Path, Path, Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    original, output, _ = quantized
    dequantize_model(output, tmp_path / "dense")
    dense = logits_of(tmp_path / "dense", tokens)
    torch.testing.assert_close(streamed_logits(Exl2Model.open(output), tokens), dense, rtol=1e-4, atol=1e-4)
    wanted = logits_of(original, tokens)
    assert float((dense - wanted).square().mean() / wanted.var()) < 0.01


def test_every_linear_of_every_block_is_quantized(quantized: tuple[Path, Path, Any]) -> None:
    _, output, result = quantized
    written = Exl2Model.open(output)
    dense = {name for name in written.names if len(written.shape(name)) == 2} - {f"{x}.weight" for x in written.linears}
    kinds = {name.rpartition("layers.")[2].partition(".")[2] for name in dense if "layers." in name}
    # Routers, and the gate of a shared expert, stay as they are.
    assert kinds <= {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "block_sparse_moe.gate.weight"} | {
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    assert verify_model(output).decoder_bpw <= 7.5
    assert len(result.plan.linears) + 1 == len(written.linears)


def test_readers_know_it(quantized: tuple[Path, Path, Any]) -> None:
    original, _, _ = quantized
    config = json.loads((original / "config.json").read_text())
    if config["model_type"] in UNREAD:
        with pytest.raises(UnsupportedModelError, match=r"do not know the architecture 'Qwen2Moe.*--force"):
            require_reader(config)
    else:
        require_reader(config)


def test_what_readers_would_compute_otherwise() -> None:
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    require_reader(config)
    with pytest.raises(UnsupportedModelError, match=r"mlp_only_layers is \[0\], but EXL2 readers take it for \[\]"):
        require_reader({**config, "mlp_only_layers": [0]})
