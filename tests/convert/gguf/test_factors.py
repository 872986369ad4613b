import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.factors import SCALED_TYPES, multiplied
from bpwise.convert.gguf.ggml.kernels import encode, ggml_type
from bpwise.errors import ConfigError

quants = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")

# ggml makes these types' tables when they are first asked for, which takes it up to 20 seconds.
SLOW = ("IQ1_S", "IQ2_S")
TYPES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(SCALED_TYPES)]


@pytest.mark.parametrize("name", TYPES)
def test_every_block_is_multiplied_by_its_factor(name: str) -> None:
    kind, rng = ggml_type(name), torch.Generator().manual_seed(0)
    data = encode(torch.randn(3, 512, generator=rng) + 0.2, kind, torch.ones(512))
    factors = 1 + 0.1 * torch.randn(3, 512 // kind.block_weights, generator=rng)

    def decoded(rows: np.ndarray) -> np.ndarray:
        return quants.quants.dequantize(rows, quants.GGMLQuantizationType[name])

    expected = decoded(data) * np.repeat(factors.numpy(), kind.block_weights, axis=1)
    # Two scales are rounded to float16, which has 11 bits; where a minimum nearly cancels a weight, all of it counts.
    largest = np.abs(decoded(data)).max()
    np.testing.assert_allclose(decoded(multiplied(data, kind, factors)), expected, rtol=2**-10, atol=2**-10 * largest)
    assert np.array_equal(multiplied(data, kind, torch.ones(1, 1)), data)


def test_factors_may_be_common_to_a_row_or_a_column_of_blocks() -> None:
    kind = ggml_type("Q8_0")
    data = encode(torch.randn(3, 96, generator=torch.Generator().manual_seed(0)), kind)
    rows, columns = torch.tensor([[0.5], [1.0], [2.0]]), torch.tensor([[2.0, 4.0, 0.25]])
    weights = quants.quants.dequantize(data, quants.GGMLQuantizationType.Q8_0)
    for factors in (rows, columns, rows * columns):
        found = quants.quants.dequantize(multiplied(data, kind, factors), quants.GGMLQuantizationType.Q8_0)
        # Powers of two change float16 scales exactly.
        assert np.array_equal(found, weights * np.repeat(np.broadcast_to(factors, (3, 3)), 32, axis=1))


def test_what_would_be_infinite_stays_at_the_largest_scale() -> None:
    kind = ggml_type("Q8_0")
    data = multiplied(encode(torch.full((1, 32), 6e4), kind), kind, torch.tensor([[1e9]]))
    assert np.isfinite(quants.quants.dequantize(data, quants.GGMLQuantizationType.Q8_0)).all()


@pytest.mark.parametrize("name", ["MXFP4", "F16", "IQ1_M"])
def test_refuses_types_without_float16_scales(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: no float16 scales"):
        multiplied(np.zeros((1, 256), dtype=np.uint8), ggml_type(name), torch.ones(1, 1))
