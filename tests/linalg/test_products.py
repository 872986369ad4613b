"""How products of float32 are computed, and that settings go when they should."""

from __future__ import annotations

import pytest
import torch
from bpwise.linalg.products import BFLOAT16, FLOAT32, TF32, float32_products, pass_precision, products

CPU = torch.device("cpu")
SIZES = [(700, 300, 500), (257, 1536, 64), (33, 31, 1000)]


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_products_are_float32(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, inner, generator=rng), torch.randn(inner, columns, generator=rng)
    exact = left.double() @ right.double()
    with float32_products(CPU):
        found = [
            left @ right,
            torch.zeros(rows, columns).addmm_(left, right),
            torch.nn.functional.linear(left, right.T),
        ]
    for each in found:
        # The bound of a sum of `inner` products in float32; factors in bfloat16 would be off by 2^-9 of each.
        bound = inner * torch.finfo(torch.float32).eps * (left.abs().double() @ right.abs().double())
        assert bool(((each - exact).abs() <= bound).all())


def test_settings_go_with_the_context() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products(CPU, BFLOAT16):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with float32_products(CPU):
            pass
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(ValueError, match="out"), products(CPU, BFLOAT16):
        raise ValueError("out")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(True, True, "ieee"), (True, False, "bf16"), (False, False, "ieee")]
)
def test_only_avx512_without_amx_multiplies_exactly_with_onednn(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with float32_products(CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == expected


@pytest.mark.parametrize(
    ("device", "amx", "capability", "expected"),
    [
        ("cpu", True, (0, 0), BFLOAT16),
        ("cpu", False, (0, 0), FLOAT32),
        ("cuda", True, (8, 0), TF32),
        ("cuda", False, (9, 0), TF32),
        ("cuda", True, (7, 5), FLOAT32),
        ("mps", True, (0, 0), FLOAT32),
    ],
)
def test_auto_takes_what_the_device_has(
    monkeypatch: pytest.MonkeyPatch, device: str, amx: bool, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert pass_precision(torch.device(device), "auto") == expected
    assert pass_precision(torch.device(device), FLOAT32) == FLOAT32


def test_a_gpu_gets_tf32_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, setting = torch.device("cuda"), torch.backends.cuda.matmul
    before = setting.fp32_precision
    with products(gpu, TF32):
        assert setting.fp32_precision == "tf32"
        with float32_products(gpu):
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "tf32"
    assert setting.fp32_precision == before
