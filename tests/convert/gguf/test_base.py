from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.gguf.file.emit import Planned, entry, header_bytes, padding
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.convert.gguf.llama_cpp import converter
from bpwise.convert.gguf.llama_cpp.check import check_base
from bpwise.convert.gguf.llama_cpp.converter import (
    COMPLETED,
    RAW,
    base_type,
    converter_digest,
    find_converter,
    make_base,
)
from bpwise.errors import BpwiseError, CheckpointError, FormatError, VerificationError, WorkDirectoryError
from safetensors.torch import save_file

from ...conftest import llama_cpp_dir

MakeCheckpoint = Callable[..., Checkpoint]

# Stands in for llama.cpp's converter: notes what it was given, and writes what the test asks for.
FAKE = """
import json, os, sys
from pathlib import Path
model, out = Path(sys.argv[-1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
paths = [path for path in model.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
files = {path.relative_to(model).as_posix(): path.read_text(errors="replace") for path in paths}
shards = {path.name: path.stat().st_size for path in model.iterdir() if path.suffix == ".safetensors"}
seen = {"argv": sys.argv, "files": files, "shards": shards, "name": model.name, "env": dict(os.environ)}
(Path(__file__).parent / "seen.json").write_text(json.dumps(seen))
mode = (Path(__file__).parent / "mode").read_text()
if mode == "fail":
    print("INFO:hf-to-gguf:Loading", file=sys.stderr)
    print("Traceback (most recent call last):", file=sys.stderr)
    print("NotImplementedError: Architecture 'X' not supported!", file=sys.stderr)
    sys.exit(1)
if mode == "import":
    import tables_of_its_own
if mode == "killed":
    os.kill(os.getpid(), 9)
if mode == "differs":
    again = Path(__file__).parent / "again"
    said = "KeyError: 'second'" if again.exists() else "KeyError: 'first'"
    again.touch()
    sys.exit(said)
if mode == "full":
    out.write_bytes(bytes(4400))
    raise OSError("6144 requested and 4400 written")
if mode == "stuck":
    import time
    (Path(__file__).parent / "process").write_text(str(os.getpid()))
    time.sleep(600)
if mode == "garbage":
    out.write_bytes(b"not a model")
if mode == "good":
    out.write_bytes((Path(__file__).parent / "good.gguf").read_bytes())
"""
PACKAGE = """
class ModelBase:
    load_hparams = None
def get_model_class(name):
    return None
"""


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    def build(dtype: torch.dtype = torch.bfloat16, *, shards: int = 1, **config: Any) -> Checkpoint:
        directory = tmp_path / "some-model"
        directory.mkdir()
        settings = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.C"}, "max_position_embeddings": 128}
        (directory / "config.json").write_text(json.dumps(settings | config))
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"x": [{"auto_map": {"AutoTokenizer": ["org/repo--evil.T", None]}}], "chat_template": "{{ m }}"})
        )
        (directory / "tokenizer.json").write_text("{}")
        (directory / "evil.py").write_text("raise SystemExit('code of the model ran')")
        (directory / "pytorch_model.bin").write_bytes(b"pickle")
        tensors = {"a.weight": torch.ones(4, 8, dtype=dtype), "norm.weight": torch.ones(8)}
        if shards == 1:
            save_file(tensors, directory / "weights.safetensors")
        else:
            names = [f"part-{number}.safetensors" for number in range(2)]
            for name, (key, value) in zip(names, tensors.items(), strict=True):
                save_file({key: value}, directory / name)
            index = {"weight_map": dict(zip(tensors, names, strict=True))}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return Checkpoint.open(directory)

    return build


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    directory = tmp_path / "llama.cpp"
    directory.mkdir()
    (directory / "convert_hf_to_gguf.py").write_text(FAKE)
    (directory / "conversion").mkdir()
    (directory / "conversion" / "__init__.py").write_text(PACKAGE)
    (directory / "mode").write_text("good")
    write_gguf_file(directory / "good.gguf", {})
    return directory


def write_gguf_file(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    entries = {"general.architecture": "llama", "llama.context_length": 128} | metadata
    arrays = tensors or {"a.weight": np.ones((4, 8), np.float32), "norm.weight": np.ones(8, np.float32)}
    planned = [Planned(name, TYPES["F32"], array.shape) for name, array in arrays.items()]
    data = header_bytes({key: entry(value) for key, value in entries.items()}, planned, 32)
    for array in arrays.values():
        data += array.astype("<f4").tobytes() + bytes(padding(4 * array.size, 32))
    path.write_bytes(data)
    return path


def has_ended(process: int) -> bool:
    for _ in range(600):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if "Z" in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]:
            return True  # it has ended, and nobody has asked how
        time.sleep(0.05)
    return False


