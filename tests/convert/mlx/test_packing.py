"""Codes as MLX packs them, against arithmetic on whole numbers."""

import pytest
import torch
from bpwise.convert.mlx.grid.packing import decode, pack_codes, unpack_codes
from bpwise.convert.mlx.grid.schemes import BITS, SCHEMES, Scheme, scheme_named


def words_of(codes: list[int], bits: int) -> list[int]:
    """All codes as one number, the first lowest, cut into words of 32 bits."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]


@pytest.mark.parametrize("bits", BITS)
def test_words_hold_the_codes_lowest_bits_first(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == (3, 64 * bits // 32)
    for row, found in zip(codes.tolist(), words.tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in found] == words_of(row, bits)
    assert torch.equal(unpack_codes(words, bits), codes)
    assert torch.equal(unpack_codes(words.view(torch.uint32), bits), codes)


def test_two_bits_as_mlx_itself_packs_them() -> None:
    # mlx.core.quantize of MLX 0.32.4: codes 3, 2, 1, 0 over and over.
    assert pack_codes(torch.tensor([[3, 2, 1, 0] * 8], dtype=torch.uint8), 2).tolist() == [[0x1B1B1B1B] * 2]


def test_weights_are_scale_times_code_plus_bias() -> None:
    codes = torch.tensor([[0, 1, 2, 3] * 16], dtype=torch.uint8)
    scales, biases = torch.tensor([[0.5, -2.0]]).bfloat16(), torch.tensor([[1.0, 3.0]]).bfloat16()
    expected = [0.5 * code + 1 for code in [0, 1, 2, 3] * 8] + [-2.0 * code + 3 for code in [0, 1, 2, 3] * 8]
    assert decode(codes, scales, biases).tolist() == [expected]


def test_schemes_say_what_they_take() -> None:
    assert len(SCHEMES) == 18
    for scheme in SCHEMES:
        stored = 128 * scheme.bits / 8 + 2 * 2 * (128 / scheme.group_size)
        assert scheme.row_bytes(128) == stored
        assert scheme.bits_per_weight() == pytest.approx(stored * 8 / 128)
        assert scheme_named(scheme.name) is scheme
    assert Scheme(4, 64).fits(192)
    assert not Scheme(4, 128).fits(192)
    assert scheme_named("7g64") is None
