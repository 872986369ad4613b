from __future__ import annotations

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.blocks import GRID_TYPES, repack, unpack
from bpwise.convert.gguf.ggml.kernels import Bytes, GgmlType, ggml_type
from bpwise.errors import ConfigError, FormatError, ShapeError
from torch import Tensor

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

KINDS = [pytest.param(ggml_type(name), id=name) for name in sorted(GRID_TYPES)]
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}


def random_blocks(kind: GgmlType, rows: int = 5, blocks: int = 3) -> Bytes:
    """Any bytes are a valid block, so long as its float16 numbers are finite."""
    rng = np.random.default_rng(kind.id)
    data = rng.integers(0, 256, (rows, blocks, kind.block_bytes), dtype=np.uint8)
    for start in HALVES.get(kind.name, (0,)):
        halves = rng.standard_normal((rows, blocks, 1)).astype("<f2")
        data[:, :, start : start + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def decoded(data: Bytes, kind: GgmlType) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_is_what_readers_compute(kind: GgmlType) -> None:
    data = random_blocks(kind)
    parts = unpack(data, kind)
    # Exactly: the formula multiplies and adds the same float32 numbers in the same order.
    assert torch.equal(parts.weights(), decoded(data, kind))
    assert parts.scales.shape == parts.offsets.shape == (5, 3 * kind.block_weights // parts.sub_weights)
    assert parts.codes.shape == (5, 3 * kind.block_weights)
    assert (parts.codes.dtype, parts.scales.dtype) == (torch.uint8, torch.float32)
    assert bool((parts.levels.diff() > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_codes_give_the_same_bytes(kind: GgmlType) -> None:
    data = random_blocks(kind)
    before = data.copy()
    assert np.array_equal(repack(data, kind, unpack(data, kind).codes), data)
    assert np.array_equal(data, before)


@pytest.mark.parametrize("kind", KINDS)
def test_other_codes_change_nothing_but_the_codes(kind: GgmlType) -> None:
    data = random_blocks(kind)
    parts = unpack(data, kind)
    rng = torch.Generator().manual_seed(1)
    codes = torch.randint(0, len(parts.levels), parts.codes.shape, generator=rng, dtype=torch.uint8)
    changed = repack(data, kind, codes)
    again = unpack(changed, kind)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, parts.scales)
    assert torch.equal(again.offsets, parts.offsets)
    levels = parts.levels[codes.long()].reshape(5, -1, parts.sub_weights)
    expected = (parts.scales[..., None] * levels + parts.offsets[..., None]).reshape(codes.shape)
    assert torch.equal(decoded(changed, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_reaches_every_code(kind: GgmlType) -> None:
    data = random_blocks(kind, rows=1, blocks=8)
    count = len(unpack(data, kind).levels)
    codes = torch.arange(8 * kind.block_weights).remainder(count).to(torch.uint8)[None]
    assert torch.equal(unpack(repack(data, kind, codes), kind).codes, codes)


def test_no_rows() -> None:
    kind = ggml_type("Q4_K")
    data = np.zeros((0, 288), dtype=np.uint8)
    assert unpack(data, kind).codes.shape == (0, 512)
    assert repack(data, kind, torch.zeros(0, 512, dtype=torch.uint8)).shape == (0, 288)


def test_refuses_what_has_no_scalar_grid() -> None:
    with pytest.raises(ConfigError, match="IQ2_XS: codes no single weights"):
        unpack(np.zeros((1, 74), dtype=np.uint8), ggml_type("IQ2_XS"))


def test_refuses_parts_of_blocks() -> None:
    with pytest.raises(FormatError, match="whole 144-byte blocks"):
        unpack(np.zeros((1, 145), dtype=np.uint8), ggml_type("Q4_K"))


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        (torch.zeros(1, 255, dtype=torch.uint8), ShapeError),
        (torch.zeros(1, 256, dtype=torch.int64), FormatError),
        (torch.full((1, 256), 16, dtype=torch.uint8), FormatError),
    ],
    ids=["shape", "dtype", "too-large"],
)
def test_refuses_codes(codes: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="repack Q4_K"):
        repack(np.zeros((1, 144), dtype=np.uint8), ggml_type("Q4_K"), codes)
