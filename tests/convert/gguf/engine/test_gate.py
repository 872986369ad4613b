"""Bases in llama.cpp beside their originals in Transformers: what passes, what is told, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.views import CheckpointView
from bpwise.convert.gguf.engine import gate as gate_module
from bpwise.convert.gguf.engine.first_blocks import FirstBlocks, period
from bpwise.convert.gguf.engine.gate import Gate, gate_base, gate_once
from bpwise.convert.gguf.engine.library import load_library
from bpwise.convert.gguf.engine.reference import transformers_logits
from bpwise.convert.gguf.engine.widened import float32_bytes, is_float32, write_float32
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.options import GgufOptions
from bpwise.errors import CheckpointError, ConfigError, VerificationError, WorkDirectoryError
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ....quantize.runs import arguments
from .conftest import FAMILIES, Families, Family

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
pytest.importorskip("xllamacpp", reason="the engine is not installed: pip install '.[engine]'")

SAME = 1e-6
"""Nats per token: float32 on both sides makes some 1e-8 of such models, what is computed otherwise 1e-4 and more."""


@pytest.fixture(scope="module")
def families(convert_families: Callable[[list[str]], Families]) -> Families:
    return convert_families(["gpt_oss", "gpt_oss-truncated", "qwen3_next"])


@pytest.fixture
def only_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as a large one."""
    monkeypatch.setattr(gate_module, "_SMALL_BYTES", 0)


def gate(family: Any, work: Path) -> Gate:
    return gate_base(family.file, Checkpoint.open(family.directory), work)


