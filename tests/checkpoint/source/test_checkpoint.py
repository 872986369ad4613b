import errno
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint, TensorInfo, TensorSource
from bpwise.checkpoint.source.hub import confined_file, resolve_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.errors import CheckpointError, FormatError, WorkDirectoryError
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file
from torch import Tensor

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make(directory: Path, tensors: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors or {EMBED: torch.ones(4, 2), "b": torch.zeros(3)}, directory / "model.safetensors")
    return directory


def make_sharded(directory: Path, shards: dict[str, dict[str, Tensor]], weight_map: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    for shard, tensors in shards.items():
        (directory / shard).parent.mkdir(exist_ok=True)
        save_file(tensors, directory / shard)
    if weight_map is None:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


class TestReading:
    def test_a_single_file(self, tmp_path: Path) -> None:
        tensors = {
            "w": torch.randn(3, 5),
            "h": torch.randn(2).half(),
            "b": torch.randn(2, 2).bfloat16(),
            "ids": torch.arange(7),
            "empty": torch.zeros(0, 4),
        }
        config = {"model_type": "llama", "auto_map": {"AutoModel": "evil.py"}, "limit": [0.0, float("inf")]}
        make(tmp_path / "m", tensors, config)
        source: TensorSource = Checkpoint.open(tmp_path / "m")
        assert source.directory == tmp_path / "m"
        assert {key: source.config[key] for key in config} == config
        assert source.names == tensors.keys()
        for name, tensor in tensors.items():
            loaded = source.tensor(name)
            assert source.shape(name) == tensor.shape
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor)

    def test_sizes(self, tmp_path: Path) -> None:
        tensors = {"w": torch.zeros(3, 5), "b": torch.zeros(2).bfloat16(), "ids": torch.arange(7)}
        checkpoint = Checkpoint.open(make(tmp_path, tensors))
        assert checkpoint.total_bytes == 60 + 4 + 56
        assert checkpoint.parameter_count == 17
        assert checkpoint.info("b") == TensorInfo((2,), torch.bfloat16, tmp_path / "model.safetensors", 4)

    def test_shards_and_a_tensor_beyond_the_index(self, tmp_path: Path) -> None:
        shards = {
            "a.safetensors": {"x": torch.ones(2)},
            "sub/b.safetensors": {"y": torch.zeros(3), "extra": torch.ones(1)},
        }
        make_sharded(tmp_path, shards, {"x": "a.safetensors", "y": "sub/b.safetensors"})
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.names == {"x", "y", "extra"}
        assert torch.equal(checkpoint.tensor("y"), torch.zeros(3))
        assert checkpoint.info("y").file == tmp_path / "sub" / "b.safetensors"

    def test_a_single_file_of_another_name(self, tmp_path: Path) -> None:
        make(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
        (tmp_path / "training_args.bin").write_bytes(b"")  # pickles beside safetensors are left alone
        assert Checkpoint.open(tmp_path).shape("b") == (3,)

    def test_tensors_outlive_the_file_and_are_our_own(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(make(tmp_path))
        first = checkpoint.tensor("b")
        first += 1
        assert torch.equal(checkpoint.tensor("b"), torch.zeros(3))
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert torch.equal(first, torch.ones(3))

    def test_a_file_cut_after_opening(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(make(tmp_path))
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="changed while in use"):
            for name in checkpoint.names:
                checkpoint.tensor(name)

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(make(tmp_path))
        before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        tensor = checkpoint.tensor("b")
        assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        del tensor

    def test_may_be_pickled(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(make(tmp_path))
        copy = pickle.loads(pickle.dumps(checkpoint))
        assert torch.equal(copy.tensor("b"), checkpoint.tensor("b"))
        assert copy.fingerprint == checkpoint.fingerprint

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        checkpoint = Checkpoint.open(make(tmp_path))
        for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.info):
            with pytest.raises(CheckpointError, match=r"tensor 'model\.norm' is missing"):
                ask("model.norm")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
    def test_values_that_are_not_finite(self, tmp_path: Path, dtype: torch.dtype, value: float) -> None:
        bad = torch.zeros(1001, dtype=dtype)
        bad[777] = value
        checkpoint = Checkpoint.open(make(tmp_path, {"bad": bad}))
        message = r"model\.safetensors: tensor 'bad' holds NaN or infinite values. Got 1 of 1001"
        with pytest.raises(CheckpointError, match=message):
            checkpoint.tensor("bad")

    def test_bounds_may_be_infinite(self, tmp_path: Path) -> None:
        tensors = {"least": torch.tensor(-torch.inf), "bad": torch.tensor(torch.nan), "one": torch.tensor([torch.inf])}
        checkpoint = Checkpoint.open(make(tmp_path, tensors))
        assert checkpoint.tensor("least").item() == -torch.inf
        for name in ("bad", "one"):
            with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN or infinite values. Got 1 of 1"):
                checkpoint.tensor(name)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex64], ids=str)
    def test_unsupported_dtypes_are_refused_when_asked_for(self, tmp_path: Path, dtype: torch.dtype) -> None:
        checkpoint = Checkpoint.open(make(tmp_path, {"x": torch.ones(2).to(dtype), "ok": torch.ones(1)}))
        assert checkpoint.tensor("ok").item() == 1
        with pytest.raises(CheckpointError, match="Expected float32, float16 or bfloat16"):
            checkpoint.tensor("x")