class TestConverting:
    def test_the_converter_sees_no_code(self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path) -> None:
        make_base(make_checkpoint(), tmp_path / "out" / "base.gguf", llama_cpp=fake)
        seen = json.loads((fake / "seen.json").read_text())
        assert set(seen["files"]) == {"config.json", "tokenizer_config.json", "tokenizer.json"}
        config = json.loads(seen["files"]["config.json"])
        assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 128)
        assert "auto_map" not in config
        assert json.loads(seen["files"]["tokenizer_config.json"]) == {"x": [{}], "chat_template": "{{ m }}"}
        assert seen["name"] == "some-model"
        assert list(seen["shards"]) == ["model.safetensors"]
        assert seen["argv"][1:3] == ["--outtype", "bf16"]
        assert seen["env"]["HF_HUB_OFFLINE"] == "1"
        # Nothing private stays behind.
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["base.gguf"]

    def test_the_converter_sees_all_side_files(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint()
        seen_plainly = {
            "chat_template.jinja": "{{ a }}",
            "additional_chat_templates/tool_use.jinja": "{{ b }}",
            "tekken.json": "{}",
            "README.md": "A card.",
        }
        for name, text in seen_plainly.items():
            (checkpoint.directory / name).parent.mkdir(exist_ok=True)
            (checkpoint.directory / name).write_text(text)
        processor = {"auto_map": {"AutoProcessor": "evil.P"}, "size": 3}
        (checkpoint.directory / "processor_config.json").write_text(json.dumps(processor))
        make_base(checkpoint, tmp_path / "base.gguf", llama_cpp=fake)
        files = json.loads((fake / "seen.json").read_text())["files"]
        assert {name: files[name] for name in seen_plainly} == seen_plainly
        assert json.loads(files["processor_config.json"]) == {"size": 3}

    def test_shards(self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path) -> None:
        make_base(make_checkpoint(shards=2), tmp_path / "base.gguf", llama_cpp=fake)
        shards = json.loads((fake / "seen.json").read_text())["shards"]
        assert sorted(shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

    @pytest.mark.parametrize(
        ("mode", "error", "message"),
        [
            (
                "fail",
                CheckpointError,
                r"some-model: llama.cpp's converter failed on this model of type 'llama' \(NotImplementedError: "
                r"Architecture 'X' not supported!\)\. Look",
            ),
            (
                "differs",
                CheckpointError,
                r"\(KeyError: 'first', with config\.json as it is; KeyError: 'second', with config\.json as "
                r"Transformers completes it\)",
            ),
            ("killed", CheckpointError, r"\(ended by signal 9, as where memory is short\)"),
            ("nothing", CheckpointError, r"failed on this model of type 'llama' \(it said nothing\)"),
            ("garbage", FormatError, "GGUF"),
        ],
        ids=["fails", "fails-otherwise", "killed", "writes-nothing", "writes-garbage"],
    )
    def test_failures_leave_nothing(
        self,
        mode: str,
        error: type[Exception],
        message: str,
        make_checkpoint: MakeCheckpoint,
        fake: Path,
        tmp_path: Path,
    ) -> None:
        (fake / "mode").write_text(mode)
        with pytest.raises(error, match=message):
            make_base(make_checkpoint(), tmp_path / "out" / "base.gguf", llama_cpp=fake)
        assert not list((tmp_path / "out").iterdir())

    def test_a_converter_that_is_not_whole(self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path) -> None:
        # The model is not to blame, so nobody is sent to look whether llama.cpp supports it.
        (fake / "mode").write_text("import")
        checkpoint = make_checkpoint()
        with pytest.raises(
            BpwiseError, match=r"lacks something of its own .*'tables_of_its_own'.*pip install"
        ) as caught:
            make_base(checkpoint, tmp_path / "out" / "base.gguf", llama_cpp=fake)
        assert str(caught.value).startswith(f"{fake}: ")
        assert "supports this model" not in str(caught.value)
        # Modules beside it are found, as by any script.
        (fake / "tables_of_its_own.py").write_text("")
        with pytest.raises(CheckpointError, match="converter failed"):
            make_base(checkpoint, tmp_path / "out" / "base.gguf", llama_cpp=fake)

    def test_a_disk_that_is_full_for_the_converter(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path
    ) -> None:
        resource = pytest.importorskip("resource")
        (fake / "mode").write_text("full")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(WorkDirectoryError, match=r"base\.gguf: not written, the disk is full"):
                make_base(make_checkpoint(), tmp_path / "out" / "base.gguf", llama_cpp=fake)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list((tmp_path / "out").iterdir())

    def test_a_converter_that_is_stuck_is_stopped(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (fake / "mode").write_text("stuck")
        monkeypatch.setattr(converter, "_LEAST_SECONDS", 5.0)
        with pytest.raises(
            CheckpointError, match=r"converter has not ended within 5 s, and was stopped\. Look whether"
        ):
            make_base(make_checkpoint(), tmp_path / "out" / "base.gguf", llama_cpp=fake)
        assert list((tmp_path / "out").iterdir()) == []
        assert has_ended(int((fake / "process").read_text()))

    @pytest.mark.skipif(os.name == "nt", reason="asks for a process as POSIX does")
    def test_the_converter_ends_when_its_parent_is_killed(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path
    ) -> None:
        (fake / "mode").write_text("stuck")
        code = """
import sys
from pathlib import Path
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.gguf.llama_cpp.converter import make_base
make_base(open_model(sys.argv[1]), Path(sys.argv[2]), llama_cpp=Path(sys.argv[3]))
"""
        places = [str(make_checkpoint().directory), str(tmp_path / "base.gguf"), str(fake)]
        with subprocess.Popen([sys.executable, "-c", code, *places]) as parent:
            while not (fake / "process").exists() or not (fake / "process").read_text():
                assert parent.poll() is None
                time.sleep(0.05)
            parent.kill()
        assert has_ended(int((fake / "process").read_text()))

    def test_the_digest_is_of_the_sources(self, fake: Path, tmp_path: Path) -> None:
        constants = fake / "gguf-py" / "gguf" / "constants.py"
        constants.parent.mkdir(parents=True)
        constants.write_text("A = 1")
        first = converter_digest(fake)
        shutil.copytree(fake, tmp_path / "elsewhere")
        (fake / "README.md").write_text("")
        assert first == converter_digest(fake) == converter_digest(tmp_path / "elsewhere")
        constants.write_text("A = 2")
        assert converter_digest(fake) != first

    def test_files_that_lead_outside_are_refused(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint()
        (tmp_path / "secret").write_text("{}")
        (checkpoint.directory / "tokenizer.json").unlink()
        (checkpoint.directory / "tokenizer.json").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="leads outside"):
            make_base(checkpoint, tmp_path / "base.gguf", llama_cpp=fake)

    def test_a_missing_converter_says_what_to_give(self, tmp_path: Path) -> None:
        with pytest.raises(BpwiseError, match=r"nowhere: llama\.cpp's converter is not there.*checkout.*--llama-cpp"):
            find_converter(tmp_path / "nowhere")

    def test_a_file_that_is_refused_is_made_in_the_other_way(
        self, make_checkpoint: MakeCheckpoint, fake: Path, tmp_path: Path
    ) -> None:
        def check(path: Path) -> None:
            checked.append(path.read_bytes())
            if len(checked) < 2:
                raise VerificationError("the file: wrong. Try again.")

        checkpoint, output, checked = make_checkpoint(), tmp_path / "base.gguf", list[bytes]()
        assert make_base(checkpoint, output, llama_cpp=fake, check=check) == COMPLETED
        assert checked == [output.read_bytes()] * 2
        checked.clear()
        output.unlink()
        with pytest.raises(VerificationError, match="wrong"):
            make_base(checkpoint, output, llama_cpp=fake, check=check, configs=(RAW,))
        assert not output.exists()

    @pytest.mark.parametrize(
        ("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")]
    )
    def test_the_base_loses_nothing(self, dtype: torch.dtype, expected: str, make_checkpoint: MakeCheckpoint) -> None:
        assert base_type(make_checkpoint(dtype)) == expected


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "long_factor": [2.0] * 64, "short_factor": [1.0] * 64}


def llama3_factors(head_dim: int) -> np.ndarray:
    """Transformers' own frequencies: the factors are the plain ones over these."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=LLAMA3)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / frequencies).numpy()


class TestChecking:
    def check(self, tmp_path: Path, checkpoint: Checkpoint, metadata: dict[str, Any], **tensors: Any) -> list[str]:
        known = {"tokenizer.chat_template": "{{ m }}"} | metadata
        return check_base(write_gguf_file(tmp_path / "base.gguf", known, tensors.get("tensors")), checkpoint)

    def test_a_good_file(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(rope_theta=3580165449.0, bos_token_id=1, eos_token_id=[2, 3])
        metadata = {"llama.rope.freq_base": 3580165449.0}
        metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 3}
        assert self.check(tmp_path, checkpoint, metadata) == []

    @pytest.mark.parametrize(
        ("config", "metadata", "message"),
        [
            ({"rope_theta": 5e5}, {}, "wrong rope.freq_base. Got None. Expected 500000"),
            ({"rope_parameters": {"rope_theta": 5e5}}, {"llama.rope.freq_base": 1e4}, "wrong rope.freq_base"),
            ({}, {"tokenizer.ggml.tokens": ["a"]}, "wrong number of tokens. Got 1. Expected 4 from token_embd.weight"),
            ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}, "wrong rope.scaling.type. Got None"),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
                {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
                "wrong rope.scaling.original_context_length",
            ),
            ({"rope_parameters": LLAMA3}, {"llama.rope.freq_base": 5e5}, "wrong rope_freqs.*. Got no such tensor"),
            ({"rope_scaling": LONGROPE}, {"llama.rope.scaling.type": "longrope"}, "tensors of factors"),
            ({}, {"llama.rope.scaling.type": "linear"}, "wrong rope.scaling.type. Got linear. Expected none"),
        ],
        ids=["base-missing", "base", "vocabulary", "linear", "yarn", "llama3", "longrope", "unasked"],
    )
    def test_wrong_files(
        self,
        config: dict[str, Any],
        metadata: dict[str, Any],
        message: str,
        make_checkpoint: MakeCheckpoint,
        tmp_path: Path,
    ) -> None:
        tensors = {"token_embd.weight": np.ones((4, 8)), "norm.weight": np.ones(8)}
        with pytest.raises(VerificationError, match=message):
            self.check(tmp_path, make_checkpoint(**config), metadata, tensors=tensors)

    def test_llama3_factors(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(rope_parameters=LLAMA3)
        factors = llama3_factors(64)
        tensors = {"a.weight": np.ones((4, 8)), "norm.weight": np.ones(8), "rope_freqs.weight": factors}
        metadata = {"llama.rope.freq_base": 5e5}
        assert self.check(tmp_path, checkpoint, metadata, tensors=tensors) == []
        assert factors.max() == pytest.approx(32)
        tensors["rope_freqs.weight"] = np.ones(32)
        with pytest.raises(VerificationError, match="wrong rope_freqs"):
            self.check(tmp_path, checkpoint, metadata, tensors=tensors)

    def test_scalings_that_are_right(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        metadata = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        metadata |= {"llama.rope.scaling.original_context_length": 32}
        assert self.check(tmp_path, make_checkpoint(rope_scaling=rope), metadata) == []

    def test_other_losses_are_said(self, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(bos_token_id=1, eos_token_id=2)
        metadata = {"tokenizer.ggml.bos_token_id": 5, "llama.context_length": 64}
        path = write_gguf_file(tmp_path / "base.gguf", metadata, {"a": np.ones((2, 2))})
        context, bos, eos, template, size = check_base(path, checkpoint)
        assert "context length is 64, config.json has 128" in context
        assert "BOS token is 5, config.json has 1" in bos
        assert "EOS token is None" in eos
        assert "chat template" in template
        assert "has 4 weights, the model has 40" in size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rope", "head_dim"), [(None, 16), (LLAMA3, 16), ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 8)]
)
def test_the_real_converter(rope: dict[str, Any] | None, head_dim: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama_cpp_dir()
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra gguf")
    directory = tmp_path / "model"
    sizes = {"hidden_size": 4 * head_dim, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": head_dim}
    config = LlamaConfig(**sizes, **options, rope_parameters=rope or {"rope_type": "default", "rope_theta": 3.5e9})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn a small vocabulary from"] * 20),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    checkpoint = Checkpoint.open(directory)
    make_base(checkpoint, tmp_path / "base.gguf")
    assert check_base(tmp_path / "base.gguf", checkpoint) == []
    header = read_gguf_header(tmp_path / "base.gguf")
    assert header.tensors["blk.1.ffn_down.weight"].type.name == "BF16"
    assert ("rope_freqs.weight" in header.tensors) == (rope is LLAMA3)
