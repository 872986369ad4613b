"""Base files: layout by hand, and everything that is wrong with one is refused in a sentence."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.files import disk_errors
from bpwise.errors import DiskFullError, FormatError
from bpwise.eval.llama_perplexity.base_file import BaseFile, base_file_bytes, is_base_file, writing_base
from torch import Tensor

WINDOWS, WINDOW_TOKENS, VOCABULARY = 2, 6, 5
ROWS = 2
"""Counted positions of a window: 3 and 4."""


@pytest.fixture
def tokens() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 0], [1, 1, 2, 2, 3, 3]])


@pytest.fixture
def logits() -> Tensor:
    found = torch.randn(WINDOWS * ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
    found[0] = 7.0  # all equal: the scale is 0
    found[1, 2] = -40.0  # further down than is stored
    return found


def write(path: Path, tokens: Tensor, logits: Tensor) -> Path:
    with writing_base(path, tokens, VOCABULARY) as add:
        for piece in logits.split(3):
            add(piece)
    return path


def test_layout(tmp_path: Path, tokens: Tensor, logits: Tensor) -> None:
    data = write(tmp_path / "b.kld", tokens, logits).read_bytes()
    assert len(data) == base_file_bytes(WINDOWS, WINDOW_TOKENS, VOCABULARY)
    assert data[:8] == b"_logits_"
    assert struct.unpack_from("<3i", data, 8) == (WINDOW_TOKENS, VOCABULARY, WINDOWS)
    assert struct.unpack_from("<12i", data, 20) == tuple(tokens.flatten().tolist())
    for number, row in enumerate(logits.tolist()):
        scale, lowest, *codes, pad = struct.unpack_from("<2f6H", data, 68 + 20 * number)
        highest, floor = max(row), max(min(row), max(row) - 16)
        total = math.log(sum(math.exp(value - highest) for value in row))
        assert pad == 0
        assert lowest == pytest.approx(floor - highest - total, abs=1e-6)
        for code, value in zip(codes, row, strict=True):
            # Half a step, and what float32 loses of 16.
            expected = max(value, floor) - highest - total
            assert scale * code + lowest == pytest.approx(expected, abs=0.5 * scale + 4e-6)


def test_reads_what_it_wrote(tmp_path: Path, tokens: Tensor, logits: Tensor) -> None:
    path = write(tmp_path / "b.kld", tokens, logits)
    assert is_base_file(path)
    base = BaseFile.open(path)
    assert base.vocab_size == VOCABULARY
    assert torch.equal(base.tokens, tokens)
    with base.reading() as read:
        found = torch.cat([read(1), read(3)])
    expected = logits.double().log_softmax(dim=1)
    assert (found - expected).abs()[expected > -16].max() < 16 / 65535
    assert found[1, 2] == found[1].min()


def put(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:at] + data + whole[at + len(data) :]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda _: b"", "Got b'' at its start"),
        (lambda data: data[:15], "three sizes"),
        (put(0, b"GGUF"), "Got b'GGUFits_' at its start"),
        (put(8, struct.pack("<i", -1)), "2 windows of -1 tokens"),
        (put(12, struct.pack("<i", 0)), "a vocabulary of 0"),
        (put(16, struct.pack("<i", 2**31 - 1)), "148 bytes. Expected 137438953428 "),
        (lambda data: data[:-1], "147 bytes. Expected 148"),
        (lambda data: data + b"x", "149 bytes. Expected 148"),
        (put(20, struct.pack("<i", VOCABULARY)), "token ids from 0 to 5"),
        (put(24, struct.pack("<i", -7)), "token ids from -7 to 4"),
        (put(68, struct.pack("<f", math.nan)), "sum to nan"),
        (put(92, struct.pack("<f", 1.0)), "sum to"),
        (put(68, struct.pack("<f", math.inf)), "sum to"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_refused(
    tmp_path: Path, tokens: Tensor, logits: Tensor, spoil: Callable[[bytes], bytes], said: str
) -> None:
    path = write(tmp_path / "b.kld", tokens, logits)
    path.write_bytes(spoil(path.read_bytes()))

    def read_all() -> None:
        base = BaseFile.open(path)
        with base.reading() as read:
            read(WINDOWS * ROWS)

    with pytest.raises(FormatError) as error:
        read_all()
    assert str(error.value).startswith(f"{path}: not a whole file of llama-perplexity's")
    assert said in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        BaseFile.open(tmp_path / "none.kld")


def test_a_full_disk_is_seen_before(
    tmp_path: Path, tokens: Tensor, logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_errors.shutil, "disk_usage", lambda _: disk_errors.shutil._ntuple_diskusage(9, 9, 147))
    with pytest.raises(DiskFullError, match="will take 148 bytes, but its disk has 147 free"):
        write(tmp_path / "b.kld", tokens, logits)
    assert list(tmp_path.iterdir()) == []


def test_an_end_that_came_early_leaves_nothing(tmp_path: Path, tokens: Tensor, logits: Tensor) -> None:
    def stop() -> None:
        with writing_base(tmp_path / "b.kld", tokens, VOCABULARY) as add:
            add(logits[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert list(tmp_path.iterdir()) == []
