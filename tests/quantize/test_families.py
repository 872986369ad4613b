"""Every family through the whole line: measured, quantized, written, read back, loaded by Transformers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.conversion import Target
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.exl2.readers.limits import require_reader
from bpwise.convert.opening import verify_model
from bpwise.convert.rounding import RoundedModel, Rounder
from bpwise.errors import UnsupportedModelError
from bpwise.linalg.hessian import Hessian
from bpwise.measure.measurement import MeasuredLinear, Measurement
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.progress import silent
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.rounding.rounding_pass import RoundingPass
from bpwise.quantize.run import quantize_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ..tiny_models import FAMILIES, save_family, streamed_logits
from .runs import arguments

UNREAD = {"qwen2_moe"}


class Exact(Rounder):
    """Rounds nothing: a linear becomes what it should be. Keeps the Gram matrices that it gets."""

    names = ()

    def __init__(self) -> None:
        self.identity = {}
        self.grams: dict[str, torch.Tensor] = {}

    def round_linear(self, measured: MeasuredLinear, target: torch.Tensor, hessian: Hessian) -> dict[str, torch.Tensor]:
        self.grams[measured.name] = hessian.gram.clone()
        return {"weight": target.T.contiguous()}

    def decoded(self, name: str, artifact: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return artifact["weight"]


def logits_of(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Path, Path, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    original = save_family(folder / "model", request.param, byte_tokenizer)
    measure = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu")
    options = Exl2Options(head_bits=8, force=request.param in UNREAD)
    config = QuantizeConfig(target=Target(bpw=7.5), options=options, measure=measure, evaluate=None)
    result = quantize_model(original, folder / "out", **arguments(config))
    yield original, folder / "out", result


def test_streaming_gives_what_transformers_gives(quantized: tuple[Path, Path, Any], tokens: torch.Tensor) -> None:
    original = quantized[0]
    torch.testing.assert_close(
        streamed_logits(open_model(original), tokens), logits_of(original, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("offloaded", [False, True], ids=["passes-wait", "passes-begin-anew"])
def test_without_errors_there_is_no_drift_to_correct(
    quantized: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offloaded: bool
) -> None:
    monkeypatch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", 32)  # a row
    original, _, result = quantized
    model = StreamedModel(
        language_model(open_model(original)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        offload_dir=tmp_path / "states" if offloaded else None,
    )
    artifacts = ResumeStore(tmp_path, "exact", {})
    run = RoundingPass(model, Measurement.load(result.measurement), Exact(), artifacts, correct_drift=True)
    assert len(run.batches) == 4
    run.blocks(silent)
    drifts = RoundedModel((), model.block_count, artifacts).drift()
    # Float32. A stage that looked for what another adds to the stream would move its weights by as much.
    assert max(max(drift.first_token, drift.other_tokens) for drift in drifts) < 1e-4


def test_every_linear_is_rounded_on_its_own_tokens_weights(
    quantized: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bpwise.quantize.rounding.drift.subsample_tokens", lambda weights, _rng: (torch.arange(len(weights)), weights)
    )
    original, _, result = quantized
    measurement = Measurement.load(result.measurement)
    model = StreamedModel(language_model(open_model(original)), device=torch.device("cpu"), dtype=torch.float32)
    rounder = Exact()
    RoundingPass(model, measurement, rounder, ResumeStore(tmp_path, "e", {}), correct_drift=False).blocks(silent)

    inputs: dict[str, torch.Tensor] = {}
    dense = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _module, args, name=name: inputs.update({name: args[0].flatten(0, -2)})
            )
    with torch.no_grad():
        dense(torch.from_numpy(measurement.tokens).long())
    weights = {x.name: torch.from_numpy(x.token_weights).double().flatten() for x in measurement.linears}
    found = inputs.keys() & rounder.grams.keys()
    assert {name.rpartition(".")[2] for name in found} >= {"o_proj"}
    for name in found:
        x = inputs[name].double()
        expected = (weights[name] * x.T) @ x / weights[name].sum()
        got = rounder.grams[name].double()
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.diagonal().max()), name
    attention = "model.layers.1.self_attn"
    if f"{attention}.q_proj" in found:
        assert float((weights[f"{attention}.q_proj"] - weights[f"{attention}.k_proj"]).abs().max()) > 0.1


def test_an_mlp_beside_attention_stays(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    original = save_family(tmp_path / "model", "cohere", byte_tokenizer)
    measure = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu")
    options = Exl2Options(head_bits=8, keep_fp16=("*.mlp.*",))
    config = QuantizeConfig(target=Target(bpw=13.0), options=options, measure=measure, evaluate=None)
    output = quantize_model(original, tmp_path / "out", **arguments(config)).output
    verify_model(output)
    written = Exl2Model.open(output)
    for stays in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.{stays}_proj.weight"
        assert torch.equal(written.tensor(name), open_model(original).tensor(name).half())
    assert any(name.startswith("model.layers.1.self_attn.q_proj") for name in written.names)


def test_the_output_is_the_dense_model_of_its_decoded_weights(
    quantized: tuple[Path, Path, Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    original, output, _ = quantized
    dequantize_model(output, tmp_path / "dense")
    dense = logits_of(tmp_path / "dense", tokens)
    torch.testing.assert_close(streamed_logits(Exl2Model.open(output), tokens), dense, rtol=1e-4, atol=1e-4)
    wanted = logits_of(original, tokens)
    # A router may send a token to another expert, hence the room.
    assert float((dense - wanted).square().mean() / wanted.var()) < 0.03


def test_every_linear_of_every_block_is_quantized(quantized: tuple[Path, Path, Any]) -> None:
    _original, output, result = quantized
    written = Exl2Model.open(output)
    dense = {name for name in written.names if len(written.shape(name)) == 2} - {f"{x}.weight" for x in written.linears}
    kinds = {name.rpartition("layers.")[2].partition(".")[2] for name in dense if "layers." in name}
    # Routers, and the gate of a shared expert, stay as they are.
    assert kinds <= {"mlp.gate.weight", "mlp.shared_expert_gate.weight", "block_sparse_moe.gate.weight"} | {
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    assert verify_model(output).bpw <= 7.5
    assert len(result.plan.linears) + 1 == len(written.linears)


def test_readers_know_it(quantized: tuple[Path, Path, Any]) -> None:
    original, _output, _ = quantized
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
