import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.file.writer import write_model
from bpwise.convert.opening import open_any
from bpwise.errors import CalibrationError, CheckpointError, ConfigError, NumericalError
from bpwise.eval import original as original_module
from bpwise.eval.comparison import (
    Comparison,
    EvalConfig,
    compare_models,
    compare_with,
    evaluate_each,
    evaluate_models,
    evaluation_rows,
)
from bpwise.eval.metrics import passes as passes_module
from bpwise.eval.original import run_original
from bpwise.measure.model.whole import whole_model
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.measure.text.tokenizer import load_tokenizer
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from ..rounded import random_linear

MakeModel = Callable[..., Path]
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"rows": 3, "row_tokens": 40, "device": "cpu", **changes})


def rows_of(rows: int = 3, row_tokens: int = 40, *, largest: int = 250) -> CalibrationSet:
    tokens = torch.randint(largest + 1, (rows, row_tokens), generator=torch.Generator().manual_seed(5))
    tokens[0, 0] = largest
    return CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random ids", adds_bos=False)


def log_probabilities(directory: Path, tokens: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """What Transformers itself predicts for all but the first token of each row, in float64 from the logits on."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double().numpy()
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_against_transformers(got: Comparison, original: Path, quantized: Path, tokens: torch.Tensor) -> None:
    log_p = log_probabilities(original, tokens, torch.float64)
    log_q = log_probabilities(quantized, tokens, torch.float64)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    targets = tokens[:, 1:, None].numpy()
    nll = {
        name: -np.take_along_axis(log, targets, axis=-1) for name, log in (("original", log_p), ("quantized", log_q))
    }
    # Two layers in float32 change a log-probability by some 1e-6, so averages by no more than 1e-5 of themselves.
    assert got.summary.kl_nats.value == pytest.approx(kl.mean(), rel=1e-4)
    assert got.summary.kl_max_nats == pytest.approx(kl.max(), rel=1e-4)
    assert got.summary.kl_p99_nats == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    for name, values in nll.items():
        assert getattr(got.summary, f"{name}_perplexity").value == pytest.approx(math.exp(values.mean()), rel=1e-5)
    agreement = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).mean()
    assert got.summary.top1_agreement.value == pytest.approx(agreement)


class _InMemory:
    """A checkpoint without its disk: only what ``TensorSource`` asks for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        assert name in ("directory", "config", "fingerprint", "names", "tied_embeddings", "shape", "tensor"), name
        return getattr(self._checkpoint, name)


class TestCompareModels:
    @pytest.mark.parametrize("tail_tokens", [256, 7], ids=["one-slice", "several-slices"])
    def test_agrees_with_transformers(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tail_tokens: int
    ) -> None:
        monkeypatch.setattr(passes_module, "TAIL_TOKENS", tail_tokens)
        original, quantized = make_model("original"), make_model("quantized", noise=0.02)
        rows = rows_of()
        got = compare_models(open_any(original), open_any(quantized), rows, config())
        check_against_transformers(got, original, quantized, rows.tokens)
        assert 0.001 < got.summary.kl_nats.value < 1
        assert 0 <= got.floor_nats < 1e-9
        assert not got.within_floor

    def test_describes_how(self, make_model: MakeModel) -> None:
        original, quantized = make_model("original"), make_model("quantized", noise=0.02)
        rows = rows_of()
        source = open_any(original)
        got = compare_models(source, open_any(quantized), rows, config(rows=99, text="unread"))
        assert (got.text, got.text_fingerprint) == ("random ids", rows.fingerprint)
        assert (got.rows, got.row_tokens, got.stride, got.predicted_tokens) == (3, 40, 40, 117)
        assert (got.dtype, got.device, got.adds_bos) == ("float32", "cpu", False)
        assert (got.original.name, got.quantized.name) == ("original", "quantized")
        assert got.original.fingerprint == source.fingerprint != got.quantized.fingerprint
        assert got.original.stored_bytes == source.total_bytes
        assert got.original.bits_per_parameter == pytest.approx(32)
        assert got.seconds > 0
        assert "float64 on the CPU, over the first 40 tokens" in got.floor_definition
        json.dumps(got.to_dict(), allow_nan=False)

    def test_same_model(self, make_model: MakeModel) -> None:
        source = open_any(make_model("original"))
        got = compare_models(source, _InMemory(source), rows_of(), config())
        # The same arithmetic on the same numbers: nothing to round differently.
        assert got.summary.kl_nats.value == 0
        assert got.summary.top1_agreement.value == 1
        assert got.summary.perplexity_ratio.value == 1
        assert got.summary.perplexity_difference.value == 0
        assert got.within_floor
        assert got.quantized.stored_bytes is None
        assert got.quantized.bits_per_parameter is None

    def test_tied_embeddings(self, make_model: MakeModel) -> None:
        original = make_model("original", tie_word_embeddings=True)
        quantized = make_model("quantized", tie_word_embeddings=True, noise=0.02)
        rows = rows_of()
        got = compare_models(open_any(original), open_any(quantized), rows, config())
        check_against_transformers(got, original, quantized, rows.tokens)

    def test_floor_in_bfloat16(self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(original_module, "FLOOR_TOKENS", 20)
        original = make_model("original")
        rows = rows_of()
        source = open_any(original)
        got = compare_models(source, source, rows, config(dtype="bfloat16"))
        first = rows.tokens[:1, :20]
        exact = log_probabilities(original, first, torch.float64)
        rounded = log_probabilities(original, first, torch.bfloat16)
        expected = (np.exp(exact) * (exact - rounded)).sum(axis=-1).mean()
        assert got.floor_tokens == 20
        assert got.dtype == "bfloat16"
        # Where products are summed in another order, roundings to 8 bits fall differently: same size, other digits.
        assert got.floor_nats == pytest.approx(expected, rel=0.5)
        assert got.floor_nats > 1e-6
        assert got.within_floor

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_bfloat16_alone(self, make_model: MakeModel, dtype: str) -> None:
        original = make_model("original")
        rows = rows_of()
        source = open_any(original)
        got = compare_models(source, source, rows, config(dtype=dtype))
        full, rounded = (log_probabilities(original, rows.tokens[:1], kind) for kind in (torch.float32, torch.bfloat16))
        expected = (np.exp(full) * (full - rounded)).sum(axis=-1).mean()
        # As the floor: roundings to 8 bits fall differently where products are summed in another order.
        assert got.bfloat16_floor_nats == pytest.approx(expected, rel=0.5)
        assert got.within_bfloat16

    def test_one_row_has_no_standard_errors(self, make_model: MakeModel) -> None:
        source = open_any(make_model("original"))
        got = compare_models(source, source, rows_of(1, 2), config())
        assert got.predicted_tokens == 1
        assert got.summary.kl_nats.standard_error is None
        json.dumps(got.to_dict(), allow_nan=False)

    def test_original_runs_once_for_many(self, make_model: MakeModel) -> None:
        original = open_any(make_model("original"))
        others = [open_any(make_model(f"noise-{noise}", noise=noise)) for noise in (0.01, 0.02)]
        run = run_original(original, rows_of(), config())
        for other in others:
            again = compare_models(original, other, rows_of(), config())
            assert replace(compare_with(run, other), seconds=0) == replace(again, seconds=0)

    def test_progress_sees_every_pass(self, make_model: MakeModel) -> None:
        seen: dict[str, int] = {}

        def count(items: Any, stage: str) -> Any:
            seen[stage] = len(items)
            return items

        source = open_any(make_model("original"))
        compare_models(source, source, rows_of(), config(), count)
        assert seen == {
            "evaluate: original model": 2,
            "evaluate: original model in float64": 2,
            "evaluate: original model in bfloat16": 2,
            "evaluate: quantized model": 2,
            "evaluate: logits": 3,
        }


def _scale(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(parameters: dict[str, torch.Tensor]) -> None:
        parameters[name] *= factor

    return change


class TestRefusals:
    @pytest.mark.parametrize("role", ["original", "quantized"])
    @pytest.mark.parametrize(
        ("weight", "place"),
        [("model.layers.1.mlp.down_proj.weight", r"model\.layers\.1"), ("lm_head.weight", "output head")],
        ids=["block", "head"],
    )
    def test_overflow_names_model_and_place(self, make_model: MakeModel, role: str, weight: str, place: str) -> None:
        # Weights of up to 3e38 are finite, but a sum of two products with them is not.
        good, bad = make_model("good"), make_model("bad", change=_scale(weight, 3e38))
        first, second = (bad, good) if role == "original" else (good, bad)
        with pytest.raises(NumericalError, match=f"{role} model, {place}: .* in float32. The model's weights"):
            compare_models(open_any(first), open_any(second), rows_of(), config())

    def test_overflow_of_float16(self, make_model: MakeModel) -> None:
        source = open_any(make_model("large", change=_scale("model.layers.0.mlp.down_proj.weight", 1e5)))
        with pytest.raises(NumericalError, match=r"model\.layers\.0: .* in float16. Evaluate in bfloat16 or float32"):
            compare_models(source, source, rows_of(), config(dtype="float16"))
        assert compare_models(source, source, rows_of(), config()).summary.kl_nats.value == 0

    def test_vocabularies_differ(self, make_model: MakeModel) -> None:
        original, quantized = make_model("original"), make_model("quantized", vocab_size=300)
        with pytest.raises(CheckpointError, match=r"300 tokens. Expected 264"):
            compare_models(open_any(original), open_any(quantized), rows_of(), config())
        with pytest.raises(CheckpointError, match=r"300 tokens. Expected 264"):
            evaluate_models(original, quantized, config())

    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            (rows_of(largest=264), CalibrationError, "Got token id 264. Expected ids below"),
            (rows_of(3, 1), ConfigError, "rows of 1 token"),
            (rows_of(1, 129), ConfigError, "rows of 129 tokens, but .* has positions for 128"),
        ],
        ids=["token-id", "one-token", "too-long"],
    )
    def test_rows(self, make_model: MakeModel, rows: CalibrationSet, error: type[Exception], message: str) -> None:
        source = open_any(make_model("original"))
        with pytest.raises(error, match=message):
            compare_models(source, source, rows, config())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"dtype": "float64"}, "dtype: not usable"), ({"rows": 0}, "rows"), ({"column": "text"}, "need a text")],
        ids=["dtype", "rows", "column"],
    )
    def test_config(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            EvalConfig(**changes)

    def test_device(self, make_model: MakeModel) -> None:
        source = open_any(make_model("original"))
        with pytest.raises(ConfigError, match="abacus"):
            compare_models(source, source, rows_of(), config(device="abacus"))


class TestEvaluate:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        path = tmp_path / "text.txt"
        path.write_text(" ".join(str(number) for number in range(200)))
        return path

    def test_own_text(self, make_model: MakeModel, text: Path) -> None:
        original, quantized = make_model("original"), make_model("quantized", noise=0.02)
        got = evaluate_models(str(original), quantized, config(text=str(text)))
        encoded = load_tokenizer(original)(text.read_text(), add_special_tokens=False)["input_ids"]
        # 40 tokens a row, the first of them BOS (id 256).
        tokens = torch.tensor([[256, *encoded[row * 39 : row * 39 + 39]] for row in range(3)])
        assert got.adds_bos
        assert "text.txt" in got.text
        check_against_transformers(got, original, quantized, tokens)

    def test_built_in_text_is_the_evaluation_part(self, make_model: MakeModel) -> None:
        original = make_model("original")
        rows = evaluation_rows(load_tokenizer(original), config(), vocab_size=264)
        got = evaluate_models(original, original, config())
        assert "evaluation part" in got.text
        assert got.text_fingerprint == rows.fingerprint

    def test_several(self, make_model: MakeModel, text: Path) -> None:
        original, near, far = make_model("o"), make_model("near", noise=0.005), make_model("far", noise=0.05)
        got = list(evaluate_each(original, [near, far], config(text=str(text))))
        assert [each.quantized.name for each in got] == ["near", "far"]
        assert got[0].summary.kl_nats.value < got[1].summary.kl_nats.value
        assert replace(got[1], seconds=0) == replace(evaluate_models(original, far, config(text=str(text))), seconds=0)

    def test_rows_that_a_quantized_model_has_no_positions_for(
        self, make_model: MakeModel, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, short = make_model("original"), make_model("short", max_position_embeddings=32)
        monkeypatch.setattr("bpwise.eval.comparison.run_original", lambda *_, **__: pytest.fail("was run"))
        with pytest.raises(ConfigError, match="rows of 40 tokens, but the model has positions for 32"):
            list(evaluate_each(original, [short], config(text=str(text))))

    def test_states_in_files_change_nothing(self, make_model: MakeModel, text: Path, tmp_path: Path) -> None:
        original, quantized = make_model("original"), make_model("quantized", noise=0.02)
        files = tmp_path / "files"
        plain, offloaded = (
            evaluate_models(original, quantized, config(text=str(text), offload_dir=place)) for place in (None, files)
        )
        assert replace(offloaded, seconds=0) == replace(plain, seconds=0)
        assert not list(files.iterdir())

    def test_missing_model_is_found_before_anything_runs(self, make_model: MakeModel, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="absent"):
            evaluate_models(make_model("original"), tmp_path / "absent", config(text="unread"))

    def test_exl2_model(self, make_model: MakeModel, tmp_path: Path, text: Path) -> None:
        # The dense copy is float16 throughout, so what is not quantized must be so from the start.
        original, exl2, dense = make_model("original", change=_round), tmp_path / "exl2", tmp_path / "dense"
        calibration = {"rows": 1, "length": 8, "dataset": "none"}
        write_model(
            open_any(original),
            {
                name: (lambda name=name: random_linear(open_any(original).shape(f"{name}.weight")))
                for name in [f"model.layers.{i}.{linear}" for i in range(2) for linear in LINEARS] + ["lm_head"]
            },
            exl2,
            quantization={"version": "0.3.2", "bits": 4.0, "head_bits": 4, "calibration": calibration},
            provenance={},
        )
        dequantize_model(exl2, dense)
        assert isinstance(open_any(exl2), Exl2Model)
        assert isinstance(open_any(str(original)), Checkpoint)
        whole = whole_model(open_any(exl2), device=torch.device("cpu"), dtype=torch.float32)
        tokens = rows_of().tokens
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
            assert torch.equal(whole(tokens).logits, expected)
        got = evaluate_models(original, exl2, config(text=str(text)))
        same = evaluate_models(original, dense, config(text=str(text)))
        assert got.summary == same.summary
        assert got.quantized.stored_bytes == sum(path.stat().st_size for path in exl2.glob("*.safetensors"))


def _round(parameters: dict[str, torch.Tensor]) -> None:
    for parameter in parameters.values():
        parameter.copy_(parameter.half())


def test_name_of_a_hub_snapshot(make_model: MakeModel, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    make_model("original").rename(snapshot)
    source = open_any(snapshot)
    got = compare_models(source, source, rows_of(), config())
    assert got.original.name == "some-org/some-model"


class TestCommand:
    def test_several_models(self, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original, near, far = make_model("o"), make_model("near", noise=0.005), make_model("far", noise=0.05)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        options = ["-r", "2", "-l", "30", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]
        run = CliRunner().invoke(cli, ["eval", str(original), str(near), str(far), *options], catch_exceptions=False)
        assert run.exit_code == 0, run.output
        assert re.search("(Smallest that is good enough|Closest to the original): near", run.output)
        names = {path.name for path in (tmp_path / "here").iterdir()}
        assert names == {f"report.{end}" for end in ("csv", "html", "json", "md")}
        assert len(list((tmp_path / "cache").iterdir())) == 1
        assert "evaluate: original" in run.stderr

        again = CliRunner().invoke(cli, ["eval", str(original), str(near), "--plots", *options], catch_exceptions=False)
        assert "evaluate: original" not in again.stderr
        assert (near / "report-plots" / "histogram.svg").is_file()
        first = json.loads((tmp_path / "here" / "report.json").read_text())["comparisons"][0]["summary"]
        assert json.loads((near / "report.json").read_text())["comparison"]["summary"] == first

    def test_no_cache(self, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        original, near = make_model("o"), make_model("near", noise=0.005)
        command = ["eval", str(original), str(near), "-r", "2", "-l", "30", "--device", "cpu"]
        assert CliRunner().invoke(cli, [*command, "--no-cache"]).exit_code == 0
        assert not list(tmp_path.glob("cache/bpwise/*.safetensors"))
        assert CliRunner().invoke(cli, command).exit_code == 0
        assert len(list(tmp_path.glob("cache/bpwise/*.safetensors"))) == 1
