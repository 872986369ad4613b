"""llama.cpp as the judge, against Transformers on the same weights: real library, small random models."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.gguf.engine.library import LlamaLibrary, load_library
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.errors import CheckpointError, ConfigError
from bpwise.eval.comparison import EvalConfig, compare_models, evaluate_models
from bpwise.eval.engines.engine import compare_in_engine, open_for_engine
from bpwise.measure.text.calibration import CalibrationSet
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ALL = ("llama", "gradient", "llama3", "llama3-other", "linear", "yarn", "mistral", "three-heads", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def library() -> LlamaLibrary:
    return load_library()


def rows_of(rows: int, row_tokens: int) -> CalibrationSet:
    tokens = torch.randint(320, (rows, row_tokens), generator=torch.Generator().manual_seed(2))
    return CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random ids", adds_bos=False)


def requantized(source: Path, target: Path, *, decoded: bool, architecture: str | None = None) -> Path:
    """Round all matrices to Q8_0 or, with the same values, to what Q8_0 decodes to; or give a file another name."""
    reader = gguf.GGUFReader(source)
    before = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture or before)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            named = key.replace(f"{before}.", f"{architecture or before}.")
            writer.add_key_value(named, field.contents(), field.types[0], sub_type=sub_type)
    if architecture is not None:
        writer.add_logit_scale(1.0)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        elif decoded:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def far_divergence(library: LlamaLibrary, model: Any, tokens: int, first: int) -> tuple[float, float]:
    """Mean KL divergence of llama.cpp, and of Transformers from the GGUF file's config, from Transformers' original.

    Over positions from ``first`` on, in nats per token.
    """
    ids = rows_of(1, tokens).tokens
    with library.model(model.file, row_tokens=tokens, threads=1) as engine:
        engines = torch.cat(list(engine.logits(ids[0])))[first:].double().log_softmax(-1)
    # The wanted dtype from the start: rotary frequencies must never pass through another.
    original = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    read = GgufModel.open(model.file)
    rebuilt = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read.config), dtype=torch.float32)
    missing, unexpected = rebuilt.load_state_dict({name: read.tensor(name) for name in read.names}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # if it is tied
    with torch.no_grad():
        expected, again = (each(ids).logits[0, first:].double().log_softmax(-1) for each in (original, rebuilt))
    kl = [float((expected.exp() * (expected - other)).sum(-1).mean()) for other in (engines, again)]
    return kl[0], kl[1]


class TestLongContext:
    @pytest.mark.parametrize("name", ALL)
    def test_beyond_1000(self, library: LlamaLibrary, converted: Any, name: str) -> None:
        engine, rebuilt = far_divergence(library, converted[name], 1300, 1000)
        # llama.cpp multiplies frequencies up in float32, Transformers takes powers: that alone gives some 1e-10.
        assert abs(engine) < 1e-8
        assert abs(rebuilt) < 1e-8

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gradient", "llama3"])
    def test_beyond_32k(self, library: LlamaLibrary, converted: Any, name: str) -> None:
        engine, rebuilt = far_divergence(library, converted[name], 33300, 32768)
        # The same differences of frequencies turn angles 30 times as far, and the divergence is quadratic in them.
        assert abs(engine) < 1e-6
        assert abs(rebuilt) < 1e-6


class TestCompareInEngine:
    def test_agrees_with_transformers_on_decoded_weights(
        self, library: LlamaLibrary, converted: Any, tmp_path: Path
    ) -> None:
        # Rows end within a batch of llama.cpp's, at its end, and one token after it.
        source, base = Checkpoint.open(converted["llama"].directory), GgufModel.open(converted["llama"].file)
        other = GgufModel.open(requantized(base.path, tmp_path / "q.gguf", decoded=True))
        for row_tokens in (40, 256, 257):
            rows = rows_of(3, row_tokens)
            got = compare_in_engine(source, base, other, rows, library)
            expected = compare_models(source, other, rows, EvalConfig(device="cpu"))
            for name in ("kl_nats", "original_perplexity", "quantized_perplexity", "top1_agreement"):
                value, reference = getattr(got.summary, name).value, getattr(expected.summary, name).value
                # Both in float32, so apart by about 1e-6 of the logits.
                assert value == pytest.approx(reference, rel=1e-3), name
            assert got.summary.kl_nats.value > 1e-5
            assert got.floor_nats < 1e-8
            assert got.predicted_tokens == 3 * (row_tokens - 1)
            assert (got.original.name, got.quantized.name) == ("llama", "q.gguf")
            assert got.quantized.stored_bytes == (tmp_path / "q.gguf").stat().st_size
            assert "xllamacpp" in got.engine
            assert got.dtype == "float32"

    def test_quantized_weights(self, library: LlamaLibrary, converted: Any, tmp_path: Path) -> None:
        source, base = Checkpoint.open(converted["qwen3"].directory), GgufModel.open(converted["qwen3"].file)
        other = GgufModel.open(requantized(base.path, tmp_path / "q.gguf", decoded=False))
        got = compare_in_engine(source, base, other, rows_of(2, 64), library).summary.kl_nats.value
        plain = compare_models(source, other, rows_of(2, 64), EvalConfig(device="cpu")).summary.kl_nats.value
        # llama.cpp rounds the activations that meet Q8_0 weights to 8 bits as well: a multiple, but no other size.
        assert plain < got < 20 * plain

    def test_an_architecture_that_nothing_here_decodes(
        self, library: LlamaLibrary, converted: Any, byte_tokenizer: Any, tmp_path: Path
    ) -> None:
        # Granite with a scale of 1 is a llama.
        model = converted["llama"]
        files = [
            requantized(model.file, tmp_path / f"{name}.gguf", decoded=name == "base", architecture="granite")
            for name in ("base", "small")
        ]
        base, quantized = map(open_for_engine, files)
        got = compare_in_engine(Checkpoint.open(model.directory), base, quantized, rows_of(2, 64), library)
        assert 0 < got.summary.kl_nats.value < 0.1
        assert 0 < got.floor_nats < 0.01  # the base itself is rounded
        assert (got.dtype, got.quantized.name) == ("float32", "small.gguf")
        assert got.quantized.stored_bytes == files[1].stat().st_size

    def test_same_file(self, library: LlamaLibrary, converted: Any) -> None:
        source, base = Checkpoint.open(converted["llama"].directory), GgufModel.open(converted["llama"].file)
        got = compare_in_engine(source, base, base, rows_of(1, 30), library)
        assert got.summary.kl_nats.value == 0
        assert got.within_floor

    def test_base_of_another_model(self, library: LlamaLibrary, converted: Any) -> None:
        source, base = Checkpoint.open(converted["llama"].directory), GgufModel.open(converted["gradient"].file)
        with pytest.raises(CheckpointError, match="not a conversion of that model"):
            compare_in_engine(source, base, base, rows_of(1, 30), library)

    def test_base_is_quantized(self, library: LlamaLibrary, converted: Any, tmp_path: Path) -> None:
        source = Checkpoint.open(converted["llama"].directory)
        base = GgufModel.open(requantized(converted["llama"].file, tmp_path / "q.gguf", decoded=False))
        with pytest.raises(ConfigError, match=r"quantized\. Expected an unquantized base"):
            compare_in_engine(source, base, base, rows_of(1, 30), library)
        with pytest.raises(ConfigError, match=r"llama: not a model that llama\.cpp runs"):
            compare_in_engine(source, base, source, rows_of(1, 30), library)
        with pytest.raises(ConfigError, match="positions for 4096"):
            base = GgufModel.open(converted["llama"].file)
            compare_in_engine(source, base, base, rows_of(1, 4097), library)


ENDS = ("csv", "html", "json", "md")


class TestCommandLine:
    def test_reports_lie_beside_the_file(
        self, converted: Any, byte_tokenizer: Any, tmp_path: Path, library: LlamaLibrary
    ) -> None:
        original = tmp_path / "original"
        shutil.copytree(converted["qwen2"].directory, original)
        (original / "tokenizer.model").unlink()
        byte_tokenizer.save_pretrained(original)
        quantized = requantized(converted["qwen2"].file, tmp_path / "small.gguf", decoded=True)
        text = tmp_path / "text.txt"
        text.write_text(" ".join(map(str, range(200))))
        options = ["--text", str(text), "-r", "2", "-l", "30"]
        command = ["eval", str(original), str(quantized), *options]
        engine = ["--engine", "llama.cpp", "--base", str(converted["qwen2"].file)]
        for extra in (["--device", "cpu"], engine):
            run = CliRunner().invoke(cli, [*command, *extra], catch_exceptions=False)
            assert run.exit_code == 0, run.output
            assert "nats per token" in run.output
        reports = sorted(path.name for path in tmp_path.glob("small.*") if path != quantized)
        assert reports == [f"small.{kind}report.{end}" for kind in ("llama.cpp.", "") for end in ENDS]
        assert "| run by | Transformers |" in (tmp_path / "small.report.md").read_text()
        assert "| run by | llama.cpp (xllamacpp" in (tmp_path / "small.llama.cpp.report.md").read_text()
        plain = evaluate_models(original, quantized, EvalConfig(text=str(text), rows=2, row_tokens=30, device="cpu"))
        assert plain.quantized.stored_bytes == quantized.stat().st_size
        for wrong in (engine[:2], engine[2:]):
            assert CliRunner().invoke(cli, [*command, *wrong]).exit_code == 2

    def test_a_file_that_only_llama_cpp_knows(self, converted: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
        original = tmp_path / "original"
        shutil.copytree(converted["llama"].directory, original)
        (original / "tokenizer.model").unlink()
        byte_tokenizer.save_pretrained(original)
        names = {"base": True, "small": False}
        for name, decoded in names.items():
            target = tmp_path / f"{name}.gguf"
            requantized(converted["llama"].file, target, decoded=decoded, architecture="granite")
        text = tmp_path / "text.txt"
        text.write_text(" ".join(map(str, range(200))))
        command = ["eval", str(original), str(tmp_path / "small.gguf"), "--text", str(text), "-r", "1", "-l", "30"]
        engine = ["--engine", "llama.cpp", "--base", str(tmp_path / "base.gguf")]
        run = CliRunner().invoke(cli, [*command, *engine], catch_exceptions=False)
        assert run.exit_code == 0, run.output
        assert "nats per token" in run.output
        assert "model.layers.1.ffn_down" in (tmp_path / "small.llama.cpp.report.json").read_text()
