from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix, imatrix_metadata, read_imatrix, write_imatrix
from bpwise.errors import FormatError, ShapeError

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")


def example(**options: object) -> ImportanceMatrix:
    means = {"blk.0.attn_q.weight": torch.tensor([0.1, 0.7, 3.3]), "blk.0.ffn_down_exps.weight": torch.rand(2, 5) + 0.1}
    tokens = {"blk.0.attn_q.weight": torch.tensor([1024.0]), "blk.0.ffn_down_exps.weight": torch.tensor([1000.0, 24.0])}
    settings = {"datasets": ("wiki.txt", "code.txt"), "chunks": 2, "chunk_tokens": 512} | options
    return ImportanceMatrix.from_means(means, tokens, **settings)  # type: ignore[arg-type]


def legacy(entries: list[tuple[bytes, int, list[float]]], tail: bytes = b"", count: int | None = None) -> bytes:
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return data + tail


def test_round_trip(tmp_path: Path) -> None:
    matrix = example()
    write_imatrix(tmp_path / "m.gguf", matrix)
    back = read_imatrix(tmp_path / "m.gguf")
    assert (back.datasets, back.chunks, back.chunk_tokens) == (("wiki.txt", "code.txt"), 2, 512)
    assert list(back.sums) == sorted(matrix.sums)
    for name, sums in matrix.sums.items():
        assert torch.equal(back.sums[name], sums)
        assert torch.equal(back.counts[name], matrix.counts[name])


def test_means_are_computed_as_llama_quantize_does() -> None:
    matrix = example()
    for name in matrix.sums:
        sums, counts = matrix.sums[name].numpy(), matrix.counts[name].numpy()
        expected = np.concatenate([row / np.float32(count) for row, count in zip(sums, counts, strict=True)])
        assert np.array_equal(matrix.mean_squares(name).numpy(), expected)  # type: ignore[union-attr]
    assert matrix.mean_squares("output.weight") is None


def test_an_expert_that_saw_no_token_counts_as_one() -> None:
    matrix = ImportanceMatrix(
        sums={"w": torch.tensor([[2.0, 4.0], [0.0, 0.0]])}, counts={"w": torch.tensor([2.0, 0.0])}
    )
    assert matrix.mean_squares("w").tolist() == [1.0, 2.0, 1.0, 1.0]  # type: ignore[union-attr]


def test_the_legacy_format(tmp_path: Path) -> None:
    matrix = example()
    write_imatrix(tmp_path / "m.dat", matrix, legacy=True)
    back = read_imatrix(tmp_path / "m.dat")
    assert (back.datasets, back.chunks) == (("code.txt",), 2)
    for name in matrix.sums:
        mean = matrix.mean_squares(name)
        assert mean is not None
        # Times and by the number of chunks, 2: exact.
        assert torch.equal(back.mean_squares(name), mean)  # type: ignore[arg-type]


def test_legacy_bytes_by_hand(tmp_path: Path) -> None:
    matrix = ImportanceMatrix.from_means(
        {"ab": torch.tensor([0.5, 2.0])}, 1024, datasets=("t",), chunks=2, chunk_tokens=512
    )
    write_imatrix(tmp_path / "m.dat", matrix, legacy=True)
    expected = legacy([(b"ab", 2, [1.0, 4.0])], struct.pack("<ii", 2, 1) + b"t")
    assert (tmp_path / "m.dat").read_bytes() == expected


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 3)], ids=["none", "chunks-only"])
def test_legacy_files_without_a_tail(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "m.dat").write_bytes(legacy([(b"w", 0, [1.0, 2.0])], tail))
    back = read_imatrix(tmp_path / "m.dat")
    assert back.mean_squares("w").tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    assert back.chunks == (3 if tail else 0)


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", example())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in reader.tensors][1] == "blk.0.attn_q.weight.counts"
    assert [list(tensor.shape) for tensor in reader.tensors] == [[3], [1], [5, 2], [1, 2]]
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    assert reader.get_field("general.type").contents() == "imatrix"
    del reader  # it keeps the file mapped


def test_notes_for_the_output() -> None:
    assert imatrix_metadata(example(), "x" * 200) == {
        "quantize.imatrix.file": "x" * 127,
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 2,
    }


def test_notes_hold_no_folders() -> None:
    for path in ("/home/someone/i.gguf", r"C:\Users\someone\i.gguf", "../i.gguf"):
        matrix = replace(example(), datasets=(path.replace("i.gguf", "wiki.txt"),))
        notes = imatrix_metadata(matrix, path)
        assert (notes["quantize.imatrix.file"], notes["quantize.imatrix.dataset"]) == ("i.gguf", "wiki.txt")


def test_refuses_wrong_numbers_of_tokens() -> None:
    with pytest.raises(ShapeError, match="numbers of tokens"):
        ImportanceMatrix.from_means({"w": torch.ones(2, 3)}, {"w": torch.ones(3)})


HUGE = struct.pack("<i", 2**31 - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        legacy([], count=0),
        legacy([], count=-1),
        legacy([(b"w", 1, [1.0])], count=2**31 - 1),
        struct.pack("<i", 1) + HUGE + b"w",
        struct.pack("<ii", 1, -5) + b"w" * 40,
        struct.pack("<ii", 1, 1) + b"w" + struct.pack("<i", 1) + HUGE + bytes(8),
        struct.pack("<ii", 1, 1) + b"w" + struct.pack("<ii", 1, -1),
        legacy([(b"w", 1, [])]),
        legacy([(b"w", 1, [1.0]), (b"w", 1, [2.0])]),
        legacy([(b"w", 1, [float("nan")])]),
        legacy([(b"w", 1, [-1.0])]),
        legacy([(b"w", 1, [1.0])], struct.pack("<i", 1) + HUGE + b"t"),
        legacy([(b"w", 1, [1.0])], b"\1\0"),
        b"GGUF" + bytes(100),
    ],
    ids=[
        "empty",
        "no-entries",
        "negative-entries",
        "endless",
        "huge-name",
        "negative-name",
        "huge-values",
        "negative-values",
        "no-values",
        "twice",
        "nan",
        "negative",
        "huge-dataset",
        "cut-tail",
        "cut-gguf",
    ],
)
def test_refuses_damaged_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        read_imatrix(tmp_path / "m")


@pytest.mark.parametrize("cut", [3, 30, 200, 400])
def test_refuses_cut_files(tmp_path: Path, cut: int) -> None:
    write_imatrix(tmp_path / "m.gguf", example())
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:cut])
    with pytest.raises(FormatError):
        read_imatrix(tmp_path / "m.gguf")


@pytest.mark.parametrize("case", ["other-file", "no-counts", "not-f32", "experts", "datasets", "infinite"])
def test_refuses_gguf_files_that_are_no_matrices(tmp_path: Path, case: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    sums = np.ones((2, 3), dtype=np.float16 if case == "not-f32" else np.float32)
    if case == "infinite":
        sums[0, 0] = np.inf
    writer.add_tensor("w" if case == "other-file" else "w.in_sum2", sums)
    if case not in ("other-file", "no-counts"):
        writer.add_tensor("w.counts", np.ones((4 if case == "experts" else 2, 1), dtype=np.float32))
    if case == "datasets":
        writer.add_uint32("imatrix.datasets", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="damaged"):
        read_imatrix(tmp_path / "m.gguf")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_imatrix(tmp_path / "none")
