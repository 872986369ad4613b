"""The GGUF container, against files written by hand and files that somebody tampered with."""

import random
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from bpwise.convert.gguf.file.header import GGML_TYPES, is_gguf, read_gguf_header
from bpwise.convert.gguf.file.metadata import origin_metadata
from bpwise.errors import BpwiseError, FormatError


def test_origin_is_told_as_llama_cpp_does(make_gguf: Callable[..., Path]) -> None:
    header = read_gguf_header(make_gguf("tied"))
    assert origin_metadata(header, None) == {"general.quantized_by": "bpwise"}
    url = "https://huggingface.co/meta-llama/Llama-3.2-1B"
    assert origin_metadata(header, "meta-llama/Llama-3.2-1B") == {
        "general.quantized_by": "bpwise",
        "general.source.repo_url": url,
        "general.base_model.count": 1,
        "general.base_model.0.name": "Llama 3.2 1B",
        "general.base_model.0.organization": "meta-llama",
        "general.base_model.0.repo_url": url,
    }
    # What the converter took from the original's own card stays.
    told = replace(header, metadata={**header.metadata, "general.base_model.count": 2})
    assert origin_metadata(told, "meta-llama/Llama-3.2-1B").keys() == {
        "general.quantized_by",
        "general.source.repo_url",
    }


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """Dimensions innermost first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@dataclass
class Written:
    """A file in parts; what is given replaces what a correct file has."""

    entries: list[bytes] = field(
        default_factory=lambda: [
            entry("general.architecture", 8, text("toy")),
            entry("toy.block_count", 4, struct.pack("<I", 2)),
            entry("toy.eps", 6, struct.pack("<f", 1e-5)),
            entry("toy.flag", 7, b"\x01"),
            entry("toy.names", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\xff")),
            entry("toy.numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        ]
    )
    infos: list[bytes] = field(
        default_factory=lambda: [info("first", (3, 2), 0, 0), info("second", (32,), 8, 32), info("third", (1,), 1, 96)]
    )
    data: bytes = bytes(24 + 8 + 34 + 30 + 2)
    head: bytes | None = None
    alignment: int = 32

    def to(self, path: Path) -> Path:
        head = self.head or b"GGUF" + struct.pack("<IQQ", 3, len(self.infos), len(self.entries))
        before = head + b"".join(self.entries) + b"".join(self.infos)
        path.write_bytes(before + bytes(-len(before) % self.alignment) + self.data)
        return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_reads_what_was_written(path: Path) -> None:
    header = read_gguf_header(Written().to(path))
    assert header.version == 3
    assert header.metadata["toy.block_count"] == 2
    assert header.metadata["toy.eps"] == float(np.float32(1e-5))
    assert header.metadata["toy.flag"] is True
    assert header.metadata["toy.names"] == ["a", "\udcff"]
    assert header.metadata["toy.numbers"].tolist() == [1, -2, 3]
    assert [(t.name, t.shape, t.type.name, t.size_bytes) for t in header.tensors.values()] == [
        ("first", (2, 3), "F32", 24),
        ("second", (32,), "Q8_0", 34),
        ("third", (1,), "F16", 2),
    ]
    start = header.data_offset_bytes
    assert start % 32 == 0
    assert [t.offset_bytes - start for t in header.tensors.values()] == [0, 32, 96]
    assert header.file_bytes == path.stat().st_size
    assert is_gguf(path)
    assert not is_gguf(path.parent)
    assert not is_gguf(path.parent / "absent")


def test_own_alignment(path: Path) -> None:
    written = Written(
        entries=[entry("general.alignment", 4, struct.pack("<I", 64))],
        infos=[info("first", (1,), 0, 0), info("second", (1,), 0, 64)],
        data=bytes(68),
        alignment=64,
    )
    header = read_gguf_header(written.to(path))
    assert header.alignment_bytes == 64
    assert header.data_offset_bytes % 64 == 0


def test_types_are_those_of_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf").constants
    theirs = {
        kind.value: (kind.name, *constants.GGML_QUANT_SIZES[kind])
        for kind in constants.GGMLQuantizationType
        if kind in constants.GGML_QUANT_SIZES
    }
    ours = {number: (kind.name, kind.block_weights, kind.block_bytes) for number, kind in GGML_TYPES.items()}
    assert {number: theirs[number] for number in ours} == ours


HUGE = (1 << 63) - 1

DAMAGES = {
    "magic": (Written(head=b"GGML" + struct.pack("<IQQ", 3, 0, 0)), "begin with 'GGUF'"),
    "version": (Written(head=b"GGUF" + struct.pack("<IQQ", 1, 0, 0)), "version 1. Expected 2 or 3"),
    "big-endian": (Written(head=b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "big-endian"),
    "tensor-count": (Written(head=b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0)), "tensors cannot fit"),
    "entry-count": (Written(head=b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE)), "entries cannot fit"),
    "long-key": (Written(entries=[struct.pack("<Q", HUGE)]), "cannot fit"),
    "long-string": (Written(entries=[entry("k", 8, struct.pack("<Q", HUGE))]), "cannot fit"),
    "long-array": (Written(entries=[entry("k", 9, struct.pack("<IQ", 10, HUGE))]), "cannot fit"),
    "many-strings": (Written(entries=[entry("k", 9, struct.pack("<IQ", 8, HUGE))]), "cannot fit"),
    "array-of-arrays": (Written(entries=[entry("k", 9, struct.pack("<IQ", 9, 1))]), "array of type 9"),
    "value-type": (Written(entries=[entry("k", 13, b"")]), "type 13"),
    "same-key": (Written(entries=[entry("k", 7, b"\x01")] * 2), "'k' is there twice"),
    "alignment": (Written(entries=[entry("general.alignment", 4, struct.pack("<I", 24))]), "a power of two"),
    "alignment-0": (Written(entries=[entry("general.alignment", 4, struct.pack("<I", 0))]), "a power of two"),
    "alignment-text": (Written(entries=[entry("general.alignment", 8, text("32"))]), "a power of two"),
    "same-tensor": (Written(infos=[info("t", (1,), 0, 0), info("t", (1,), 0, 32)]), "'t' is there twice"),
    "overlap": (Written(infos=[info("a", (8,), 0, 0), info("b", (8,), 0, 0)]), "offset 0. Expected 32"),
    "gap": (Written(infos=[info("a", (8,), 0, 0), info("b", (8,), 0, 64)]), "offset 64. Expected 32"),
    "far-away": (Written(infos=[info("a", (8,), 0, 1 << 62)]), "Expected 0"),
    "beyond-the-end": (Written(infos=[info("a", (32,), 0, 0)]), "but the file has"),
    "no-dimension": (Written(infos=[info("a", (), 0, 0)]), "0 dimensions"),
    "five-dimensions": (Written(infos=[info("a", (1,) * 5, 0, 0)]), "5 dimensions"),
    "many-dimensions": (Written(infos=[text("a") + struct.pack("<I", 0xFFFFFFFF) + bytes(64)]), "dimensions"),
    "zero-dimension": (Written(infos=[info("a", (0, 4), 0, 0)]), "impossible dimensions"),
    "overflow": (Written(infos=[info("a", (1 << 32, 1 << 32), 0, 0)]), "impossible dimensions"),
    "row": (Written(infos=[info("a", (33,), 8, 0)]), "a multiple of 32 for Q8_0"),
    "type": (Written(infos=[info("a", (32,), 4, 0)]), "type 4, which is not known"),
    "long-name": (Written(infos=[info("a" * 64, (1,), 0, 0)]), "1 to 63 bytes"),
    "no-name": (Written(infos=[info("", (1,), 0, 0)]), "1 to 63 bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(path: Path, name: str) -> None:
    written, message = DAMAGES[name]
    with pytest.raises(FormatError, match=message):
        read_gguf_header(written.to(path))


def test_cut_off_anywhere(path: Path) -> None:
    whole = Written().to(path).read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            read_gguf_header(path)


def test_any_byte_may_be_wrong(path: Path) -> None:
    whole = Written().to(path).read_bytes()
    rng = random.Random(0)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([rng.randrange(256)]) + whole[position + 1 :])
        with suppress(BpwiseError):  # anything else, or running out of memory, fails the test
            read_gguf_header(path)


def test_missing_file(path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_gguf_header(path)
