from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.file import linear as linear_module
from bpwise.convert.exl2.file.layout import RowGroup, linear_bits
from bpwise.convert.exl2.file.linear import QuantizedLinear, effective_scale
from bpwise.convert.exl2.file.store import linear_from_tensors, linear_tensors
from bpwise.errors import BpwiseError, FormatError, ShapeError
from torch import Tensor

LINEARS = {
    **{f"{bits}-bit": (40, [(bits, 32)]) for bits in (8, 6, 5, 4, 3, 2)},
    "all-widths": (40, [(8, 32), (6, 64), (5, 32), (4, 96), (3, 32), (2, 32)]),
    "equal-widths-unequal-rows": (32, [(4, 96), (4, 32), (3, 64), (3, 32)]),
    "one-column": (1, [(6, 32), (3, 32)]),
    "last-group-of-16-rows": (33, [(4, 32), (2, 48)]),
}


@pytest.mark.parametrize(("out", "groups"), LINEARS.values(), ids=LINEARS.keys())
def test_agrees_with_the_naive_decoder(
    out: int,
    groups: list[tuple[int, int]],
    make_linear: Callable[..., QuantizedLinear],
    naive_decode: Callable[..., Any],
) -> None:
    linear = make_linear(out, groups, seed=out, bias=True)
    tensors = linear_tensors("l", linear)
    codes, weight = naive_decode("l", tensors)
    dense = linear.dequantize()
    assert dense.dtype == torch.float16
    # Bit for bit, but for the sign of zero, which has no meaning: a code times the scale 0.
    assert torch.equal(dense, torch.from_numpy(weight[:out]))
    assert torch.equal(linear.codes.long(), torch.from_numpy(codes[:, :out]))
    assert not weight[out:].any()
    # Section 5 of the format document counts exactly what is stored.
    stored = sum(t.numel() * t.element_size() * 8 for n, t in tensors.items() if n != "l.bias")
    assert linear.stored_bits == stored == linear_bits(out, linear.groups)

    back = linear_from_tensors("l", tensors, out)
    assert back.groups == linear.groups
    for part in ("codes", "scale_codes", "max_scales", "order", "bias"):
        assert torch.equal(getattr(back, part), getattr(linear, part)), part


