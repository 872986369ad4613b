"""Types whose codes stand for several weights, against the tables and the decoder of the package gguf."""

import itertools

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.codebooks import CODEBOOK_TYPES, codebook, nearest, recode, scales_of
from bpwise.convert.gguf.ggml.kernels import encode, ggml_type
from torch import Tensor

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")

NAMES = sorted(CODEBOOK_TYPES)
EVEN = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")


def table(name: str) -> Tensor:
    own = getattr(gguf.quants, name)
    own.init_grid()
    grid = torch.from_numpy(own.grid.reshape(own.grid_shape).astype(np.float32))
    return torch.cat([grid + 0.125, grid - 0.125]) if name == "IQ1_M" else grid


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_ggufs(name: str) -> None:
    assert torch.equal(codebook(name).entries, table(name))


@pytest.mark.parametrize("name", NAMES)
def test_another_reader_decodes_the_codes_that_were_put_in(name: str) -> None:
    kind, entries = ggml_type(name), table(name)
    data = encode(random(6, 512) * 0.02, kind, torch.ones(512))
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(len(entries), (6, 512 // entries.shape[1]), generator=generator)
    negative = torch.rand(6, 512, generator=generator) < 0.5
    if name in EVEN:  # the last of eight follows from the others
        groups = negative.view(-1, 8)
        groups[:, 7] = groups[:, :7].sum(dim=1) % 2 == 1
    signs = torch.where(negative, -1.0, 1.0) if name.startswith(("IQ2", "IQ3")) else torch.ones(6, 512)
    changed = recode(data, kind, codes, negative)
    read = gguf.quants.dequantize(changed, gguf.GGMLQuantizationType[name])
    scales, offsets = scales_of(data, kind)
    expected = scales * signs * entries[codes].view(6, 512) + offsets
    assert np.allclose(read, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert all(map(torch.equal, scales_of(changed, kind), (scales, offsets)))
    assert not np.array_equal(changed, data)


@pytest.mark.parametrize("name", NAMES)
def test_finds_the_nearest_of_all_entries_and_signs(name: str) -> None:
    book, entries = codebook(name), table(name)
    size = entries.shape[1]
    wanted = random(2, 3, book.together) * entries.abs().mean()
    roots = torch.stack([torch.eye(book.together) + random(book.together, book.together).triu(1) / 8] * 2)
    roots[1] *= torch.linspace(0.5, 2, book.together)
    codes, values = nearest(wanted, roots, book)
    for block, vector in itertools.product(range(2), range(3)):
        here = wanted[block, vector]
        assert torch.equal(values[block, vector].abs().view(-1, size), entries[codes[block, vector]].abs())
        if not book.signed:
            costs = ((here - entries) @ roots[block]).square().sum(dim=1)
            assert int(codes[block, vector]) == int(costs.argmin())
            continue
        power = roots[block].diagonal()
        missed = (power * (here - values[block, vector])).square()
        least = 0.0
        for part in range(0, book.together, size):  # every sign for itself
            own = slice(part, part + size)
            costs = (power[own] * (here[own].abs() - entries)).square().sum(dim=1)
            least += float(costs.min())
        negative = int((values[block, vector] < 0).sum())
        if book.even:
            assert negative % 2 == 0
            assert float(missed.sum()) >= least * 0.9999
        else:
            assert float(missed.sum()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("name", EVEN)
def test_an_odd_sign_costs_the_least_important_weight(name: str) -> None:
    book = codebook(name)
    wanted = book.entries[:1].repeat(1, 8 // book.entries.shape[1])[None].clone()
    wanted[0, 0, 3] *= -1
    powers = torch.full((8,), 10.0)
    powers[5] = 0.001
    _, values = nearest(wanted, torch.diag(powers)[None], book)
    assert (values < 0).nonzero()[:, 2].tolist() == [3, 5]