class TestTiedEmbeddings:
    @pytest.mark.parametrize(
        ("flag", "head", "expected"),
        [
            (True, "absent", True),
            (True, "same", True),
            (True, "different", False),
            (True, "other-shape", False),
            (False, "absent", False),
            (False, "same", False),
            (None, "absent", True),
            (None, "same", False),
        ],
    )
    def test_rules(self, tmp_path: Path, flag: bool | None, head: str, expected: bool) -> None:
        embedding = torch.randn(4, 2)
        heads = {"same": embedding.clone(), "different": embedding + 1, "other-shape": torch.ones(5, 2)}
        tensors = {EMBED: embedding} | ({HEAD: heads[head]} if head in heads else {})
        config = {"model_type": "x"} | ({} if flag is None else {"tie_word_embeddings": flag})
        checkpoint = Checkpoint.open(make(tmp_path, tensors, config))
        assert checkpoint.tied_embeddings is expected
        if head == "absent":
            with pytest.raises(CheckpointError, match="is missing"):
                checkpoint.tensor(HEAD)

    @pytest.mark.parametrize(
        ("head", "embedding"),
        [
            ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
            ("lm_head.weight", "model.language_model.embed_tokens.weight"),
        ],
    )
    @pytest.mark.parametrize("same", [True, False])
    def test_of_the_language_model_beside_a_vision_tower(
        self, tmp_path: Path, head: str, embedding: str, same: bool
    ) -> None:
        table = torch.randn(4, 2)
        config = {"model_type": "x", "text_config": {"tie_word_embeddings": True}}
        stored = {embedding: table, head: table.clone() if same else table + 1}
        assert Checkpoint.open(make(tmp_path / "two", stored, config)).tied_embeddings is same
        config["text_config"] = {"tie_word_embeddings": False}
        assert not Checkpoint.open(make(tmp_path / "own", stored, config)).tied_embeddings
        config["tie_word_embeddings"] = True  # one that says so is enough, as in Transformers
        assert Checkpoint.open(make(tmp_path / "either", stored, config)).tied_embeddings is same

    @pytest.mark.parametrize("part", ["", "text_config"])
    def test_wrong_type(self, tmp_path: Path, part: str) -> None:
        flag = {"tie_word_embeddings": "false"}
        with pytest.raises(CheckpointError, match=r"wrong tie_word_embeddings. Got 'false'"):
            Checkpoint.open(make(tmp_path, config={"model_type": "x", **({part: flag} if part else flag)}))


class TestFingerprint:
    def test_does_not_depend_on_the_place(self, tmp_path: Path) -> None:
        first = Checkpoint.open(make(tmp_path / "a")).fingerprint
        assert first == Checkpoint.open(make(tmp_path / "b")).fingerprint
        assert len(first) == 32
        assert int(first, 16) >= 0

    @pytest.mark.parametrize("position", [0, 1, 5000, 300_000, 599_999])
    def test_sees_one_changed_weight(self, tmp_path: Path, position: int) -> None:
        weights = torch.zeros(600_000, dtype=torch.bfloat16)
        before = Checkpoint.open(make(tmp_path / "a", {"w": weights})).fingerprint
        weights[position] = -0.0
        assert Checkpoint.open(make(tmp_path / "b", {"w": weights})).fingerprint != before

    @pytest.mark.parametrize("what", ["config", "name", "shape", "one-weight-of-few", "shard-name"])
    def test_sees(self, tmp_path: Path, what: str) -> None:
        before = Checkpoint.open(make(tmp_path / "a", {"w": torch.zeros(4, 2)})).fingerprint
        changed = torch.zeros(2, 4) if what == "shape" else torch.zeros(4, 2)
        if what == "one-weight-of-few":
            changed[2, 1] = 1
        config = {"model_type": "mistral"} if what == "config" else None
        directory = make(tmp_path / "b", {"v" if what == "name" else "w": changed}, config)
        if what == "shard-name":
            (directory / "model.safetensors").rename(directory / "other.safetensors")
        assert Checkpoint.open(directory).fingerprint != before


