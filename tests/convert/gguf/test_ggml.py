from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.kernels import TYPES, GgmlType, decode, encode, ggml_type
from bpwise.convert.gguf.ggml.types import GGML_TYPES
from bpwise.errors import BpwiseError, ConfigError, FormatError, NumericalError, ShapeError
from torch import Tensor

quants = pytest.importorskip("gguf", reason="needs the extra gguf")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("libggml") is None, reason="needs ggml's library, in the extra gguf"
)

FLOATS = [kind for kind in TYPES.values() if not kind.quantized]

# ggml makes these types' tables when they are first asked for, which takes it up to 20 seconds.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_S")
ENCODED = [
    pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] if kind.name in SLOW else []) for kind in TYPES.values()
]
BLOCKS = [case for case in ENCODED if case.id not in ("F32", "F16", "BF16")]

# The types whose encoder the Python package gguf has too, written independently.
REIMPLEMENTED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0"]


def matrix(rows: int = 3, columns: int = 512, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    scales = 10 ** (torch.rand(rows, 1, generator=rng) * 3 - 3)
    return torch.randn(rows, columns, generator=rng) * scales


def importance(columns: int = 512) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(9)) + 0.01


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_the_table_agrees_with_gguf(kind: GgmlType) -> None:
    number = quants.GGMLQuantizationType[kind.name]
    assert (kind.id, (kind.block_weights, kind.block_bytes)) == (number, quants.GGML_QUANT_SIZES[number])
    assert GGML_TYPES[kind.id] is kind


def test_sizes() -> None:
    kind = ggml_type("q4_k")
    assert kind.bits_per_weight == 4.5
    assert kind.row_bytes(512) == 288
    assert not kind.fits(576)
    with pytest.raises(ShapeError, match="Q4_K"):
        kind.row_bytes(576)
    with pytest.raises(ConfigError, match=r"'Q4_Z'. Expected one of F32"):
        ggml_type("Q4_Z")


@needs_kernels
@pytest.mark.parametrize("kind", ENCODED)
def test_decodes_as_the_python_package_does(kind: GgmlType) -> None:
    data = encode(matrix(), kind, importance())
    expected = quants.quants.dequantize(data, quants.GGMLQuantizationType(kind.id))
    assert np.array_equal(decode(data, kind).numpy().view(np.uint32), expected.astype(np.float32).view(np.uint32))
    assert torch.equal(decode(data, kind, threads=2), decode(data, kind))


@needs_kernels
@pytest.mark.parametrize("name", REIMPLEMENTED)
def test_encodes_as_the_python_package_does(name: str) -> None:
    weights = matrix(columns=768)
    expected = quants.quants.quantize(weights.numpy(), quants.GGMLQuantizationType[name])
    assert np.array_equal(encode(weights, ggml_type(name)), expected)


@needs_kernels
@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_encodes_floats_as_the_library_does(kind: GgmlType) -> None:
    from bpwise.convert.gguf.ggml.kernels import _library

    weights = matrix()
    weights[0, :4] = torch.tensor([0.0, -0.0, 1e-40, 65504.0])
    data = encode(weights, kind)
    expected = np.empty_like(data)
    _library().ggml_quantize_chunk(kind.id, weights.data_ptr(), expected.ctypes.data, 0, 3, 512, None)
    assert np.array_equal(data, expected)


@needs_kernels
@pytest.mark.parametrize("kind", BLOCKS)
def test_threads_do_not_change_the_bytes(kind: GgmlType) -> None:
    weights = matrix(rows=7, columns=256)
    assert np.array_equal(encode(weights, kind, importance(256)), encode(weights, kind, importance(256), threads=3))


@needs_kernels
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_library_asks_for_importances_where_the_table_says(kind: GgmlType) -> None:
    from bpwise.convert.gguf.ggml.kernels import _library

    assert (
        bool(_library().ggml_quantize_requires_imatrix(kind.id) & 0xFF) == kind.needs_importance
    )  # C's bool is a byte
    if kind.needs_importance:
        with pytest.raises(ConfigError, match="no importances"):
            encode(matrix(), kind)