class TestOutcomes:
    @pytest.mark.parametrize("name", ["llama", "llama3", "yarn", "qwen3"])
    def test_what_the_converter_makes_passes(self, converted: Any, name: str, tmp_path: Path) -> None:
        found = gate(converted[name], tmp_path)
        assert found.passed and not found.refused
        assert found.kl_nats is not None and abs(found.kl_nats) < SAME
        assert (found.tokens, found.cut_blocks, found.notes) == (192, None, ())
        found.require()
        assert not list(tmp_path.iterdir())

    def test_a_base_in_16_bits_is_judged_by_its_weights(self, families: Families, tmp_path: Path) -> None:
        family = families["qwen3_next"]
        found = gate(family, tmp_path)
        assert found.kl_nats is not None and abs(found.kl_nats) < SAME
        # As it stands llama.cpp rounds what meets its matrices.
        tokens = torch.randint(259, (1, 96), generator=torch.Generator().manual_seed(0))
        with load_library().model(family.file, row_tokens=96, threads=1) as model:
            got = torch.cat(list(model.logits(tokens[0]))).double().log_softmax(-1)
        expected = transformers_logits(Checkpoint.open(family.directory), tokens)[0].double().log_softmax(-1)
        assert float((expected.exp() * (expected - got)).sum(-1).mean()) > 100 * abs(found.kl_nats)

    def test_what_is_known_to_differ_is_told_with_its_reason(self, families: Families, tmp_path: Path) -> None:
        found = gate(families["gpt_oss"], tmp_path)
        assert found.kl_nats is not None and 1e-4 < found.kl_nats < 0.5
        assert not found.passed and not found.refused
        assert "truncate: false" in found.notes[0]
        assert "e-0" in found.sentence
        # With the one setting that llama.cpp knows the same model is the same in both.
        assert gate(families["gpt_oss-truncated"], tmp_path).passed

    def test_another_model_is_refused(self, converted: Any, tmp_path: Path) -> None:
        found = gate(Family(converted["llama"].directory, converted["gradient"].file), tmp_path)
        assert found.refused and not found.passed
        with pytest.raises(
            VerificationError, match=r"gradient\.gguf: llama\.cpp runs another model .* less than 0\.05"
        ):
            found.require()

    def test_a_base_that_llama_cpp_aborts_on_is_refused(self, converted: Any, tmp_path: Path) -> None:
        found = gate(Family(converted["llama"].directory, aborting(converted["llama"].file, tmp_path)), tmp_path)
        assert found.refused and found.kl_nats is None
        with pytest.raises(VerificationError, match=r"x\.gguf: llama\.cpp aborted while .*GGML_ASSERT"):
            found.require()

    def test_without_the_engine_the_report_says_so(
        self, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> None:
            raise ConfigError("llama.cpp: the Python package xllamacpp is not installed. Install it.")

        monkeypatch.setattr(gate_module, "load_library", missing)
        found = gate(converted["llama"], tmp_path)
        assert found.notes == (
            "The base in llama.cpp: not compared with Transformers: llama.cpp is not installed as an engine "
            "(pip install '.[engine]' in the folder of bpwise's source).",
        )
        found.require()

    def test_what_transformers_cannot_run_is_not_compared(self, converted: Any, tmp_path: Path) -> None:
        class Unknown(CheckpointView):
            @property
            def config(self) -> dict[str, Any]:
                return {"model_type": "unheard_of"}

        found = gate_base(converted["llama"].file, Unknown(Checkpoint.open(converted["llama"].directory)), tmp_path)
        assert found.kl_nats is None and not found.refused
        assert "'unheard_of'" in found.notes[0]


class TestRuns:
    def test_refused_before_anything_else(self, converted: Any, tmp_path: Path) -> None:
        config = QuantizeConfig(
            options=GgufOptions(mixture="Q8_0", base=aborting(converted["llama"].file, tmp_path)), evaluate=None
        )
        with pytest.raises(VerificationError, match="aborted"):
            quantize_model(converted["llama"].directory, tmp_path / "out.gguf", **arguments(config))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf"]

    def test_kept_until_something_changes(
        self, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint, kept = Checkpoint.open(converted["llama"].directory), tmp_path / "gate.json"
        first = gate_once(converted["llama"].file, checkpoint, tmp_path, kept=kept)
        assert json.loads(kept.read_text())["kl_nats"] == first.kl_nats
        monkeypatch.setattr(gate_module, "gate_base", lambda *_: Gate(reason="again"))
        assert gate_once(converted["llama"].file, checkpoint, tmp_path, kept=kept) == first
        assert gate_once(converted["gradient"].file, checkpoint, tmp_path, kept=kept).reason == "again"
        assert gate_once(converted["llama"].file, checkpoint, tmp_path, kept=None).reason == "again"

        kept.write_text(json.dumps({**json.loads(kept.read_text()), "kl_nats": "1"}))
        with pytest.raises(WorkDirectoryError, match="kl_nats: not a valid value"):
            gate_once(converted["llama"].file, checkpoint, tmp_path, kept=kept)


@pytest.mark.usefixtures("only_cuts")
class TestLargeModels:
    def test_pass_on_their_first_blocks(self, families: Families, tmp_path: Path) -> None:
        found = gate(families["gpt_oss-truncated"], tmp_path)
        assert found.cut_blocks == 2 and found.passed
        assert "of its first 2 blocks" in found.sentence
        assert not list(tmp_path.iterdir())

    def test_of_one_period_are_compared_whole(self, families: Families, tmp_path: Path) -> None:
        found = gate(families["qwen3_next"], tmp_path)
        assert found.cut_blocks is None and found.passed

    def test_too_large_for_the_machine_are_not_compared(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gate_module, "_MOST_BYTES", 1 << 20)
        found = gate(families["gpt_oss"], tmp_path)
        assert found.kl_nats is None and not found.refused
        assert "too large to be compared" in found.notes[0]

    def test_a_cut_that_llama_cpp_does_not_run_says_nothing_of_the_whole(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gate_module, "write_float32", lambda header, output, _: output.write_bytes(b"GGUF"))
        found = gate(families["gpt_oss"], tmp_path)
        assert not found.refused
        assert f"{families['gpt_oss'].file} in float32: llama.cpp cannot load it" in found.notes[0]


class TestFirstBlocks:
    @pytest.mark.parametrize(
        ("config", "dense", "expected"),
        [
            ({"model_type": "llama", "num_hidden_layers": 32}, 0, 2),
            ({"model_type": "gemma2", "num_hidden_layers": 26}, 0, 2),
            ({"model_type": "gemma3_text", "num_hidden_layers": 26}, 0, 6),
            ({"model_type": "gpt_oss", "num_hidden_layers": 24}, 0, 2),
            ({"model_type": "qwen3_next", "num_hidden_layers": 48}, 0, 4),
            ({"model_type": "smollm3", "num_hidden_layers": 36}, 0, 4),
            ({"model_type": "deepseek_v3", "num_hidden_layers": 61}, 3, 4),
            ({"model_type": "lfm2", "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}, 0, 3),
            ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 34}}, 0, 6),
        ],
        ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
    )
    def test_period(self, config: dict[str, Any], dense: int, expected: int) -> None:
        count = config.get("text_config", config)["num_hidden_layers"]
        checkpoint: Any = SimpleNamespace(config=config, directory=Path("model"))
        assert period(checkpoint, [index < dense for index in range(count)]) == expected

    @pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
    def test_computes_what_the_model_would_without_its_later_blocks(self, families: Families, name: str) -> None:
        tokens = torch.randint(259, (2, 40), generator=torch.Generator().manual_seed(1))
        whole = AutoModelForCausalLM.from_pretrained(
            families[name].directory, dtype=torch.float32, attn_implementation="eager"
        )
        whole.model.layers = whole.model.layers[:2]
        whole.model.config.num_hidden_layers = 2
        with torch.no_grad():
            expected = whole(input_ids=tokens, use_cache=False).logits
        cut = FirstBlocks(Checkpoint.open(families[name].directory), 2)
        assert not [tensor for tensor in cut.names if ".layers.2." in tensor]
        assert torch.equal(transformers_logits(cut, tokens), expected)

    def test_lists_of_blocks_are_as_long_in_all_parts(self, save_model: Any, tmp_path: Path) -> None:
        directory = save_model(tmp_path / "model", num_hidden_layers=4)
        config = json.loads((directory / "config.json").read_text())
        text = {**config, "layer_types": list("abcd"), "mlp_only_layers": [0, 3, 9], "hybrid_override_pattern": "M*-E"}
        text |= {"num_kv_shared_layers": 3, "per_layer_config": {"1": "x", "3": "y"}}
        for whole in (text, {"model_type": "llama", "text_config": text}):
            base = Checkpoint(directory, config, Checkpoint.open(directory)._shards)
            cut = FirstBlocks(base, 2)
            base._config = whole
            found = cut.config.get("text_config", cut.config)
            assert found["layer_types"] == ["a", "b"]
            assert found["mlp_only_layers"] == [0, 3, 9]
            assert found["hybrid_override_pattern"] == "M*"
            assert found["num_hidden_layers"] == 2
            assert found["num_kv_shared_layers"] == 1
            assert found["per_layer_config"] == {"1": "x"}

    def test_a_tensor_that_is_missing_is_an_error(self, converted: Any) -> None:
        class Lacking(CheckpointView):
            @property
            def names(self) -> frozenset[str]:
                return self._base.names - {"model.norm.weight"}

        with pytest.raises(CheckpointError, match=r"nothing is stored for model\.norm\.weight"):
            transformers_logits(
                Lacking(Checkpoint.open(converted["qwen3"].directory)), torch.zeros(1, 2, dtype=torch.int64)
            )


class TestCopies:
    def test_are_the_same_values_in_float32(self, families: Families, tmp_path: Path) -> None:
        header = read_gguf_header(families["gpt_oss"].file)
        assert not is_float32(header)
        for blocks in (None, 2):
            write_float32(header, tmp_path / "x.gguf", blocks)
            copy, original = gguf.GGUFReader(tmp_path / "x.gguf"), gguf.GGUFReader(header.path)
            stored = {tensor.name: tensor for tensor in original.tensors}
            kept = [name for name in stored if blocks is None or not name.startswith(("blk.2.", "blk.3."))]
            assert [tensor.name for tensor in copy.tensors] == kept
            for tensor in copy.tensors:
                assert tensor.data.dtype == np.float32
                assert np.array_equal(tensor.data, widened(stored[tensor.name]).numpy())
            assert copy.fields["gpt-oss.block_count"].contents() == (blocks or 4)
            assert is_float32(read_gguf_header(tmp_path / "x.gguf"))
            assert float32_bytes(header, blocks) == sum(tensor.data.nbytes for tensor in copy.tensors)

    def test_what_metadata_says_of_blocks_is_cut(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "toy")
        writer.add_block_count(5)
        writer.add_uint32("toy.nextn_predict_layers", 1)
        writer.add_uint32("toy.attention.shared_kv_layers", 4)
        writer.add_array("toy.attention.head_count_kv", [1, 2, 3, 4, 5])
        writer.add_array("toy.flags", [True, False, True, False, True])
        writer.add_array("toy.other", [1, 2, 3])
        writer.add_array("tokenizer.ggml.scores", [0.0] * 5)
        table = np.arange(4 * 10, dtype=np.float16).reshape(4, 10)
        writer.add_tensor("per_layer_token_embd.weight", table)
        writer.add_tensor("per_layer_model_proj.weight", table.T.copy())
        writer.add_tensor("blk.1.ids", np.arange(6, dtype=np.int32))
        writer.add_tensor("blk.2.ids", np.arange(6, dtype=np.int32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_float32(read_gguf_header(tmp_path / "x.gguf"), tmp_path / "y.gguf", 2)
        copy = gguf.GGUFReader(tmp_path / "y.gguf")
        said = {key: field.contents() for key, field in copy.fields.items()}
        assert said["toy.block_count"] == 2
        assert said["toy.nextn_predict_layers"] == 0
        assert said["toy.attention.shared_kv_layers"] == 1
        assert said["toy.attention.head_count_kv"] == [1, 2]
        assert said["toy.flags"] == [True, False]
        assert said["toy.other"] == [1, 2, 3]
        assert len(said["tokenizer.ggml.scores"]) == 5
        found = {tensor.name: tensor.data for tensor in copy.tensors}
        assert np.array_equal(found["per_layer_token_embd.weight"], table[:, :4])
        assert np.array_equal(found["per_layer_model_proj.weight"], table.T[:4])
        assert found["blk.1.ids"].tolist() == list(range(6))
        assert "blk.2.ids" not in found


@pytest.mark.slow
def test_every_family_passes_whole_and_cut(
    convert_families: Callable[[list[str]], Families], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, family in convert_families([name for name in FAMILIES if name != "gpt_oss"]).items():
        for small_bytes in (1 << 30, 0):
            monkeypatch.setattr(gate_module, "_SMALL_BYTES", small_bytes)
            found = gate(family, tmp_path)
            assert found.kl_nats is not None and abs(found.kl_nats) < SAME, f"{name}: {found.sentence}"


def aborting(file: Path, folder: Path) -> Path:
    """A file with more blocks than llama.cpp counts to, which ends its process."""
    data = bytearray(file.read_bytes())
    key = b"llama.block_count"
    place = data.index(key) + len(key) + 4  # behind the key stands the value's type
    data[place : place + 4] = (600).to_bytes(4, "little")
    (folder / "x.gguf").write_bytes(data)
    return folder / "x.gguf"


def widened(tensor: Any) -> Tensor:
    data = torch.from_numpy(np.array(tensor.data))
    return data.view(torch.bfloat16).float() if tensor.tensor_type.name == "BF16" else data.float()