def no_directory(path: Path) -> None:
    pass


def a_file(path: Path) -> None:
    path.write_text("")


def empty(path: Path) -> None:
    path.mkdir()


def config_only(path: Path) -> None:
    make(path)
    (path / "model.safetensors").unlink()


def config_garbage(path: Path) -> None:
    make(path)
    (path / "config.json").write_text("{")


def odd_tie(path: Path) -> None:
    make(path, config={"tie_word_embeddings": "false"})


def quantized(path: Path) -> None:
    make(path, config={"quantization_config": {"quant_method": "gptq"}})


def pickled(name: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        config_only(path)
        (path / name).write_bytes(b"\x80\x02cos\nsystem\n")

    return build


def two_unindexed(path: Path) -> None:
    make(path)
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({"c": torch.ones(1)}, path / "b.safetensors")


def no_tensors(path: Path) -> None:
    make(path)
    save_file({}, path / "model.safetensors")


def fifo(path: Path) -> None:
    config_only(path)
    os.mkfifo(path / "model.safetensors")


def link(name: str, target: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        make(path)
        outside = make(path.parent / "outside")
        (outside / "snapshots").mkdir()
        (path / name).unlink()
        (path / name).symlink_to(target)

    return build


def indexed(weight_map: Any) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        make(path.parent / "outside")
        shards = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}}
        make_sharded(path, shards, weight_map)

    return build


def duplicate(path: Path) -> None:
    shards = {
        "a.safetensors": {"x": torch.ones(2)},
        "b.safetensors": {"x": torch.ones(2), "y": torch.ones(1)},
    }
    make_sharded(path, shards, {"x": "a.safetensors", "y": "b.safetensors"})


class TestRefusedDirectories:
    @pytest.mark.parametrize(
        ("build", "message"),
        [
            pytest.param(no_directory, "Got nothing there", id="no-directory"),
            pytest.param(a_file, "Got a file", id="a-file"),
            pytest.param(empty, r"config\.json: missing", id="no-config"),
            pytest.param(config_garbage, "not valid JSON", id="config-garbage"),
            pytest.param(config_only, "no safetensors file", id="no-weights"),
            pytest.param(odd_tie, "Expected true or false", id="odd-tie-flag"),
            pytest.param(quantized, "already quantized", id="quantized"),
            pytest.param(pickled("pytorch_model.bin"), "save_pretrained", id="pickle-bin"),
            pytest.param(pickled("model.pt"), "save_pretrained", id="pickle-pt"),
            pytest.param(pickled("consolidated.00.pth"), "save_pretrained", id="pickle-pth"),
            pytest.param(two_unindexed, "Got 2 safetensors files", id="two-unindexed"),
            pytest.param(no_tensors, "files without tensors", id="no-tensors"),
            pytest.param(fifo, "not a regular file", id="fifo"),
            pytest.param(link("model.safetensors", "../outside/model.safetensors"), "leads outside", id="link"),
            pytest.param(link("config.json", "../outside/config.json"), "leads outside", id="config-link"),
            pytest.param(link("config.json", "/etc/hostname"), "leads outside", id="absolute-link"),
            pytest.param(link("model.safetensors", "gone"), "missing", id="dangling-link"),
            pytest.param(link("model.safetensors", "model.safetensors"), "cannot be followed|missing", id="link-loop"),
            pytest.param(indexed({"x": "../outside/model.safetensors"}), "unsafe file name", id="dot-dot"),
            pytest.param(indexed({"x": "/etc/a.safetensors"}), "unsafe file name", id="absolute"),
            pytest.param(indexed({"x": "..\\a.safetensors"}), "unsafe file name", id="backslash"),
            pytest.param(indexed({"x": "a\0.safetensors"}), "unsafe file name", id="nul"),
            pytest.param(indexed({"x": "a" * 300 + ".safetensors"}), "cannot be followed|missing", id="long"),
            pytest.param(indexed({"x": "c.safetensors"}), r"c\.safetensors: missing", id="missing-shard"),
            pytest.param(indexed({"x": "pytorch_model.bin"}), "Expected a .safetensors file", id="pickle-shard"),
            pytest.param(indexed({"x": 1}), r"Got int. Expected str", id="number-shard"),
            pytest.param(
                indexed(["x"]), r"weight_map: not a valid value\. Got \['x'\]\. Expected object", id="map-is-a-list"
            ),
            pytest.param(indexed({}), "empty weight_map", id="map-is-empty"),
            pytest.param(indexed({"x": "\ud800.safetensors"}), "unsafe file name", id="half-a-surrogate-pair"),
            pytest.param(
                indexed({"x": "a.safetensors", "z": "b.safetensors"}),
                r"index is stale, .* tensor 'z' is missing from 'b\.safetensors'. Delete its entry",
                id="missing-tensor",
            ),
            pytest.param(indexed({"x": "b.safetensors", "y": "a.safetensors"}), "wrong file for tensor", id="swapped"),
            pytest.param(duplicate, r"'x' is stored twice. Got a\.safetensors and b", id="duplicate"),
        ],
    )
    def test_is_refused(self, tmp_path: Path, build: Callable[[Path], None], message: str) -> None:
        build(tmp_path / "m")
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(tmp_path / "m")
        assert str(caught.value).startswith(str(tmp_path / "m"))