@needs_kernels
def test_importances_move_the_error_away_from_important_columns() -> None:
    weights, kind = matrix(rows=16, columns=256, seed=3), ggml_type("Q4_K")
    weight = importance(256) ** 4

    def damage(data: np.ndarray) -> float:
        return float(((decode(data, kind) - weights) ** 2 * weight).sum())

    assert damage(encode(weights, kind, weight)) < damage(encode(weights, kind))


@needs_kernels
@pytest.mark.parametrize("kind", BLOCKS)
def test_odd_rows_do_not_end_the_process(kind: GgmlType) -> None:
    weights = torch.zeros(6, 256)
    weights[1, 17] = 1.0
    weights[2] = 1e-30
    weights[3] = 65504.0
    weights[4] = torch.linspace(-1e-7, 1e-7, 256)
    weights[5, ::2] = -3.0
    for weight in (None, torch.zeros(256), torch.full((256,), 1e-30), torch.full((256,), 1e9)):
        if weight is not None or not kind.needs_importance:
            assert torch.isfinite(decode(encode(weights, kind, weight), kind)).all()


@needs_kernels
def test_nvfp4_is_left_out_because_iq4_nl_of_its_size_is_closer() -> None:
    nvfp4, rival = GGML_TYPES[40], ggml_type("IQ4_NL")
    assert nvfp4.name not in TYPES
    assert nvfp4.bits_per_weight == rival.bits_per_weight
    assert nvfp4.block_weights % rival.block_weights == 0  # which fits every row that the other fits
    weights = torch.randn(32, 768, generator=torch.Generator().manual_seed(0)) / 64

    def error(kind: GgmlType) -> float:
        decoded = quants.quants.dequantize(encode(weights, kind), quants.GGMLQuantizationType[kind.name])
        return float(((decoded - weights.numpy()) ** 2).sum())

    assert error(nvfp4) > 1.4 * error(rival)  # 1.8 times on linears of Qwen2.5-Coder-1.5B


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 256), (2, 0)], ids=["no-rows", "no-columns"])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    data = encode(torch.zeros(shape), ggml_type("Q4_K"))
    assert decode(data, ggml_type("Q4_K")).shape == shape


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4], ids=str)
def test_refuses_weights_that_spoil_scales(bad: float) -> None:
    weights = matrix()
    weights[1, 3] = bad
    with pytest.raises(NumericalError, match="encode to Q6_K"):
        encode(weights, ggml_type("Q6_K"))


@needs_kernels
@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.ones(511), ShapeError),
        (torch.ones(512).double(), FormatError),
        (torch.full((512,), float("nan")), NumericalError),
        (-torch.ones(512), NumericalError),
    ],
    ids=["length", "dtype", "nan", "negative"],
)
def test_refuses_importances(weight: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="encode to Q4_K"):
        encode(matrix(), ggml_type("Q4_K"), weight)


@needs_kernels
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "IQ4_NL", "Q2_K", "Q4_K", "Q6_K"])
def test_importances_count_by_their_ratios_alone(kind: str) -> None:
    # ggml squares sums of them in float32: of the last two it would end the process, or see nothing.
    importance = torch.rand(512, generator=torch.Generator().manual_seed(4)) + 0.1
    made = [encode(matrix(), ggml_type(kind), importance * 2.0**power).tobytes() for power in (0, 9, -30, 120, -120)]
    assert len(set(made)) == 1


def test_refuses_shapes_that_are_not_whole_blocks() -> None:
    with pytest.raises(ShapeError):
        encode(torch.zeros(2, 576), ggml_type("Q4_K"))
    with pytest.raises(FormatError, match="Expected a CPU float32 matrix"):
        encode(torch.zeros(2, 512).half(), ggml_type("Q4_K"))
    with pytest.raises(FormatError, match="144-byte blocks"):
        decode(np.zeros((2, 143), dtype=np.uint8), ggml_type("Q4_K"))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from bpwise.convert.gguf.ggml import kernels as ggml

    ggml._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BpwiseError, match=r"pip install '.\[gguf\]'"):
        encode(matrix(), ggml_type("Q4_K"))
    assert not ggml.kernels_available()


def test_the_table_needs_no_library() -> None:
    code = "import sys, bpwise.convert.gguf.ggml.kernels as g; g.ggml_type('Q4_K'); "
    code += "assert not {'libggml', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kernels
def test_loading_leaves_logging_alone() -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    encode(matrix(), ggml_type("Q4_K"))
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
