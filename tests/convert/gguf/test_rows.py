"""The map of rows: found by value among synthetic matrices, and kept as text."""

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.kernels import decode, encode, ggml_type
from bpwise.convert.gguf.rows.foreign import LikeOutputs
from bpwise.convert.gguf.rows.matching import LinearOutputs
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.gguf.rows.slices import joined_weight, stored_part
from bpwise.convert.gguf.rows.text import map_from_text, map_to_text
from bpwise.errors import FormatError
from torch import Tensor

Weights = dict[str, Tensor]


def matrices(**shapes: tuple[int, int]) -> Weights:
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}


def rebuilt(rows: TensorRows, weights: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a map describes, row by row."""
    picked = [weights[rows.linears[s]][o] for s, o in zip(rows.source, rows.output, strict=True)]
    whole = torch.stack(picked)
    return whole if rows.columns is None else whole[:, torch.from_numpy(rows.columns)]


W = matrices(q=(64, 32), k=(32, 32), v=(32, 32), gate=(48, 32), up=(48, 32), down=(32, 48), out=(32, 64))


def by_heads(weight: Tensor, heads: int) -> Tensor:
    """Llama's order: rows half a head apart become neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


PERMUTATION = torch.randperm(64, generator=torch.Generator().manual_seed(2))

TENSORS: dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]] = {
    "in-place": (lambda: W["q"], ("q",)),
    "within-heads": (lambda: by_heads(W["q"], 4), ("q",)),
    "joined": (lambda: torch.cat([W["q"], W["k"], W["v"]]), ("q", "k", "v")),
    "a-part": (lambda: W["q"][32:], ("q",)),
    "every-other-row": (lambda: W["q"][::2], ("q",)),
    "interleaved": (lambda: torch.stack([W["gate"], W["up"]], dim=1).flatten(0, 1), ("gate", "up")),
    "stacked": (lambda: torch.stack([W["gate"], W["up"]]), ("gate", "up")),
    "columns": (lambda: W["out"][:, PERMUTATION], ("out",)),
    "rows-and-columns": (lambda: by_heads(W["out"], 4)[:, PERMUTATION], ("out",)),
    "blocks-of-columns": (lambda: W["out"].view(32, 4, 16)[:, [2, 0, 3, 1]].reshape(32, 64), ("out",)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_finds_whatever_a_converter_does_with_rows(name: str, dtype: torch.dtype) -> None:
    make, linears = TENSORS[name]
    values, outputs = make().to(dtype), LinearOutputs(W)
    rows = outputs.find(values)
    if rows is None:
        rows = outputs.find_reordered(values)
    assert rows is not None
    assert rows.linears == linears
    assert torch.equal(rebuilt(rows, W).to(dtype), values.flatten(0, -2))
    assert (rows.columns is not None) == ("columns" in name)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: 2 * w,
        lambda w: w + 1,
        lambda w: torch.where(torch.arange(w.shape[1]) == 5, w.roll(1, 0), w),
        lambda w: torch.cat([w, w.new_ones(1, 32)]),
        lambda w: w[:, :16].contiguous(),
        lambda w: torch.stack([row[torch.randperm(32)] for row in w]),
    ],
    ids=["scaled", "moved", "one-column-of-other-rows", "a-row-more", "half-rows", "columns-of-each-row"],
)
def test_does_not_find_anything_else(change: Callable[[Tensor], Tensor]) -> None:
    outputs = LinearOutputs(W)
    assert outputs.find(change(W["v"])) is None
    assert outputs.find_reordered(change(W["v"])) is None


def test_a_split_linear_and_what_is_missing_of_it() -> None:
    # Qwen3-Next: q, k, v and z of each head one after another in one linear, two tensors in the file.
    fused = torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
    heads = fused.view(4, 24, 32)
    outputs = LinearOutputs({"qkvz": fused})
    first, second = (outputs.find(part.flatten(0, 1)) for part in (heads[:, :16], heads[:, 16:20]))
    assert first is not None
    assert second is not None
    rows = RowMap({"a": first, "b": second}, {})
    parts = rows.parts("qkvz")
    assert [part.tensor for part in parts] == ["a", "b"]
    assert parts[1].outputs.tolist() == [24 * head + 16 + i for head in range(4) for i in range(4)]
    assert parts[1].rows.tolist() == list(range(16))
    assert not any(part.holds_all(96) for part in parts)
    assert rows.missing({"qkvz": 96}) == {"qkvz": 16}
    assert rows.missing({"other": 4}) == {"other": 4}


