"""Writing, reading, verifying and decoding whole models, on a random Llama of two layers."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.file.describe import stored_sizes
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.file.tensors import is_exl2
from bpwise.convert.exl2.file.verify import verify_exl2
from bpwise.convert.exl2.file.writer import write_model
from bpwise.convert.model import QuantizedModel, Verification
from bpwise.convert.opening import open_any, verify_model
from bpwise.convert.registry import require_format
from bpwise.errors import (
    CheckpointError,
    FormatError,
    ShapeError,
    UnsupportedModelError,
    VerificationError,
    WorkDirectoryError,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

Linears = dict[str, Callable[[], QuantizedLinear]]
Write = Callable[..., tuple[Path, Linears, Verification]]

DOWN = "model.layers.0.mlp.down_proj"
KEYS = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def write(
    tmp_path: Path,
    make_llama: Callable[..., Path],
    llama_linears: Callable[..., Linears],
    quantization: dict[str, Any],
) -> Write:
    def build(
        *, head: bool = True, reorder: bool = True, shard_bytes: int = 1 << 30, **model: Any
    ) -> tuple[Path, Linears, Verification]:
        source = Checkpoint.open(make_llama(**model))
        linears = llama_linears(head=head, reorder=reorder)
        out = tmp_path / "out"
        result = write_model(
            source,
            linears,
            out,
            quantization=quantization,
            provenance={"seed": 7},
            shard_bytes=shard_bytes,
        )
        return out, linears, result

    return build


def _rewrite(out: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(out / "output.safetensors")
    change(tensors)
    save_file(tensors, out / "output.safetensors")


def _edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.pop("sha256", None)
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("biases", [False, True], ids=["no-bias", "biases"])
@pytest.mark.parametrize("head", [False, True], ids=["dense-head", "quantized-head"])
def test_writes_what_transformers_then_loads(
    tied: bool, biases: bool, head: bool, write: Write, tmp_path: Path
) -> None:
    out, linears, result = write(tied=tied, biases=biases, head=head, reorder=not biases)
    source = load_file(tmp_path / "llama" / "model.safetensors")
    assert result == verify_exl2(out)
    assert result.compared and result.quantized == len(linears)
    assert is_exl2(out) and not is_exl2(tmp_path / "llama")

    dequantize_model(out, tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    state = model.state_dict()
    assert model.dtype == torch.float16
    expected = {name: tensor.half() for name, tensor in source.items()}
    expected.update({f"{name}.weight": make().dequantize() for name, make in linears.items()})
    if tied and not head:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert model.config.tie_word_embeddings == (tied and not head)
    assert model.config.rope_parameters["rope_theta"] == 5000.0


def test_side_files_go_on_to_the_dense_model(write: Write, tmp_path: Path) -> None:
    out, _, _ = write()
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "rag.jinja").write_text("{{ rag }}")
    dequantize_model(out, tmp_path / "dense")
    assert (tmp_path / "dense" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ rag }}"
    assert (tmp_path / "dense" / "LICENSE.txt").read_text() == "as you like"
    assert not (tmp_path / "dense" / "bpwise.json").exists()


def test_a_disk_that_the_dense_model_does_not_fit_on(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = write(tied=False)
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    size = sum(2 * tensor.numel() for tensor in stored.values())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(WorkDirectoryError, match=f"will take {size} bytes, but its disk has {size - 1} free"):
        dequantize_model(out, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_directory_is_what_readers_expect(write: Write) -> None:
    out, _, result = write(biases=True, reorder=False)
    assert {path.name for path in out.iterdir()} == {
        "LICENSE.txt",
        "bpwise.json",
        "config.json",
        "output.safetensors",
        "tokenizer.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5000.0 and "rope_scaling" not in config
    assert config["torch_dtype"] == "float16" and "dtype" not in config
    assert config["quantization_config"] == {
        "quant_method": "exl2",
        "version": "0.3.2",
        "bits": 4.0,
        "head_bits": 7,
        "calibration": {"rows": 1, "length": 8, "dataset": "none"},
    }
    tensors = load_file(out / "output.safetensors")
    assert tensors[f"{KEYS}.bias"].shape == (64,) and tensors[f"{KEYS}.bias"].dtype == torch.float16
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert not any(name.endswith("_proj.weight") for name in tensors)
    assert json.loads((out / "bpwise.json").read_text())["provenance"] == {"seed": 7}
    assert result.file_bytes == (out / "output.safetensors").stat().st_size
    # The head: 64 rows, 128 stored columns for 100, 8 and 6 bits, two groups.
    head_bits = 32 * 128 * 14 + 2 * (48 + 4 * 128) + 64 * 32
    assert result.rates["head"] == pytest.approx(head_bits / 6400, rel=1e-12)
    per_layer = 96 * 64 + 2 * 48 * 64 + 64 * 96 + 3 * 96 * 64
    sizes = [size for name, size in stored_sizes(Exl2Model.open(out)).items() if name != "lm_head"]
    assert sum(weights for _, weights in sizes) == 2 * per_layer
    assert result.bpw == result.rates["decoder"] == sum(bits for bits, _ in sizes) / (2 * per_layer)


def test_tensors_are_aligned_and_in_model_order(write: Write) -> None:
    out, _, _ = write(tied=True)
    raw = (out / "output.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % 4 == 0 for name, entry in header.items() if entry.get("dtype") == "I32")
    place = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    names = ["model.embed_tokens.weight", f"{KEYS}.q_weight", f"{KEYS.replace('0', '1')}.q_weight"]
    names += ["model.norm.weight", "lm_head.q_weight"]
    assert sorted(names, key=place.__getitem__) == names


def test_unquantized_head_becomes_float16(write: Write) -> None:
    out, _, result = write(head=False)
    assert load_file(out / "output.safetensors")["lm_head.weight"].dtype == torch.float16
    assert result.rates["head"] == 16


def test_shards(write: Write, tmp_path: Path) -> None:
    out, _, result = write(shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and not list(out.glob("*.partial"))
    count = len(files)
    assert [path.name for path in files] == [f"output-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert max(path.stat().st_size for path in files) <= 40_000
    assert result.file_bytes == sum(path.stat().st_size for path in files)
    for path in files:
        with safe_open(path, "pt") as file:
            parts = {name.rpartition(".")[0] for name in file.keys() if ".q_" in name}  # noqa: SIM118
            for linear in parts:
                assert {f"{linear}.q_weight", f"{linear}.q_groups"} <= set(file.keys())

    dequantize_model(out, tmp_path / "dense", shard_bytes=20_000)
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert loaded.keys() == Exl2Model.open(out).names
    assert all(torch.equal(loaded[name], Exl2Model.open(out).tensor(name).half()) for name in loaded)


def test_reads_as_a_dense_source(write: Write) -> None:
    out, linears, _ = write(tied=True, biases=True, reorder=False)
    model = Exl2Model.open(out)
    assert model.linears == tuple(sorted(linears))
    assert all(name.endswith((".weight", ".bias")) for name in model.names)
    for name in model.names:
        assert model.shape(name) == tuple(model.tensor(name).shape)
    assert model.shape(f"{KEYS}.weight") == (48, 64) and model.shape(f"{KEYS}.bias") == (48,)
    assert model.tensor(f"{KEYS}.bias").shape == (48,)
    assert torch.equal(model.tensor(f"{KEYS}.weight"), linears[KEYS]().dequantize())
    assert model.linear(KEYS).groups == linears[KEYS]().groups
    # The file keeps the original's word; the decoded model is untied, for its head is quantized.
    assert model.stored_config["tie_word_embeddings"] is True
    assert model.tied_embeddings is False and model.config["tie_word_embeddings"] is False
    assert "quantization_config" not in model.config
    assert model.fingerprint == Exl2Model.open(out).fingerprint
    for read in (model.tensor, model.shape, model.linear):
        with pytest.raises(CheckpointError, match="nonsense"):
            read("nonsense")


def test_tied_without_head_stays_tied(write: Write) -> None:
    out, _, _ = write(tied=True, head=False)
    model = Exl2Model.open(out)
    assert model.tied_embeddings is True and "lm_head.weight" not in model.names


def test_agrees_with_the_naive_decoder(write: Write, naive_decode: Callable[..., Any]) -> None:
    out, _, _ = write()
    tensors = load_file(out / "output.safetensors")
    for name in (KEYS, "lm_head"):
        _, weight = naive_decode(name, tensors)
        decoded = Exl2Model.open(out).tensor(f"{name}.weight")
        assert torch.equal(decoded, torch.from_numpy(weight[: decoded.shape[0]]))


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
            1e6,
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},  # readers have no default
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **_LLAMA3}},
            5e5,
            {"rope_type": "llama3", **_LLAMA3},
        ),
        (
            {
                "rope_parameters": None,
                "rope_theta": 3e4,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0},
            },
            3e4,
            {"type": "linear", "factor": 2.0},
        ),
        (
            {"rope_parameters": None, "rope_theta": 3e4, "rope_scaling": {"rope_type": "default"}},
            3e4,
            None,
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            1e6,
            None,
        ),
    ],
    ids=["yarn", "llama3", "both-keys", "default", "by-layer-type"],
)
def test_rope_keys(rope: dict[str, Any], theta: float, scaling: dict[str, Any] | None, write: Write) -> None:
    out, _, _ = write(**rope)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == theta
    assert config.get("rope_scaling") == scaling


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(errno.ENOSPC, "No space left on device")])
def test_failure_leaves_nothing_behind(
    error: Exception,
    tmp_path: Path,
    make_llama: Callable[..., Path],
    llama_linears: Callable[..., Linears],
    quantization: dict[str, Any],
) -> None:
    linears = llama_linears()

    def fail() -> QuantizedLinear:
        raise error

    linears["model.layers.1.mlp.up_proj"] = fail
    before = {make_llama().name}
    expected = WorkDirectoryError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected):
        write_model(
            Checkpoint.open(tmp_path / "llama"),
            linears,
            tmp_path / "out",
            quantization=quantization,
            provenance={},
        )
    assert {path.name for path in tmp_path.iterdir()} == before


def test_wrong_bytes_never_get_into_place(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpwise.convert.exl2.file import writer

    packed = writer.linear_tensors

    def spoiled(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        tensors = packed(name, linear)
        if name == KEYS:
            tensors[f"{name}.q_weight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(writer, "linear_tensors", spoiled)
    with pytest.raises(VerificationError, match=KEYS):
        write()
    assert not (tmp_path / "out").exists()


def test_verifier_sees_a_flipped_bit(write: Write) -> None:
    out, _, _ = write()
    path = out / "output.safetensors"
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, expected in ((f"{KEYS}.q_weight", KEYS), ("model.norm.weight", "model.norm.weight")):
        changed = bytearray(raw)
        changed[8 + length + header[name]["data_offsets"][0]] ^= 4
        path.write_bytes(changed)
        with pytest.raises(VerificationError, match=f"1 decode differently: {expected}"):
            verify_exl2(out)


def test_verifier_sees_missing_and_unexpected_tensors(write: Write) -> None:
    out, _, _ = write()

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["other.weight"] = tensors.pop("model.norm.weight")

    _rewrite(out, rename)
    with pytest.raises(VerificationError, match=r"1 missing: model\.norm\.weight; 1 unexpected: other\.weight"):
        verify_exl2(out)


def test_models_of_other_programs_have_no_manifest(write: Write) -> None:
    out, _, result = write()
    (out / "bpwise.json").unlink()
    other = verify_exl2(out)
    assert not other.compared and other.rates == result.rates


def _drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def _drop_linear(name: str, *, dense: bool) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
        if dense:
            tensors[f"{name}.weight"] = torch.zeros(48, 64, dtype=torch.float16)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(f"{KEYS}.q_groups"), "q_groups: missing"),
        (_drop(f"{KEYS}.q_invperm"), "q_invperm: missing"),
        (_drop_linear(KEYS, dense=True), "k_proj not. Readers need"),
        (_drop_linear("lm_head", dense=False), "lm_head: not stored"),
        (lambda t: t.update({"extra.weight": torch.zeros(2, dtype=torch.int32)}), "extra.weight: stored as"),
        (lambda t: t.update({"extra.weight": torch.tensor([7e4])}), "extra.weight: values range"),
        (lambda t: t.update({"extra.weight": torch.tensor([float("nan")])}), "extra.weight: values range"),
    ],
    ids=["q_groups", "q_invperm", "half-a-block", "no-head", "dtype", "range", "nan"],
)
def test_verifier_refuses(change: Callable[[dict[str, Tensor]], Any], message: str, write: Write) -> None:
    out, _, _ = write()
    _rewrite(out, change)
    with pytest.raises(FormatError, match=message):
        verify_exl2(out)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["A", "B"]}, FormatError, "exactly one name"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
            FormatError,
            "both type and rope_type",
        ),
        ({"vocab_size": 200}, ShapeError, "lm_head"),
        ({"hidden_size": 96}, ShapeError, "q_invperm|q_weight"),
        ({"vocab_size": 99}, VerificationError, "lm_head"),
    ],
)
def test_verifier_checks_the_config(
    changes: dict[str, Any], error: type[Exception], message: str, write: Write
) -> None:
    out, _, _ = write()
    _edit_json(out / "config.json", **changes)
    with pytest.raises(error, match=message):
        verify_exl2(out)


def test_damaged_manifest(write: Write) -> None:
    out, _, _ = write()
    digests = {"linears": {}, "tensors": {"x": 1}}
    for changes in ({"manifest": []}, {"manifest": digests}, {"manifest_version": 2}, {"provenance": {"bpw": "4"}}):
        _edit_json(out / "bpwise.json", **{"manifest_version": 1, **changes})
        with pytest.raises(FormatError, match=r"bpwise\.json: .*quantize again"):
            verify_exl2(out)


HEADERS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "scale-missing": ("q_scale_max", lambda x: x[:1], "q_scale_max has shape"),
    "scales-as-float32": ("q_scale_max", lambda x: x.float(), "q_scale_max: stored as torch.float32"),
    "a-vector": ("q_weight", lambda x: x.flatten(), "q_weight: shape .* Expected a matrix"),
    "no-words": ("q_weight", lambda x: x[:0], "q_weight: shape .* Expected a matrix"),
    "other-inputs": ("q_invperm", lambda x: x[:32], "q_invperm has shape"),
    "no-inputs": ("q_invperm", lambda x: x[:0], "q_invperm: shape"),
    "odd-table": ("q_groups", lambda x: x[:1], "q_groups: shape"),
}


@pytest.mark.parametrize(("suffix", "change", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_are_checked_when_a_model_is_opened(
    write: Write, suffix: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    out, _, _ = write()
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    _rewrite(out, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    with pytest.raises((FormatError, ShapeError), match=message):
        Exl2Model.open(out)


def test_key_in_two_files(write: Write) -> None:
    out, _, _ = write()
    save_file({"model.norm.weight": torch.zeros(64)}, out / "more.safetensors")
    with pytest.raises(FormatError, match=r"stored twice. Got more\.safetensors and output"):
        Exl2Model.open(out)


def test_dense_directory_is_no_exl2_model(make_llama: Callable[..., Path]) -> None:
    directory = make_llama()
    assert not is_exl2(directory) and not is_exl2(directory / "missing")
    with pytest.raises(FormatError, match="not an EXL2 model"):
        Exl2Model.open(directory)


def test_links_that_leave_the_directory_are_refused(write: Write, tmp_path: Path) -> None:
    out, _, _ = write()
    (out / "output.safetensors").rename(tmp_path / "elsewhere")
    (out / "output.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside"):
        Exl2Model.open(out)


def test_side_files_that_leave_the_directory_are_not_copied(
    tmp_path: Path,
    make_llama: Callable[..., Path],
    llama_linears: Callable[..., Linears],
    quantization: dict[str, Any],
) -> None:
    source = make_llama()
    (tmp_path / "secret").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside"):
        write_model(
            Checkpoint.open(source),
            llama_linears(),
            tmp_path / "out",
            quantization=quantization,
            provenance={},
        )
    assert not (tmp_path / "out").exists()


def test_writer_refuses_before_it_begins(
    tmp_path: Path,
    make_llama: Callable[..., Path],
    make_linear: Callable[..., QuantizedLinear],
    llama_linears: Callable[..., Linears],
    quantization: dict[str, Any],
) -> None:
    source = Checkpoint.open(make_llama())
    good = llama_linears()

    def attempt(linears: Linears) -> None:
        write_model(source, linears, tmp_path / "out", quantization=quantization, provenance={})

    with pytest.raises(FormatError, match=r"no tensor model\.extra\.weight"):
        attempt({**good, "model.extra": good[KEYS]})
    with pytest.raises(FormatError, match=r"k_proj not\. Readers need"):
        attempt({name: make for name, make in good.items() if name != KEYS})
    with pytest.raises(ShapeError, match="quantized weight"):
        attempt({**good, KEYS: lambda: make_linear(47, [(4, 64)])})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(WorkDirectoryError, match="in the way"):
        attempt(good)


def test_config_must_name_an_architecture(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="architectures"):
        write(architectures=[])
    assert not (tmp_path / "out").exists()


def test_reordered_down_proj_beside_biases(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="reorder"):
        write(biases=True, reorder=True)
    assert not (tmp_path / "out").exists()


def test_unquantized_values_beyond_float16(
    tmp_path: Path,
    make_llama: Callable[..., Path],
    llama_linears: Callable[..., Linears],
    quantization: dict[str, Any],
) -> None:
    directory = make_llama()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = -70000.0
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: values range from -70144"):
        write_model(
            Checkpoint.open(directory),
            llama_linears(),
            tmp_path / "out",
            quantization=quantization,
            provenance={},
        )


def test_the_format_knows_its_models(write: Write, tmp_path: Path) -> None:
    out, linears, result = write()
    format_ = require_format(out)
    assert format_.name == Exl2Model.format == "exl2"
    assert verify_model(out) == result
    model = open_any(out)
    assert isinstance(model, QuantizedModel)
    assert (model.path, model.directory) == (out, out)
    assert model.stored_bpw().keys() == linears.keys()
    assert (model.calibration_spans, model.predicted_damage_nats, model.matrix_dtype) == (None, None, None)
    assert {name: row[1] for name, *row in format_.describe(out).table.rows} == {
        name: f"{bpw:.3f}" for name, bpw in model.stored_bpw().items()
    }
    assert format_.run_of(out) is None
    _edit_json(out / "bpwise.json", provenance={"run": "r", "calibration_spans": "3:", "predicted_damage_nats": 0.5})
    assert format_.run_of(out) == "r"
    said = format_.open(out)
    assert (said.calibration_spans, said.predicted_damage_nats) == ("3:", 0.5)
    assert format_.run_of(tmp_path / "nothing") is None
    for other in (tmp_path / "llama", out / "config.json"):
        with pytest.raises(FormatError, match="not a quantized model"):
            verify_model(other)
