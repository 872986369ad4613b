"""GGUF files read as models: against what llama.cpp's converter makes of checkpoints, and with parts replaced."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.dense import dequantize_model
from bpwise.convert.gguf.file.metadata import RUN_KEY, SPANS_KEY
from bpwise.convert.gguf.model.names import architecture_of, gguf_name, hf_name, row_order
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.model.verify import verify_gguf
from bpwise.convert.registry import require_format
from bpwise.errors import BpwiseError, CheckpointError, FormatError, UnsupportedModelError
from bpwise.measure.model.stream import StreamedModel
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

gguf = pytest.importorskip("gguf")

ALL = ("llama", "gradient", "llama3", "llama3-other", "linear", "yarn", "mistral", "three-heads", "qwen2", "qwen3")

Rewrite = Callable[..., Path]


@pytest.fixture
def rewrite(converted: Any, tmp_path: Path) -> Rewrite:
    """Writes a converted model again with the gguf package: other metadata, other or requantized tensors."""

    def write(
        name: str,
        *,
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        kind: str | None = None,
    ) -> Path:
        reader = gguf.GGUFReader(converted[name].file)
        path = tmp_path / f"{name}.gguf"
        fields = {key: each for key, each in reader.fields.items() if not key.startswith("GGUF.")}
        architecture = (metadata or {}).get("general.architecture", fields["general.architecture"].contents())
        writer = gguf.GGUFWriter(path, architecture)
        for key, each in fields.items():
            if key != "general.architecture" and key not in (metadata or {}):
                sub_type = each.types[-1] if each.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, each.contents(), each.types[0], sub_type=sub_type)
        for key, value in (metadata or {}).items():
            if key != "general.architecture" and value is not None:
                _add(writer, key, value)
        stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | (tensors or {})
        for tensor, values in stored.items():
            if values is None:
                continue
            if kind is not None and values.ndim == 2 and values.dtype == np.float32:
                number = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(tensor, gguf.quants.quantize(values, number), raw_dtype=number)
            else:
                writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)](
            key, value
        )


def logits(source: Any, tokens: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float64)
    hidden = model.embed(tokens)
    with torch.no_grad():
        for index in range(model.block_count):
            with model.block(index):
                hidden = model.run_block(index, hidden)
        with model.tail():
            return model.logits(hidden)


class TestConverted:
    @pytest.mark.parametrize("name", ALL)
    def test_tensors_are_the_checkpoints(self, converted: Any, name: str) -> None:
        model, original = GgufModel.open(converted[name].file), Checkpoint.open(converted[name].directory)
        assert model.names == original.names
        assert model.tied_embeddings == original.tied_embeddings
        assert model.parameter_count == original.parameter_count
        for tensor in original.names:
            assert model.shape(tensor) == original.shape(tensor)
            assert torch.equal(model.tensor(tensor), original.tensor(tensor)), tensor

    @pytest.mark.parametrize("name", ALL)
    def test_config_is_the_checkpoints(self, converted: Any, name: str) -> None:
        model, original = GgufModel.open(converted[name].file), AutoConfig.from_pretrained(converted[name].directory)
        got = AutoConfig.for_model(**model.config)
        for key in model.config.keys() - {"model_type", "architectures", "rope_scaling", "rope_theta", "head_dim"}:
            # Mistral's class has no biases, and so no such keys.
            assert getattr(got, key) == getattr(original, key, False), key
        # Where the file holds float32 numbers only, or factors without the parameters that they were made from.
        theta = original.rope_parameters["rope_theta"]
        assert got.rope_parameters["rope_theta"] == pytest.approx(theta, rel=1e-7)
        expected = {"llama3": "llama3", "llama3-other": "longrope", "linear": "linear", "yarn": "yarn"}
        assert got.rope_parameters["rope_type"] == expected.get(name, "default")
        if name == "llama3":
            assert got.rope_parameters == {**original.rope_parameters}

    @pytest.mark.parametrize("name", ALL)
    def test_predictions_are_the_checkpoints(self, converted: Any, name: str) -> None:
        # Far positions tell rotary embeddings apart: 2000 of them, where each scaling has an effect.
        tokens = torch.randint(320, (1, 2000), generator=torch.Generator().manual_seed(1))
        got = logits(GgufModel.open(converted[name].file), tokens)
        expected = logits(Checkpoint.open(converted[name].directory), tokens)
        # Rotary frequencies are float32: 1e-7 of an angle of up to 2000.
        assert torch.allclose(got, expected, atol=0.02), (got - expected).abs().max()
        assert (got - expected).abs().mean() < 1e-3

    def test_scaling_matters_to_the_test_above(self, converted: Any) -> None:
        tokens = torch.randint(320, (1, 2000), generator=torch.Generator().manual_seed(1))
        for name in ("llama3", "llama3-other", "linear", "yarn"):
            model = GgufModel.open(converted[name].file)
            plain = GgufModel(model.header, {**model.config, "rope_scaling": None})
            assert (logits(model, tokens) - logits(plain, tokens)).abs().mean() > 0.05, name

    def test_fingerprint_and_pickle(self, converted: Any) -> None:
        models = [GgufModel.open(converted[name].file) for name in ALL]
        assert len({model.fingerprint for model in models}) == len(ALL)
        again = pickle.loads(pickle.dumps(models[0]))
        assert again.fingerprint == models[0].fingerprint
        assert torch.equal(again.tensor("model.norm.weight"), models[0].tensor("model.norm.weight"))
        assert again.file_bytes == converted["llama"].file.stat().st_size


class TestQuantized:
    @pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
    def test_rows_go_back_after_decoding(self, rewrite: Rewrite, converted: Any, kind: str) -> None:
        model = GgufModel.open(rewrite("llama", kind=kind))
        original = Checkpoint.open(converted["llama"].directory)
        number = gguf.GGMLQuantizationType[kind]
        for name in original.names:
            exact = original.tensor(name)
            if exact.ndim == 2:
                # Blocks lie within a row, so it does not matter to them where rows stand.
                expected = gguf.quants.dequantize(gguf.quants.quantize(exact.numpy(), number), number)
                assert np.array_equal(model.tensor(name).float().numpy(), expected), name
                assert model.stored(name).type.name == kind

    def test_pieces(self, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
        model = GgufModel.open(rewrite("qwen3", kind="Q8_0"))
        whole = {name: model.tensor(name) for name in model.names}
        monkeypatch.setattr("bpwise.convert.gguf.file.values._PIECE_WEIGHTS", 200)
        assert all(torch.equal(model.tensor(name), whole[name]) for name in model.names)

    def test_not_finite(self, rewrite: Rewrite) -> None:
        path = rewrite("llama", kind="Q8_0")
        info = GgufModel.open(path).stored("model.layers.1.mlp.up_proj.weight")
        data = bytearray(path.read_bytes())
        data[info.offset_bytes : info.offset_bytes + 2] = np.float16(np.nan).tobytes()  # the first block's scale
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"blk\.1\.ffn_up\.weight' holds NaN or infinite values. Got 32 of"):
            GgufModel.open(path).tensor("model.layers.1.mlp.up_proj.weight")
        with pytest.raises(FormatError, match="NaN"):
            verify_gguf(path)

    def test_shrinking_file(self, rewrite: Rewrite) -> None:
        path = rewrite("llama")
        model = GgufModel.open(path)
        path.write_bytes(path.read_bytes()[:-10000])
        with pytest.raises(FormatError, match="shorter"):
            [model.tensor(name) for name in model.names]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"general.architecture": "gpt2"}, UnsupportedModelError, "Expected one of llama, qwen2, qwen3"),
            ({"llama.expert_count": 8}, UnsupportedModelError, "mixture of experts"),
            ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "a part of each head"),
            (
                {"llama.attention.head_count_kv": [2, 1]},
                UnsupportedModelError,
                "a list for llama.attention.head_count_kv",
            ),
            ({"llama.attention.sliding_window": 128}, UnsupportedModelError, "sliding-window"),
            ({"llama.rope.scaling.type": "longrope"}, UnsupportedModelError, "'longrope'"),
            ({"split.count": 2}, FormatError, r"part 1 of 2 of a split model, by another name"),
            ({"split.count": 3, "split.no": 2, "general.architecture": None}, FormatError, "part 3 of 3"),
            ({"llama.block_count": 1 << 30}, FormatError, "block_count is 1073741824"),
            ({"llama.block_count": 3}, FormatError, r"missing, the first 'model\.layers\.2\."),
            ({"llama.block_count": 1}, FormatError, r"'blk\.1\..*' does not belong"),
            ({"llama.attention.head_count": 0}, FormatError, "head_count is 0"),
            ({"llama.attention.head_count": "four"}, FormatError, "head_count is 'four'"),
            ({"llama.embedding_length": None}, FormatError, "embedding_length is None"),
            ({"llama.rope.freq_base": float("nan")}, FormatError, "freq_base is nan"),
            ({"llama.feed_forward_length": 97}, FormatError, "from the metadata"),
        ],
    )
    def test_metadata(self, rewrite: Rewrite, changes: dict[str, Any], error: type[BpwiseError], message: str) -> None:
        path = rewrite("gradient", metadata=changes)
        with pytest.raises(error, match=message):
            _ = GgufModel.open(path).config

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"output_norm.weight": None}, r"1 tensors are missing, the first 'model\.norm\.weight'"),
            ({"blk.0.attn_q.scale": np.ones(4, np.float32)}, "does not belong"),
            ({"rope_freqs.weight": np.ones(8, np.float32)}, r"shape \(8,\). Expected \(16,\)"),
            ({"rope_freqs.weight": np.zeros(16, np.float32)}, "not positive"),
            ({"output_norm.weight": np.ones(64, np.int32)}, "type I32. Expected floating point"),
            ({"token_embd.weight": None}, "token_embd"),
        ],
    )
    def test_tensors(self, rewrite: Rewrite, tensors: dict[str, Any], message: str) -> None:
        with pytest.raises(FormatError, match=message):
            GgufModel.open(rewrite("gradient", tensors=tensors))

    @pytest.mark.parametrize("name", ["llama", "llama3", "yarn"])
    def test_any_byte_of_the_header_may_be_wrong(self, converted: Any, tmp_path: Path, name: str) -> None:
        whole, path = converted[name].file.read_bytes(), tmp_path / "x.gguf"
        size = GgufModel.open(converted[name].file).header.data_offset_bytes
        rng = random.Random(0)
        # Sampled over the tokens, which are most of it.
        for position in (*range(1000), *rng.sample(range(1000, size), 300)):
            path.write_bytes(whole[:position] + bytes([rng.randrange(256)]) + whole[position + 1 :])
            with suppress(BpwiseError):  # anything else fails the test
                GgufModel.open(path)

    def test_unknown_tensor(self, converted: Any) -> None:
        with pytest.raises(CheckpointError, match="'absent' is missing"):
            GgufModel.open(converted["llama"].file).tensor("absent")

    def test_appended_data(self, rewrite: Rewrite) -> None:
        path = rewrite("llama")
        path.write_bytes(path.read_bytes() + bytes(100))
        with pytest.raises(FormatError, match="follow the last tensor"):
            verify_gguf(path)

    def test_quantized_vector(self, rewrite: Rewrite, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "v.gguf", "other")
        number = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("v.weight", gguf.quants.quantize(np.ones((1, 32), np.float32), number)[0], raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(FormatError, match=r"'v\.weight' is a vector of type Q8_0"):
            verify_gguf(tmp_path / "v.gguf")


class TestRope:
    """Variants of metadata that the converter does not write here."""

    def test_yarn_factors_as_llama_cpp_reads_them(self, rewrite: Rewrite) -> None:
        got = GgufModel.open(rewrite("yarn", metadata={"qwen2.rope.scaling.attn_factor": 0.5})).config["rope_scaling"]
        assert got["attention_factor"] == pytest.approx(0.5 * (0.1 * np.log(4) + 1))
        assert (got["factor"], got["original_max_position_embeddings"]) == (4, 1024)

    def test_yarn_keys_that_llama_cpp_leaves_unread(self, rewrite: Rewrite) -> None:
        plain = GgufModel.open(rewrite("yarn")).config["rope_scaling"]
        keys = ("yarn_attn_factor", "yarn_ext_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")
        # Seen by running llama.cpp on such files: its logits stay the same to the bit.
        path = rewrite("yarn", metadata={f"qwen2.rope.scaling.{key}": 0.5 for key in keys})
        assert GgufModel.open(path).config["rope_scaling"] == plain

    @pytest.mark.parametrize(
        "changes",
        [{"llama.rope.scaling.type": None, "llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0}],
        ids=["no-type", "old-key"],
    )
    def test_linear_without_its_name(self, rewrite: Rewrite, changes: dict[str, Any]) -> None:
        assert GgufModel.open(rewrite("gradient", metadata=changes)).config["rope_scaling"] == {
            "rope_type": "linear",
            "factor": 4.0,
        }

    def test_type_none_switches_the_factor_off(self, rewrite: Rewrite) -> None:
        changes = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
        assert GgufModel.open(rewrite("gradient", metadata=changes)).config["rope_scaling"] is None

    def test_factors_of_one_are_none(self, rewrite: Rewrite) -> None:
        path = rewrite("gradient", tensors={"rope_freqs.weight": np.ones(16, np.float32)})
        assert GgufModel.open(path).config["rope_scaling"] is None


class TestCommands:
    def test_dequantize(self, rewrite: Rewrite, converted: Any, tmp_path: Path) -> None:
        path, out = rewrite("llama3", kind="Q8_0"), tmp_path / "dense"
        dequantize_model(path, out, original=converted["llama3"].directory, shard_bytes=20000)
        model, dense = GgufModel.open(path), Checkpoint.open(out)
        assert (out / "tokenizer.model").is_file()
        assert (out / "model.safetensors.index.json").is_file()
        assert json.loads((out / "config.json").read_text())["rope_scaling"]["rope_type"] == "llama3"
        assert dense.tied_embeddings
        for name in model.names:
            assert torch.equal(dense.tensor(name), model.tensor(name).half())
        AutoModelForCausalLM.from_pretrained(out)

    def test_command_line(self, rewrite: Rewrite, converted: Any, tmp_path: Path) -> None:
        path = shutil.move(
            rewrite("llama", kind="Q8_0", metadata={"general.name": "evil\x1b[31m"}), tmp_path / "m.gguf"
        )
        run = CliRunner().invoke(cli, ["inspect", str(path)], catch_exceptions=False)
        assert run.exit_code == 0
        assert "GGUF file, version 3" in run.output
        assert "general.name: evil\\x1b[31m" in run.output
        assert "general.architecture: llama" in run.output
        assert "tokenizer.ggml.tokens: 320 values" in run.output
        line = next(line for line in run.output.splitlines() if line.startswith("blk.0.ffn_up.weight "))
        assert line.split() == ["blk.0.ffn_up.weight", "96", "x", "64", "Q8_0", "8.5"]
        run = CliRunner().invoke(cli, ["verify", str(path)], catch_exceptions=False)
        assert run.exit_code == 0
        assert "other tensors read back as finite, well-formed values" in run.output
        run = CliRunner().invoke(cli, ["dequantize", str(path), str(tmp_path / "out")], catch_exceptions=False)
        assert run.exit_code == 0
        assert "no tokenizer was written" in run.output
        directory = str(converted["llama"].directory)
        run = CliRunner().invoke(cli, ["dequantize", directory, str(tmp_path / "x"), "--original", directory])
        assert run.exit_code == 2
        part = rewrite("llama", metadata={"split.count": 3, "split.no": 1})
        for command in (["verify", str(part)], ["eval", directory, str(part)], ["dequantize", str(part), "out"]):
            run = CliRunner().invoke(cli, command)
            assert run.exit_code == 1
            assert "part 2 of 3 of a split model" in run.output
        (tmp_path / "noise.gguf").write_bytes(b"nothing")
        run = CliRunner().invoke(cli, ["verify", str(tmp_path / "noise.gguf")])
        assert run.exit_code == 1
        assert "begin with 'GGUF'" in run.output

    def test_the_format_knows_its_files(self, rewrite: Rewrite, converted: Any) -> None:
        path = rewrite("llama", kind="Q8_0", metadata={RUN_KEY: "r", SPANS_KEY: "3:"})
        format_ = require_format(path)
        model = format_.open(path)
        assert format_.name == model.format == "gguf"
        assert (model.path, model.directory) == (path, path.parent)
        assert (format_.run_of(path), model.calibration_spans, model.matrix_dtype) == ("r", "3:", None)
        assert format_.open(converted["llama"].file).matrix_dtype == "float32"
        matrices = {x.name.removesuffix(".weight") for x in model.header.tensors.values() if len(x.shape) == 2}
        assert model.stored_bpw() == dict.fromkeys(matrices, 8.5)
        assert next(iter(model.stored_bpw())) == "token_embd"
        assert list(model.stored_bpw())[-1] == "output"
        assert format_.output_name("org/L-1B", 4.5, None) == "L-1B-4.5bpw.gguf"

    def test_architecture_that_is_not_known(self, rewrite: Rewrite) -> None:
        found = verify_gguf(rewrite("gradient", metadata={"general.architecture": "gpt2"}))
        assert found.warnings == ("architecture 'gpt2' is not known: names and shapes were not checked",)
        assert (found.quantized, found.others, found.facts) == (0, 21, ("types: 21 F32",))
        assert found.bpw == 32


class TestNames:
    @pytest.mark.parametrize("name", ALL)
    def test_there_and_back(self, converted: Any, name: str) -> None:
        for tensor in GgufModel.open(converted[name].file).header.tensors:
            ours = hf_name(tensor)
            assert (ours is None) == (tensor == "rope_freqs.weight")
            assert ours is None or gguf_name(ours) == tensor

    @pytest.mark.parametrize("name", ["blk.0.x.weight", "blk.00.attn_q.weight", "attn_q.weight", "output", ""])
    def test_unknown(self, name: str) -> None:
        assert hf_name(name) is None

    def test_order_by_hand(self) -> None:
        config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
        llama = architecture_of("llama")
        order = row_order("model.layers.0.self_attn.q_proj.bias", llama, config)
        assert order is not None
        assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
        order = row_order("model.layers.0.self_attn.k_proj.weight", llama, config)
        assert order is not None
        assert order.tolist() == [0, 2, 1, 3]
        assert row_order("model.layers.0.self_attn.v_proj.weight", llama, config) is None
        assert row_order("model.layers.0.self_attn.q_proj.weight", architecture_of("qwen3"), config) is None