def test_parts_say_where_rows_go() -> None:
    values = by_heads(W["q"], 4)
    found = LinearOutputs(W).find(values)
    assert found is not None
    (part,) = RowMap({"t": found}, {}).parts("q")
    assert part.holds_all(64)
    assert part.outputs.tolist() == list(range(64))
    assert torch.equal(values[torch.from_numpy(part.rows)], W["q"])


@pytest.mark.parametrize("count", [2, 8])
def test_experts_that_were_copied_go_each_to_its_own(count: int) -> None:
    # Upcycled mixtures begin with copies of one MLP.
    experts = {f"{e}.{part}": W[part] for e in range(count) for part in ("gate", "up")}
    outputs = LinearOutputs(experts)
    for part in ("up", "gate"):
        rows = outputs.find(torch.stack([W[part]] * count))
        assert rows is not None
        assert rows.linears == tuple(f"{e}.{part}" for e in range(count))
        assert rows.output.tolist() == list(range(48)) * count


def test_equal_tables_are_told_apart_by_their_order() -> None:
    table = torch.randn(20, 32)
    outputs = LinearOutputs({"embed": table, "head": table.clone()})
    first, second = outputs.find(table), outputs.find(table)
    assert first is not None
    assert second is not None
    assert (first.linears, second.linears) == (("embed",), ("head",))


def test_equal_rows_belong_to_the_linear_of_the_others() -> None:
    first, second = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(4))
    first[[3, 7, 39]] = 0
    second[[0, 7, 8]] = 0
    outputs = LinearOutputs({"first": first, "second": second})
    for name, weight in (("second", second), ("first", first)):
        shuffled = weight[torch.randperm(40, generator=torch.Generator().manual_seed(5))]
        rows = outputs.find(shuffled)
        assert rows is not None
        assert rows.linears == (name,)
        assert sorted(rows.output.tolist()) == list(range(40))


def test_padding_of_a_vocabulary_stays_in_place() -> None:
    table = torch.randn(4000, 32, generator=torch.Generator().manual_seed(6))
    table[1000:] = 0.0
    rows = LinearOutputs({"embed": table}).find(table)
    assert rows is not None
    assert np.array_equal(rows.output, np.arange(4000))


def test_equal_columns() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    weight[:, 1::2] = weight[:, ::2]
    outputs = LinearOutputs({"w": weight})
    values = weight[:, PERMUTATION]
    assert outputs.find(values) is None
    rows = outputs.find_reordered(values)
    assert rows is not None
    assert torch.equal(rebuilt(rows, {"w": weight}), values)
    assert rows.columns is not None
    assert sorted(rows.columns.tolist()) == list(range(64))


FACTORS = {
    "one": torch.tensor([0.39062499999999994]).expand(48),
    "negative": torch.tensor([-5.656854249492381]).expand(48),
    "runs": torch.tensor([0.441941738, 0.3125, 0.625, 1.0]).repeat_interleave(12),
    "one-a-row": torch.linspace(0.5, 3.0, 48) * torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0),
}


