from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.roles import quantizable
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.assign import fallback, mixture_types, require_importance
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix
from bpwise.convert.gguf.llama_cpp.mixtures import MIXTURES, mixture
from bpwise.errors import ConfigError, UnsupportedModelError

# What llama-quantize --dry-run says; make_golden.py tells how it was made.
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["types"]

MakeGguf = Callable[..., Path]


@pytest.mark.parametrize("model", GOLDEN)
def test_types_are_those_of_llama_quantize(
    model: str, make_gguf: MakeGguf, make_importance: Callable[[str], ImportanceMatrix]
) -> None:
    header = read_gguf_header(make_gguf(model, values=False))
    for name, digests in GOLDEN[model].items():
        for importance, expected in zip((None, make_importance(model).sums), digests, strict=True):
            if expected is None:
                with pytest.raises(ConfigError, match="would be garbage without importances"):
                    mixture_types(MIXTURES[name], header, importance=importance)
                continue
            types = mixture_types(MIXTURES[name], header, importance=importance)
            lines = "".join(f"{tensor} {kind.name.upper()}\n" for tensor, kind in types.items())
            assert hashlib.sha256(lines.encode()).hexdigest()[:16] == expected, name


def test_what_needs_importances_is_known_before_there_is_a_file(make_gguf: MakeGguf) -> None:
    # From what llama-quantize says: where it refuses, it is for the query projections among others.
    compared = 0
    for model in GOLDEN:
        tensor = read_gguf_header(make_gguf(model, values=False)).tensors.get("blk.0.attn_q.weight")
        for name, (blind, _) in GOLDEN[model].items():
            if tensor is None or tensor.shape[-1] % 32:
                continue  # fused; or odd, where only other tensors have whole blocks
            with nullcontext() if blind else pytest.raises(ConfigError, match="garbage without importances"):
                require_importance(MIXTURES[name], tensor.shape[-1])
            compared += blind is None
    assert compared > 10


def test_a_small_case_by_hand(make_gguf: MakeGguf) -> None:
    types = mixture_types(mixture("q4_k"), read_gguf_header(make_gguf("tied", values=False)), importance=None)
    assert types["token_embd.weight"].name == "Q6_K"
    assert types["output_norm.weight"].name == "F32"
    assert types["blk.0.attn_q.weight"].name == "Q4_K"
    # 9 layers: the first of them, the last two (from 7 on), and every third after the first get more bits.
    better = [layer for layer in range(9) if types[f"blk.{layer}.ffn_down.weight"].name == "Q6_K"]
    assert better == [0, 3, 6, 7, 8]


def test_a_tensor_without_importances_in_a_matrix_of_others(
    make_gguf: MakeGguf, make_importance: Callable[[str], ImportanceMatrix]
) -> None:
    header = read_gguf_header(make_gguf("tied", values=False))
    known = set(make_importance("tied").sums) - {"blk.3.ffn_up.weight"}
    with pytest.raises(ConfigError, match=r"blk\.3\.ffn_up\.weight at IQ2_XS"):
        mixture_types(mixture("IQ2_XS"), header, importance=known)
    mixture_types(mixture("Q2_K"), header, importance=known)


def test_names() -> None:
    assert mixture("q3_k") is MIXTURES["Q3_K_M"]
    assert mixture("iq4_xs").file_type == 30
    with pytest.raises(ConfigError, match=r"'Q9'. Expected one of F32, F16"):
        mixture("Q9")


def test_file_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    for name, chosen in MIXTURES.items():
        known = {entry.name.removeprefix("MOSTLY_").removeprefix("ALL_"): entry.value for entry in gguf.LlamaFileType}
        assert known[name] == chosen.file_type


def test_refuses_architectures_with_rules_of_their_own(make_gguf: MakeGguf, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_gguf_header(make_gguf("tied", values=False))
    monkeypatch.setitem(header.metadata, "general.architecture", "glm5-next")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="rules of its own"):
        mixture_types(mixture("Q4_K_M"), header, importance=None)


def test_what_is_quantized(make_gguf: MakeGguf) -> None:
    header = read_gguf_header(make_gguf("eight-experts", values=False))
    assert not quantizable("blk.0.ffn_gate_inp.weight", header.tensors["blk.0.ffn_gate_inp.weight"].shape)
    assert not quantizable("blk.0.attn_norm.weight", header.tensors["blk.0.attn_norm.weight"].shape)
    assert quantizable("blk.0.ffn_down_exps.weight", header.tensors["blk.0.ffn_down_exps.weight"].shape)
    assert quantizable("token_embd.weight", header.tensors["token_embd.weight"].shape)


@pytest.mark.parametrize(
    ("kind", "row_weights", "expected"),
    [("Q4_K", 512, "Q4_K"), ("Q4_K", 576, "Q5_0"), ("IQ3_S", 576, "IQ4_NL"), ("Q6_K", 40, "F16"), ("Q4_0", 40, "F16")],
)
def test_fallbacks(kind: str, row_weights: int, expected: str) -> None:
    assert fallback(ggml_type(kind), row_weights).name == expected