class TestLinks:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        """A Hub cache with one model whose files are links to blobs."""
        model = tmp_path / "hub" / "models--org--name"
        revision = make(model / "snapshots" / "abc")
        (model / "blobs").mkdir()
        for name in ("config.json", "model.safetensors"):
            (revision / name).rename(model / "blobs" / f"hash-of-{name}")
            (revision / name).symlink_to(f"../../blobs/hash-of-{name}")
        return model

    def test_the_cache_layout_is_accepted(self, cache: Path) -> None:
        assert Checkpoint.open(cache / "snapshots" / "abc").tensor("b").shape == (3,)

    def test_a_link_to_the_snapshot_is_accepted(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "m").symlink_to(cache / "snapshots" / "abc")
        assert Checkpoint.open(tmp_path / "m").tensor("b").shape == (3,)

    def test_a_link_inside_the_directory_is_accepted(self, tmp_path: Path) -> None:
        make(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "real")
        (tmp_path / "model.safetensors").symlink_to("real")
        assert Checkpoint.open(tmp_path).tensor("b").shape == (3,)

    def test_blobs_shared_by_all_models_are_accepted(self, cache: Path) -> None:
        blob = cache / "blobs" / "hash-of-model.safetensors"
        shared = cache.parent / "blobs" / "ab" / ("ab" + "0" * 62)
        shared.parent.mkdir(parents=True)
        blob.rename(shared)
        blob.symlink_to(shared)
        assert Checkpoint.open(cache / "snapshots" / "abc").tensor("b").shape == (3,)

    @pytest.mark.parametrize(
        "target", ["../../refs", "../../../models--org--other/blobs/x", "../../../blobs/x", "../../../../key"]
    )
    def test_other_places_around_the_cache_are_refused(self, cache: Path, target: str) -> None:
        link = cache / "snapshots" / "abc" / "tokenizer.json"
        link.symlink_to(target)
        with pytest.raises(CheckpointError, match="leads outside"):
            confined_file(cache / "snapshots" / "abc", "tokenizer.json")

    def test_blobs_that_lead_elsewhere_are_refused(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("secret")
        (cache / "blobs" / "hash").symlink_to(tmp_path / "key")
        (cache / "snapshots" / "abc" / "x.json").symlink_to("../../blobs/hash")
        with pytest.raises(CheckpointError, match="leads outside"):
            Checkpoint.open(cache / "snapshots" / "abc").file("x.json")

    def test_a_linked_folder_is_refused(self, tmp_path: Path) -> None:
        make(tmp_path / "outside")
        make(tmp_path / "m")
        (tmp_path / "m" / "sub").symlink_to("../outside")
        with pytest.raises(CheckpointError, match="leads outside"):
            confined_file(tmp_path / "m", "sub/config.json")


class TestRefusedHeaders:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(b"", "truncated. Got 0 bytes", id="empty"),
            pytest.param(b"\1\0\0", "truncated. Got 3 bytes", id="no-length"),
            pytest.param(raw_safetensors(b"{}", length=2**63), "header too large", id="length-2^63"),
            pytest.param(raw_safetensors(b"{}", length=100_000_001), "header too large", id="100MB"),
            pytest.param(raw_safetensors(b"{}", length=3), "Expected a header of 3 bytes", id="longer-than-file"),
            pytest.param(raw_safetensors(b"{,}"), "not valid JSON", id="garbage"),
            pytest.param(raw_safetensors(b"\xff{}"), "not valid JSON", id="not-utf8"),
            pytest.param(raw_safetensors(b"[" * 100_000), "not valid JSON", id="deep"),
            pytest.param(raw_safetensors([]), "Got a JSON list", id="list"),
            pytest.param(raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__", id="metadata"),
            pytest.param(raw_safetensors({"a": 1}), "wrong header entry", id="entry-number"),
            pytest.param(raw_safetensors({"a": {"dtype": "U8"}}), "wrong header entry", id="entry-fields"),
            pytest.param(raw_safetensors({"a": entry(0, 1, dtype="F4")}, b"1"), "unknown dtype. Got 'F4'", id="dtype"),
            pytest.param(raw_safetensors({"a": entry(0, 1) | {"dtype": []}}, b"1"), "unknown dtype", id="dtype-list"),
            pytest.param(raw_safetensors({"a": entry(0, 1, [-1])}, b"1"), "impossible shape", id="negative-size"),
            pytest.param(raw_safetensors({"a": entry(0, 1, [True])}, b"1"), "impossible shape", id="bool-size"),
            pytest.param(raw_safetensors({"a": entry(0, 1, [1.0])}, b"1"), "impossible shape", id="float-size"),
            pytest.param(raw_safetensors({"a": entry(0, 1, [1] * 65)}, b"1"), "impossible shape", id="65-dims"),
            pytest.param(raw_safetensors({"a": entry(0, 0, [0, 2**62, 4])}), "impossible shape", id="overflow"),
            pytest.param(raw_safetensors({"a": entry(0, 1, [2])}, b"1"), "wrong data size", id="shape-too-large"),
            pytest.param(raw_safetensors({"a": entry(-1, 0, [1])}, b"1"), "data_offsets", id="negative-offset"),
            pytest.param(raw_safetensors({"a": entry(2, 1, [0])}, b"12"), "data_offsets", id="reversed"),
            pytest.param(
                raw_safetensors({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"1"),
                "data_offsets",
                id="three",
            ),
            pytest.param(raw_safetensors({"a": entry(0, 9)}, b"1"), "truncated", id="out-of-range"),
            pytest.param(
                raw_safetensors({"a": entry(0, 10**15)}, b"1"), "Expected tensor 'a' to end at", id="petabyte"
            ),
            pytest.param(raw_safetensors({"a": entry(1, 2)}, b"12"), "leaves a gap", id="gap"),
            pytest.param(
                raw_safetensors({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "'b' overlaps", id="overlap"
            ),
            pytest.param(
                raw_safetensors({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
                "'b' overlaps",
                id="same-bytes",
            ),
            pytest.param(raw_safetensors({"a": entry(0, 1)}, b"12"), "wrong size. Got", id="hidden-tail"),
            pytest.param(
                raw_safetensors(
                    b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, '
                    b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
                    b"1",
                ),
                "a tensor or a field twice",
                id="name-twice",
            ),
        ],
    )
    def test_is_refused(self, tmp_path: Path, content: bytes, message: str) -> None:
        make(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(tmp_path)
        assert str(caught.value).startswith(f"{path}: ")


def http_error(kind: type[Exception], status: int = 404) -> Exception:
    # The error types want the response of the HTTP client that the installed version was built on.
    client = sys.modules[hub_errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]]
    response = client.Response(status, request=client.Request("GET", "https://huggingface.co/org/name"))
    return kind("from the Hub", response=response)  # type: ignore[call-arg]


def connect_error() -> Exception:
    client = sys.modules[hub_errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]]
    error: Exception = client.ConnectError("no route")
    return error


class TestHub:
    def test_a_directory_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(tmp_path / "org" / "name")
        monkeypatch.chdir(tmp_path)
        assert resolve_model("org/name") == Path("org/name")
        assert open_model("org/name").names == open_model(tmp_path / "org" / "name").names

    def test_downloads_only_what_is_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def download(
            repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str], **_: Any
        ) -> str:
            assert revision is None
            calls.append((repo_id, allow_patterns))
            assert ignore_patterns
            return str(make(tmp_path / "cached"))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.chdir(tmp_path)
        assert open_model("org/name").directory == tmp_path / "cached"
        assert calls[0][0] == "org/name"
        assert "*.safetensors" in calls[0][1]  # what else, see test_side_files

    @pytest.mark.parametrize(
        "model",
        [
            "",
            "/gone/model",
            "./model",
            "../model",
            "~/model",
            "a/b/c",
            ".hidden/x",
            "org/.x",
            "org/",
            "a b",
            "x\0",
        ],
    )
    def test_what_is_no_hub_id_never_reaches_the_hub(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="Expected a directory, or a Hugging Face Hub id"):
            resolve_model(model)

    def test_a_file_is_no_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model.gguf").write_text("")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="Got a file"):
            resolve_model("model.gguf")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            pytest.param(http_error(hub_errors.GatedRepoError, 403), "it is gated", id="gated"),
            pytest.param(http_error(hub_errors.RepositoryNotFoundError), "it was not found", id="not-found"),
            pytest.param(hub_errors.HFValidationError("bad"), "it was not found", id="bad-id"),
            pytest.param(hub_errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE", id="offline"),
            pytest.param(hub_errors.LocalEntryNotFoundError("none"), "cannot be reached", id="not-cached"),
            pytest.param(http_error(hub_errors.HfHubHTTPError, 500), "could not be downloaded", id="http-500"),
            pytest.param(connect_error(), "could not be downloaded", id="connection"),
            pytest.param(ConnectionResetError("reset"), "could not be downloaded", id="reset"),
        ],
    )
    def test_every_failure_is_one_clear_error(
        self, error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve_model("org/name")
        assert str(caught.value).startswith("org/name: no such directory")
        assert caught.value.__cause__ is error

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **options: object) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(WorkDirectoryError, match="disk of the Hub's cache is full"):
            resolve_model("org/name")

    @pytest.mark.parametrize("how", ["offline", "unreachable"])
    def test_the_real_client_without_a_network(self, how: str, tmp_path: Path) -> None:
        # In a process of its own: the client reads its settings when it is imported.
        code = (
            "from bpwise.checkpoint.source.original import open_model\n"
            "from bpwise.errors import CheckpointError\n"
            "try:\n    open_model('org/name')\nexcept CheckpointError as error:\n    print(error)\n"
        )
        settings = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
        env = {**os.environ, "HF_HOME": str(tmp_path), **settings}
        result = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert result.stdout.startswith("org/name: no such directory, and as a Hugging Face Hub id it is not")

    def test_importing_does_not_import_the_hub_client(self) -> None:
        code = "import sys, bpwise.checkpoint.source.checkpoint; sys.exit('huggingface_hub' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        (tmp_path / "a").mkdir()
        settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
        save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "a" / "adapter_model.safetensors")
        return tmp_path / "a"

    @pytest.mark.parametrize("config", [False, True], ids=["alone", "beside-the-base's-config"])
    def test_as_a_model(self, config: bool, adapter: Path) -> None:
        if config:
            (adapter / "config.json").write_text("{}")
        message = r"a LoRA adapter, not a model. .* Give the base model \('org/base'\) as MODEL, .* with --lora"
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(adapter)

    def test_beside_a_model(self, adapter: Path) -> None:
        make(adapter)
        assert Checkpoint.open(adapter).names == {EMBED, "b"}


class TestLfsPointers:
    TEXT = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 1234567\n"

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "LICENSE"])
    def test_in_the_place_of_a_file(self, name: str, tmp_path: Path) -> None:
        (make(tmp_path) / name).write_text(self.TEXT)
        with pytest.raises(CheckpointError, match=rf"/{name}: a Git LFS pointer, .* Run `git lfs pull`"):
            Checkpoint.open(tmp_path)

    def test_in_the_place_of_shards_and_index(self, tmp_path: Path) -> None:
        make_sharded(tmp_path, {"a.safetensors": {"x": torch.ones(1)}})
        for name in ("a.safetensors", "model.safetensors.index.json"):
            (tmp_path / name).write_text(self.TEXT)
            with pytest.raises(CheckpointError, match=rf"/{name}: a Git LFS pointer"):
                Checkpoint.open(tmp_path)

    def test_in_the_place_of_a_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_text(self.TEXT)
        with pytest.raises(FormatError, match="a Git LFS pointer"):
            read_gguf_header(tmp_path / "m.gguf")

    def test_files_that_speak_of_it(self, tmp_path: Path) -> None:
        (make(tmp_path) / "LICENSE").write_text(f"# {self.TEXT}")
        assert Checkpoint.open(tmp_path).names
