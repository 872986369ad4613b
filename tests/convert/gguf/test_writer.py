from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.file import tensor, writer
from bpwise.convert.gguf.file.emit import entry
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.writer import planned_bytes, write_gguf
from bpwise.convert.gguf.ggml.kernels import decode, encode
from bpwise.convert.gguf.ggml.types import TYPES, GgmlType
from bpwise.convert.gguf.llama_cpp.assign import mixture_types
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix, imatrix_metadata
from bpwise.convert.gguf.llama_cpp.mixtures import mixture
from bpwise.errors import ConfigError, FormatError, NumericalError, ShapeError, VerificationError

if importlib.util.find_spec("libggml") is None:
    pytest.skip("needs ggml's library, in the extra gguf", allow_module_level=True)

# SHA-256 of llama-quantize's own files; make_golden.py tells how they were made.
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["files"]
DTYPES = {"small": "BF16", "narrow": "F32", "small-experts": "F16"}

CASES = [
    pytest.param(
        model,
        name,
        id=f"{model}-{name}",
        # ggml makes these types' tables when they are first asked for, which takes it many seconds.
        marks=[pytest.mark.slow] if name.startswith(("IQ1", "IQ2")) or name == "IQ3_XXS" else [],
    )
    for model, files in GOLDEN.items()
    for name in files
]

MakeGguf = Callable[..., Path]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_writes_llama_quantizes_own_file(
    model: str,
    name: str,
    make_gguf: MakeGguf,
    make_importance: Callable[[str], ImportanceMatrix],
    tmp_path: Path,
) -> None:
    base, chosen, matrix = make_gguf(model, dtype=DTYPES[model]), mixture(name), make_importance(model)
    header = read_gguf_header(base)
    types = mixture_types(chosen, header, importance=matrix.sums)
    metadata = imatrix_metadata(matrix, "imatrix.gguf")
    result = write_gguf(
        base,
        tmp_path / "out.gguf",
        types,
        file_type=chosen.file_type,
        importance=matrix.mean_squares,
        metadata=metadata,
        threads=2,
    )
    assert hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest() == GOLDEN[model][name]
    assert result.file_bytes == planned_bytes(header, types, file_type=chosen.file_type, metadata=metadata)
    assert result.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert result.quantized + result.others == len(header.tensors) and result.compared


def types_of(base: Path, kind: GgmlType) -> dict[str, GgmlType]:
    return {name: kind for name, tensor in read_gguf_header(base).tensors.items() if len(tensor.shape) > 1}


