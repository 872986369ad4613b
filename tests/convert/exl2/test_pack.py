from __future__ import annotations

import pytest
import torch
from bpwise.convert.exl2.file.layout import WIDTHS
from bpwise.convert.exl2.file.pack import pack_codes, pack_scale_codes, unpack_codes, unpack_scale_codes
from bpwise.errors import FormatError, ShapeError
from torch import Tensor


def _one(row: int, code: int) -> list[int]:
    return [code if i == row else 0 for i in range(32)]


# Worked out by hand from the bit stream rule. Codes of one column of 32 rows, and the words that they fill.
GOLDEN = {
    "8-counting": (
        8,
        list(range(1, 33)),
        [0x04030201, 0x08070605, 0x0C0B0A09, 0x100F0E0D, 0x14131211, 0x18171615, 0x1C1B1A19, 0x201F1E1D],
    ),
    "8-sign-bit": (8, _one(3, 0x80), [0x80000000, 0, 0, 0, 0, 0, 0, 0]),
    # Four codes are three bytes: 40 20 0C, then each next four add 04 to every code, 0x104104 to the bytes.
    "6-counting": (
        6,
        list(range(32)),
        [0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D],
    ),
    "6-straddling-row-5": (6, _one(5, 0b110101), [0x40000000, 0x0000000D, 0, 0, 0, 0]),
    "6-straddling-row-10": (6, _one(10, 0b101101), [0, 0xD0000000, 0x00000002, 0, 0, 0]),
    "6-straddling-second-period": (6, _one(21, 0b111111), [0, 0, 0, 0xC0000000, 0x0000000F, 0]),
    # Eight codes are five bytes: 20 88 41 8A 39, 28 A9 C5 9A 7B, 30 CA 49 AB BD, 38 EB CD BB FF.
    "5-counting": (5, list(range(32)), [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]),
    "5-straddling-row-6": (5, _one(6, 0b11101), [0x40000000, 0x00000007, 0, 0, 0]),
    "5-straddling-row-12": (5, _one(12, 0b10011), [0, 0x30000000, 0x00000001, 0, 0]),
    "5-straddling-row-19": (5, _one(19, 0b01011), [0, 0, 0x80000000, 0x00000005, 0]),
    "5-straddling-row-25": (5, _one(25, 0b11010), [0, 0, 0, 0x40000000, 0x00000003]),
    "4-counting": (4, [*range(16), *range(16)], [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]),
    # Eight codes, octal 76543210, are three bytes: 88 C6 FA.
    "3-counting": (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    "3-straddling-row-10": (3, _one(10, 0b101), [0x40000000, 0x00000001, 0]),
    "3-straddling-row-21": (3, _one(21, 0b011), [0, 0x80000000, 0x00000001]),
    "2-counting": (2, [i % 4 for i in range(32)], [0xE4E4E4E4, 0xE4E4E4E4]),
    "2-last-of-word": (2, _one(15, 0b11), [0xC0000000, 0]),
}


def _words(values: list[int]) -> Tensor:
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


@pytest.mark.parametrize(("bits", "codes", "words"), GOLDEN.values(), ids=GOLDEN.keys())
def test_golden_words(bits: int, codes: list[int], words: list[int]) -> None:
    # The second column is all ones: a neighbour must not leak in.
    column = torch.tensor(codes, dtype=torch.uint8)
    both = torch.stack([column, torch.full_like(column, (1 << bits) - 1)], dim=1)
    packed = pack_codes(both, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed[:, 0], _words(words))
    assert torch.equal(packed[:, 1], torch.full((bits,), -1, dtype=torch.int32))
    assert torch.equal(unpack_codes(packed, 32, bits), both)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 33])
def test_round_trip(bits: int, columns: int) -> None:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (160, columns), generator=rng, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (160 * bits // 32, columns)
    assert torch.equal(unpack_codes(packed, 160, bits), codes)


def test_packs_views_with_strides() -> None:
    codes = torch.randint(0, 8, (40, 64), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes.T, 3), pack_codes(codes.T.contiguous(), 3)[:, :40])


def test_sixteen_rows_of_two_bits_are_one_word() -> None:
    codes = torch.tensor([[i % 4] for i in range(16)], dtype=torch.uint8)
    packed = pack_codes(codes, 2)
    assert torch.equal(packed, _words([0xE4E4E4E4]).reshape(1, 1))
    assert torch.equal(unpack_codes(packed, 16, 2), codes)


def test_golden_scale_words() -> None:
    codes = torch.tensor([[*range(16)], [15, *[0] * 14, 9]], dtype=torch.uint8)
    packed = pack_scale_codes(codes)
    assert torch.equal(packed, _words([0x76543210, 0xFEDCBA98, 0x0000000F, 0x90000000]).reshape(2, 2))
    assert torch.equal(unpack_scale_codes(packed), codes)


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (torch.zeros(32, 4, dtype=torch.int32), 4),
        (torch.zeros(32, dtype=torch.uint8), 4),
        (torch.zeros(32, 4, dtype=torch.uint8), 7),
        (torch.zeros(16, 4, dtype=torch.uint8), 4),
        (torch.zeros(8, 4, dtype=torch.uint8), 2),
        (torch.full((32, 4), 16, dtype=torch.uint8), 4),
    ],
    ids=["dtype", "dimensions", "width", "rows", "rows-of-2-bits", "code-too-large"],
)
def test_refuses_to_pack(codes: Tensor, bits: int) -> None:
    with pytest.raises(FormatError, match="pack_codes"):
        pack_codes(codes, bits)


def test_refuses_words_of_another_size() -> None:
    with pytest.raises(ShapeError, match="word matrix"):
        unpack_codes(torch.zeros(5, 4, dtype=torch.int32), 32, 4)


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(1, 12, dtype=torch.uint8), torch.full((1, 8), 16, dtype=torch.uint8)],
    ids=["columns", "code"],
)
def test_refuses_scale_codes(codes: Tensor) -> None:
    with pytest.raises(FormatError, match="pack_scale_codes"):
        pack_scale_codes(codes)