def test_decodes_a_few_outputs_at_a_time(
    make_linear: Callable[..., QuantizedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = make_linear(40, [(6, 32), (4, 64), (2, 16)], seed=0)
    at_once = decoded.dequantize()
    monkeypatch.setattr(linear_module, "_CHUNK_ELEMENTS", 7 * decoded.in_features)
    assert torch.equal(decoded.dequantize(), at_once)


def test_dtypes_and_padding(make_linear: Callable[..., QuantizedLinear]) -> None:
    linear = make_linear(33, [(4, 32), (2, 32)], bias=True)
    tensors = linear_tensors("a.b", linear)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "a.b.q_weight": (torch.int32, (6, 64)),
        "a.b.q_scale": (torch.int32, (2, 8)),
        "a.b.q_scale_max": (torch.float16, (2,)),
        "a.b.q_groups": (torch.int16, (4,)),
        "a.b.q_invperm": (torch.int32, (64,)),
        "a.b.bias": (torch.float16, (64,)),
    }
    assert tensors["a.b.q_groups"].tolist() == [4, 0, 2, 4]
    # Padding codes 8 and 2 in every place, padding scale codes 15.
    assert tensors["a.b.q_weight"][:4, 33:].unique().tolist() == [0x88888888 - (1 << 32)]
    assert tensors["a.b.q_weight"][4:, 33:].unique().tolist() == [0xAAAAAAAA - (1 << 32)]
    assert tensors["a.b.q_scale"][:, 5:].unique().tolist() == [-1]
    assert not tensors["a.b.bias"][33:].any()
    invperm = tensors["a.b.q_invperm"].long()
    assert torch.equal(linear.order[invperm], torch.arange(64))


def test_effective_scale_rounds_twice() -> None:
    # A 256th of it lies halfway between 65 and 66 subnormal steps of 2^-24; a tie goes to the even one.
    max_scale = torch.tensor([65.5 * 2.0**-16], dtype=torch.float16)
    expected = torch.tensor([[66 * 2.0**-24, 66 * 2.0**-16]], dtype=torch.float16)
    assert torch.equal(effective_scale(max_scale, torch.tensor([[0, 15]])), expected)


def _break(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[key] = change(tensors[key])

    return apply


def _put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


# The linear under test: 40 columns, groups (4 bits, 32 rows) and (3 bits, 64 rows): 4 + 6 words.
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[BpwiseError], str]] = {
    "missing": (lambda t: t.pop("l.q_invperm"), FormatError, "l.q_invperm: missing"),
    "scale-max-dtype": (_break("l.q_scale_max", lambda t: t.float()), FormatError, "torch.float32"),
    "groups-dtype": (_break("l.q_groups", lambda t: t.int()), FormatError, "torch.int32"),
    "invperm-dtype": (_break("l.q_invperm", lambda t: t.long()), FormatError, "torch.int64"),
    "bias-dtype": (_break("l.bias", lambda t: t.bfloat16()), FormatError, "torch.bfloat16"),
    "weight-vector": (_break("l.q_weight", lambda t: t[0]), FormatError, r"shape \(64,\). Expected a matrix"),
    "weight-columns": (_break("l.q_weight", lambda t: t[:, :32]), ShapeError, "q_weight"),
    "scale-columns": (_break("l.q_scale", lambda t: t[:, :4]), ShapeError, "q_scale"),
    "scale-max-count": (_break("l.q_scale_max", lambda t: t[:1]), ShapeError, "q_scale_max"),
    "bias-length": (_break("l.bias", lambda t: t[:40]), ShapeError, "bias"),
    "odd-groups": (_break("l.q_groups", lambda t: t[:3]), FormatError, "2 \\* groups"),
    "width-7": (_break("l.q_groups", _put(0, 7)), FormatError, "bit widths"),
    "first-offset": (_break("l.q_groups", _put(1, 1)), FormatError, "start at 0"),
    "offset-beyond-end": (_break("l.q_groups", _put(3, 10)), FormatError, "increase up to 10"),
    "partial-block": (_break("l.q_groups", _put(3, 5)), FormatError, "32-row blocks"),
    "width-increases": (_break("l.q_groups", lambda t: t[[2, 1, 0, 1]]), FormatError, "offsets"),
    "row-count": (_break("l.q_weight", lambda t: torch.cat([t, t[:3]])), ShapeError, "q_invperm"),
    "not-a-permutation": (_break("l.q_invperm", _put(0, 96)), FormatError, "not a permutation"),
    "infinite-largest scale": (_break("l.q_scale_max", _put(0, float("inf"))), FormatError, "finite"),
    "negative-largest scale": (_break("l.q_scale_max", _put(1, -0.5)), FormatError, "not negative"),
    "too-large-a-largest scale": (_break("l.q_scale_max", _put(0, 60000.0)), FormatError, "fp16 can hold"),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_refuses_broken_tensors(
    damage: Callable[[dict[str, Tensor]], Any],
    error: type[BpwiseError],
    message: str,
    make_linear: Callable[..., QuantizedLinear],
) -> None:
    tensors = linear_tensors("l", make_linear(40, [(4, 32), (3, 64)], bias=True))
    damage(tensors)
    with pytest.raises(error, match=message) as caught:
        linear_from_tensors("l", tensors, 40)
    assert str(caught.value).startswith("l")


def test_refuses_increasing_widths_in_a_file(make_linear: Callable[..., QuantizedLinear]) -> None:
    tensors = linear_tensors("l", make_linear(32, [(4, 96), (3, 128)]))
    # The same 24 words read as 3-bit rows first: 12 words are 128 rows, then 12 words are 96 rows of 4 bits.
    tensors["l.q_groups"] = torch.tensor([3, 0, 4, 12], dtype=torch.int16)
    with pytest.raises(FormatError, match="never increase"):
        linear_from_tensors("l", tensors, 32)


CHANGES: dict[str, tuple[dict[str, Any], type[BpwiseError], str]] = {
    "no-groups": ({"groups": ()}, ShapeError, "scale codes"),
    "width": ({"groups": (RowGroup(7, 32), RowGroup(3, 64))}, FormatError, "bit widths"),
    "order-of-widths": ({"groups": (RowGroup(3, 32), RowGroup(4, 64))}, FormatError, "never increase"),
    "rows": ({"groups": (RowGroup(4, 48), RowGroup(3, 48))}, FormatError, "multiple of 32"),
    "sixteen-rows-before-the-last": (
        {"groups": (RowGroup(2, 16), RowGroup(2, 80))},
        FormatError,
        "multiple of 32",
    ),
    "too-few-rows": ({"groups": (RowGroup(4, 32), RowGroup(3, 32))}, FormatError, "hold 64 rows"),
    "code-dtype": ({"codes": torch.zeros(96, 40, dtype=torch.int32)}, FormatError, "codes"),
    "code-too-large": ({"codes": torch.full((96, 40), 9, dtype=torch.uint8)}, FormatError, "3-bit group"),
    "no-columns": ({"codes": torch.zeros(96, 0, dtype=torch.uint8)}, FormatError, "Expected a matrix"),
    "scale-code": ({"scale_codes": torch.full((2, 40), 16, dtype=torch.uint8)}, FormatError, "0 to 15"),
    "order": ({"order": torch.zeros(96, dtype=torch.int64)}, FormatError, "permutation"),
    "bias": ({"bias": torch.zeros(64, dtype=torch.float16)}, ShapeError, "bias"),
}


@pytest.mark.parametrize(("change", "error", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_refuses_broken_linears(
    change: dict[str, Any],
    error: type[BpwiseError],
    message: str,
    make_linear: Callable[..., QuantizedLinear],
) -> None:
    with pytest.raises(error, match=message):
        linear_tensors("l", replace(make_linear(40, [(4, 32), (3, 64)]), **change))