def test_takes_finished_bytes(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base, kind = make_gguf("small"), TYPES["Q8_0"]
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    write_gguf(base, tmp_path / "plain.gguf", types_of(base, kind), file_type=7)
    tensor = read_gguf_header(tmp_path / "plain.gguf").tensors["blk.1.attn_q.weight"]
    raw = (tmp_path / "plain.gguf").read_bytes()[tensor.offset_bytes :][: tensor.size_bytes]
    mine = np.frombuffer(raw, dtype=np.uint8).reshape(256, -1).copy()
    mine[:, 5] += 1
    ready = {"blk.1.attn_q.weight": lambda: iter([mine])}
    write_gguf(base, tmp_path / "ours.gguf", types_of(base, kind), file_type=7, encoded=ready)
    assert (tmp_path / "ours.gguf").read_bytes()[tensor.offset_bytes :][: tensor.size_bytes] == mine.tobytes()
    # Bytes of another matrix are no rounding of this one.
    other = {"blk.1.attn_q.weight": lambda: iter([encode(weights, kind)])}
    with pytest.raises(VerificationError, match=r"blk\.1\.attn_q\.weight: at Q8_0 it decodes to something else"):
        write_gguf(base, tmp_path / "bad.gguf", types_of(base, kind), file_type=7, encoded=other)
    with pytest.raises(ShapeError, match="finished data"):
        bad = {"blk.1.attn_q.weight": lambda: iter([mine[:, :-34]])}
        write_gguf(base, tmp_path / "bad.gguf", types_of(base, kind), file_type=7, encoded=bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "plain.gguf", "small.gguf"]


def test_finished_bytes_may_be_as_far_away_as_they_were_meant_to_be(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base, kind, name = make_gguf("small"), TYPES["Q8_0"], "blk.1.attn_q.weight"
    moved = encode(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), kind)
    stored = read_gguf_header(base).tensors[name]
    raw = base.read_bytes()[stored.offset_bytes :][: stored.size_bytes]
    original = torch.frombuffer(bytearray(raw), dtype=torch.float32).double().view(256, 256)
    distance = float((decode(moved, kind).double() - original).square().sum())
    assert distance > 1.5 * float(original.square().sum())

    def write(**meant: float) -> None:
        (tmp_path / "out.gguf").unlink(missing_ok=True)
        distances = {name: meant["distance"]} if meant else {}
        ready = {name: lambda: iter([moved])}
        write_gguf(base, tmp_path / "out.gguf", types_of(base, kind), file_type=7, encoded=ready, distances=distances)

    write(distance=distance)
    for wrong in ({}, {"distance": 0.9 * distance}, {"distance": 1.1 * distance}):
        with pytest.raises(VerificationError, match=r"blk\.1\.attn_q\.weight: at Q8_0 it decodes to something else"):
            write(**wrong)


def test_weights_stay_near_and_sizes_are_told(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base = make_gguf("small")
    result = write_gguf(base, tmp_path / "out.gguf", types_of(base, TYPES["Q4_0"]), file_type=2)
    name = "blk.0.ffn_up.weight"
    tensors = [(path, read_gguf_header(path).tensors[name]) for path in (base, tmp_path / "out.gguf")]
    before, after = (
        decode(
            np.frombuffer(path.read_bytes(), dtype=np.uint8)[t.offset_bytes :][: t.size_bytes].reshape(256, -1), t.type
        )
        for path, t in tensors
    )
    assert 0 < float((after - before).square().sum() / before.square().sum()) < 0.02
    assert result.quantized == 15
    assert 4.5 <= result.bpw < 4.6


def test_small_slabs_give_the_same_file(make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_gguf("small-experts", dtype="F16")
    types = types_of(base, TYPES["Q4_K"])
    write_gguf(base, tmp_path / "a.gguf", types, file_type=15)
    monkeypatch.setattr(tensor, "_SLAB_WEIGHTS", 256 * 30)
    monkeypatch.setattr(tensor, "_COPIED_BYTES", 1000)
    write_gguf(base, tmp_path / "b.gguf", types, file_type=15, threads=3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_metadata(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base = make_gguf("small")
    extra: dict[str, Any] = {"general.name": "new", "x.b": True, "x.f": 0.5, "x.l": ["a", "é"], "x.u": 2**32 - 1}
    write_gguf(base, tmp_path / "out.gguf", {}, file_type=3, metadata=extra)
    before, after = read_gguf_header(base), read_gguf_header(tmp_path / "out.gguf")
    assert {key: after.metadata[key] for key in extra} == extra
    assert after.metadata["general.file_type"] == 3
    assert after.metadata["general.quantization_version"] == 2
    kept = [key for key in before.entries if key not in ("general.file_type", "general.name")]
    assert list(after.entries)[: len(kept)] == kept
    assert all(after.entries[key] == before.entries[key] for key in kept)
    with pytest.raises(FormatError, match="cannot store -1"):
        entry(-1)


@pytest.mark.parametrize(
    ("types", "error", "message"),
    [
        ({"nothing.weight": "Q8_0"}, ConfigError, "no tensor 'nothing.weight'"),
        ({"blk.0.attn_q.weight": "Q4_K"}, ShapeError, "blocks of Q4_K"),
        ({"blk.0.attn_q.weight": "IQ2_XS"}, ShapeError, "blocks of IQ2_XS"),
    ],
    ids=["unknown", "width", "width-iq"],
)
def test_refuses_types(
    types: dict[str, str], error: type[Exception], message: str, make_gguf: MakeGguf, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        chosen = {name: TYPES[kind] for name, kind in types.items()}
        write_gguf(make_gguf("narrow"), tmp_path / "out.gguf", chosen, file_type=0)
    assert not (tmp_path / "out.gguf").exists()


def test_refuses_a_quantized_base(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base = make_gguf("small")
    write_gguf(base, tmp_path / "a.gguf", types_of(base, TYPES["Q8_0"]), file_type=7)
    with pytest.raises(FormatError, match=r"already quantized. Got Q8_0"):
        write_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", types_of(base, TYPES["Q4_0"]), file_type=2)
    # But what stays as it is may be copied.
    write_gguf(tmp_path / "a.gguf", tmp_path / "c.gguf", types_of(base, TYPES["Q8_0"]), file_type=7)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_refuses_importances_of_another_width(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base = make_gguf("small")
    with pytest.raises(ShapeError, match="importances"):
        write_gguf(
            base,
            tmp_path / "out.gguf",
            {"blk.0.attn_q.weight": TYPES["Q8_0"]},
            file_type=7,
            importance=lambda _: torch.ones(255),
        )


def test_names_the_tensor_that_cannot_be_encoded(make_gguf: MakeGguf, tmp_path: Path) -> None:
    base = make_gguf("small")
    header = read_gguf_header(base)
    with base.open("r+b") as file:
        file.seek(header.tensors["blk.1.attn_v.weight"].offset_bytes)
        file.write(np.array([np.nan], dtype=np.float32).tobytes())
    with pytest.raises(NumericalError, match=r"blk\.1\.attn_v\.weight: encode to Q8_0"):
        write_gguf(base, tmp_path / "out.gguf", types_of(base, TYPES["Q8_0"]), file_type=7)
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_q\.weight: .* no importances"):
        write_gguf(base, tmp_path / "out.gguf", {"blk.0.attn_q.weight": TYPES["IQ2_XS"]}, file_type=7)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_disk_that_changes_bytes_is_noticed(
    make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_gguf("small")
    real = writer._verify

    def spoil(path: Path, *rest: Any) -> Any:
        with path.open("r+b") as file:
            file.seek(-40, 2)
            file.write(b"\xff")
        return real(path, *rest)

    monkeypatch.setattr(writer, "_verify", spoil)
    with pytest.raises(VerificationError, match="reads back otherwise"):
        write_gguf(base, tmp_path / "out.gguf", types_of(base, TYPES["Q8_0"]), file_type=7)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_metadata_hold_any_text() -> None:
    # Bytes of a path that are no UTF-8 come back as they were; half of a surrogate pair has no bytes.
    assert entry("a\udcffb")[12:] == b"a\xffb"
    assert entry("a\ud83db")[12:] == b"a\\ud83db"