def multiplied(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of ``up`` times factors, as a converter makes them: in float32, by two factors one after the other."""
    return (W["up"].float() * (factors / 1.25)[:, None] * 1.25).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_finds_what_rows_were_multiplied_with(name: str, dtype: torch.dtype) -> None:
    values, outputs = multiplied(FACTORS[name], dtype), LinearOutputs(W)
    assert outputs.find(values) is None
    assert outputs.find_reordered(values) is None
    rows = outputs.find_scaled(values)
    assert rows is not None
    assert rows.factors is not None
    assert (rows.linears, rows.output.tolist()) == (("up",), list(range(48)))
    found = torch.from_numpy(rows.factors)
    # Half a unit in the last place: rows whose factors differ by less are not told apart.
    assert torch.allclose(found, FACTORS[name], rtol=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert len(np.unique(rows.factors)) == len(FACTORS[name].unique())
    assert outputs.find_scaled(values) is None  # it is held now


def test_rows_of_zeros_have_any_factor() -> None:
    weight = W["up"].clone()
    weight[[0, 7, 20, 47]] = 0
    weight[:, 3] = 0
    rows = LinearOutputs({"w": weight}).find_scaled(weight.float() * FACTORS["runs"][:, None])
    assert rows is not None
    assert rows.factors is not None
    assert np.allclose(rows.factors, FACTORS["runs"].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: torch.where(torch.arange(32) == 5, 1.01 * w, w),
        lambda w: 2 * w + 1e-3,
        lambda w: torch.where(torch.arange(48)[:, None] == 7, 0.0, 2 * w),
        lambda w: torch.where(torch.arange(48)[:, None] == 7, torch.inf, 2 * w),
        lambda w: 2 * w.roll(1, 0),
        lambda w: 2 * w[:40],
        lambda w: torch.randn(48, 32, generator=torch.Generator().manual_seed(8)),
    ],
    ids=["one-column", "moved", "to-zero", "to-infinity", "other-rows", "a-part", "another"],
)
def test_does_not_find_other_rows_multiplied(change: Callable[[Tensor], Tensor]) -> None:
    outputs = LinearOutputs(W)
    assert outputs.find_scaled(change(W["up"].float())) is None
    made_of_zeros = LinearOutputs({"w": torch.zeros(48, 32)})
    assert made_of_zeros.find_scaled(change(W["up"].float()).abs() + 1) is None


def test_multiplied_rows_are_put_back() -> None:
    weight = W["up"].float()
    rows = LinearOutputs(W).find_scaled(multiplied(FACTORS["one-a-row"], torch.float32))
    assert rows is not None
    (part,) = RowMap({"t": rows}, {}).parts("up")
    assert part.holds_all(48)
    assert not part.is_weight(48)
    stored = stored_part(weight.T, part).T
    assert torch.allclose(stored, multiplied(FACTORS["one-a-row"], torch.float32), rtol=1e-5)
    again = joined_weight([part], [stored], (48, 32), pytest.fail)
    assert torch.allclose(again, weight, rtol=1e-5)


@pytest.mark.parametrize("name", [None, *FACTORS])
def test_multiplied_rows_of_rounded_files_are_found_by_likeness(name: str | None) -> None:
    values = W["up"].float() if name is None else multiplied(FACTORS[name], torch.float32)
    step = values.abs().amax(dim=1, keepdim=True) / 7
    rows = LikeOutputs(W).find((values / step).round() * step)
    assert rows is not None
    assert (rows.linears, rows.output.tolist()) == (("up",), list(range(48)))
    assert (rows.factors is None) == (name is None)
    if name is not None:
        assert rows.factors is not None
        assert np.allclose(rows.factors, FACTORS[name].numpy(), rtol=0.1)


def example() -> RowMap:
    outputs = LinearOutputs({f"blocks.{b}.{name}": x + b for b in range(3) for name, x in W.items()})
    found = {}
    for b in range(3):
        found[f"blk.{b}.qkv"] = outputs.find(torch.cat([by_heads(W["q"], 4), W["k"], W["v"]]) + b)
        found[f"blk.{b}.exps"] = outputs.find(torch.stack([W["gate"], W["up"]]) + b)
        found[f"blk.{b}.out"] = outputs.find_reordered(W["out"][:, PERMUTATION] + b)
        found[f"blk.{b}.down"] = outputs.find(W["down"] + b)
    for name in ("one", "runs"):
        found[name] = LinearOutputs(W).find_scaled(multiplied(FACTORS[name], torch.bfloat16))
    assert None not in found.values()
    return RowMap({name: rows for name, rows in found.items() if rows is not None}, {"blk.9.x": "of no block"})


def test_text_says_it_all() -> None:
    rows = example()
    text = map_to_text(rows)
    again = map_from_text(text, "here")
    assert again.unexplained == rows.unexplained
    assert list(again.tensors) == list(rows.tensors)
    for name, own in rows.tensors.items():
        read = again.tensors[name]
        assert read.linears == own.linears
        assert np.array_equal(read.source, own.source)
        assert np.array_equal(read.output, own.output)
        assert (read.columns is None) == (own.columns is None)
        assert read.columns is None or np.array_equal(read.columns, own.columns)
        assert (read.factors is None) == (own.factors is None)
        assert read.factors is None or np.array_equal(read.factors, own.factors)
        assert read.factors is None or read.factors.dtype == np.float32
    assert map_to_text(again) == text
    # Three blocks take no more orders than one: q's, the joined and the stacked sources, the columns; and the factors.
    assert len(json.loads(zlib.decompress(base64.b64decode(text)))["orders"]) == 6


FOUR_BITS = pytest.mark.skipif(not measured_types(), reason="ggml's library is not installed")


def rounded(values: Tensor, kind: str = "Q4_0") -> Tensor:
    """What a reader makes of a tensor in four bits."""
    rows = values.float().flatten(0, -2).contiguous()
    return decode(encode(rows, ggml_type(kind)), ggml_type(kind)).view(values.shape)


@FOUR_BITS
@pytest.mark.parametrize("name", sorted(TENSORS.keys() - {"rows-and-columns"}))
def test_finds_quantized_rows_by_likeness(name: str) -> None:
    make, linears = TENSORS[name]
    weights = {linear: weight.float() for linear, weight in W.items()}
    rows = LikeOutputs(weights).find(rounded(make()))
    assert rows is not None
    assert rows.linears == linears
    assert torch.equal(rebuilt(rows, weights), make().float().flatten(0, -2))


@FOUR_BITS
def test_likeness_believes_no_other_model() -> None:
    rng = torch.Generator().manual_seed(9)
    likes = LikeOutputs({name: torch.randn(W[name].shape, generator=rng) for name in ("q", "v", "out")})
    for values in (W["q"], W["v"], W["out"]):
        assert likes.find(rounded(values)) is None
    assert LikeOutputs({}).find(torch.ones(2, 32)) is None


@FOUR_BITS
def test_likeness_tells_experts_apart() -> None:
    rng = torch.Generator().manual_seed(8)
    experts = {f"{e}.{part}": torch.randn(48, 32, generator=rng) for e in range(6) for part in ("gate", "up")}
    experts["5.up"] = experts["4.up"].clone()  # copies go each to its own
    likes = LikeOutputs(experts)
    for part in ("up", "gate"):
        rows = likes.find(rounded(torch.stack([experts[f"{e}.{part}"] for e in range(6)])))
        assert rows is not None
        assert rows.linears == tuple(f"{e}.{part}" for e in range(6))
        assert rows.output.tolist() == list(range(48)) * 6


def test_fits() -> None:
    rows = example()
    shapes = {
        f"blk.{b}.{name}": shape
        for b in range(3)
        for name, shape in {"qkv": (128, 32), "exps": (2, 48, 32), "out": (32, 64), "down": (32, 48)}.items()
    }
    shapes |= dict.fromkeys(("one", "runs"), (48, 32))
    assert rows.fits({**shapes, "other": (3,)})
    assert not rows.fits({**shapes, "blk.1.exps": (2, 24, 32)})
    assert not rows.fits({**shapes, "blk.1.out": (32, 32)})
    del shapes["blk.2.down"]
    assert not rows.fits(shapes)


def packed(content: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()


TENSOR = {"linears": ["a"], "rows": 2, "source": None, "output": 0, "columns": None, "factors": [], "scaled": None}
CONTENT = {"version": 2, "orders": [[1, -1]], "tensors": {"t": TENSOR}, "unexplained": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be unpacked|incomplete"),
        ("???", "cannot be unpacked"),
        (packed(CONTENT)[:-8], "cannot be unpacked|incomplete"),
        (packed([]), "not a valid value|Expected"),
        (packed({**CONTENT, "version": 1}), "another version. Got 1. Expected 2"),
        (packed({**CONTENT, "orders": [[1, 1 << 40]]}), "not a valid value"),
        (packed({**CONTENT, "orders": []}), "cannot be"),
        (packed({**CONTENT, "orders": [[0, 1, 1]]}), "cannot be"),
        (packed({**CONTENT, "orders": [[-1, 1]]}), "cannot be"),
        (packed({**CONTENT, "tensors": {"t": {**TENSOR, "linears": []}}}), "no linears"),
        (packed({**CONTENT, "tensors": {"t": {**TENSOR, "rows": 1 << 40}}}), "not a valid value"),
        (packed({**CONTENT, "tensors": {"t": {**TENSOR, "source": 0}}}), "cannot be"),
        (packed({**CONTENT, "tensors": {"t": {**TENSOR, "columns": 0}}, "orders": [[1, 0]]}), "each there once"),
        (packed({**CONTENT, "tensors": {"t": {**TENSOR, "factors": [2.0], "scaled": 0}}}), "cannot be"),
        *(
            (packed({**CONTENT, "tensors": {"t": {**TENSOR, "factors": [factor]}}}), "zero or infinite")
            for factor in (0.0, 1e-60, 1e60, float("nan"), float("inf"))
        ),
    ],
)
def test_refuses_damaged_text(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        map_from_text(text, "here")


def test_a_good_text_is_read() -> None:
    rows = map_from_text(packed(CONTENT), "here").tensors["t"]
    assert rows.output.tolist() == [1, 0]
    assert rows.source.tolist() == [0, 0]
    assert rows.factors is None
