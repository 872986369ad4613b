"""Plans within limits: widths that linears may have, linears in float16, sizes."""

import itertools
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpwise.convert.exl2.file.layout import RowGroup, linear_bits
from bpwise.convert.exl2.plan.making import exl2_bpw_range, make_exl2_plan, measured_limit
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.plan.problem import SizeLimit, WidthOverride
from bpwise.convert.exl2.plan.unquantized import unquantized_lines
from bpwise.convert.registry import load_plan
from bpwise.errors import BudgetError, ConfigError
from bpwise.measure.measurement import Measurement
from numpy.typing import NDArray

from ...measured import EXL2, WIDTHS, bare_measurement, damage_of, exl2_of

ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def damage(rows: int, rng: np.random.Generator) -> NDArray[Any]:
    groups = -(-rows // 32)
    scale = 10 ** rng.uniform(-2, 0, (groups, 1))
    return (scale * 4.0 ** -np.array(WIDTHS) * rng.uniform(0.9, 1.1, (groups, len(WIDTHS)))).astype(np.float32)


def measurement(
    linears: list[tuple[str, int, int]] | None = None, *, head: int = 64, tied: bool = False, seed: int = 0
) -> Measurement:
    rng = np.random.default_rng(seed)
    if linears is None:
        linears = [(f"model.layers.{i}.{x}", 96 if "down" in x else 64, 64) for i in range(3) for x in ATTENTION + MLP]
    shapes = {name: (rows, columns) for name, rows, columns in (*linears, ("lm_head", head, 100))}
    damages = {name: damage(rows, rng) for name, (rows, _) in shapes.items()}
    orders = {name: np.arange(rows, dtype=np.int32) for name, (rows, _) in shapes.items()}
    made = bare_measurement(shapes, {EXL2: exl2_of(damages, orders, 32)}, other_weights=7 * 64)
    table = replace(made.embedding, importance=np.ones(64, dtype=np.float32), tied=tied)
    return replace(made, embedding=table)


def parsed(*texts: str) -> tuple[WidthOverride, ...]:
    return tuple(map(WidthOverride.parse, texts))


def widths_of(plan: Exl2Plan) -> dict[str, set[int]]:
    return {p.name: set(p.group_bits) for p in (*plan.linears, *([plan.head] if plan.head else []))}


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("a=6", (6,)),
        ("a=5:", (8, 6, 5)),
        ("a=:4", (4, 3, 2)),
        ("a=4:6", (6, 5, 4)),
        ("a=b=7:", (8,)),
        ("a=2:8", WIDTHS),
    ],
)
def test_override_is_read(text: str, widths: tuple[int, ...]) -> None:
    override = WidthOverride.parse(text)
    assert override.pattern == text.rpartition("=")[0]
    assert override.widths == widths


@pytest.mark.parametrize(
    "text", ["a", "a=", "=4", "a=:", "a=x", "a=7", "a=6:4", "a=16", "a=1", "a=4:5:6", "a=-4", "a=4.5"]
)
def test_override_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="--override"):
        WidthOverride.parse(text)


@pytest.mark.parametrize("seed", range(8))
def test_constrained_optimum_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [("model.layers.0.a", 64, 32), ("model.layers.1.a", 32, 64), ("model.layers.1.b", 32, 40)]
    measured = measurement(shapes, seed=seed)
    allowed = {"model.layers.0.a": (8, 6, 5), "model.layers.1.a": (4, 3, 2), "model.layers.1.b": WIDTHS}
    overrides = parsed("*.0.*=5:", "*.1.a=:4")
    sizes = {name: (rows, columns) for name, rows, columns in shapes}
    # All ways to give the four groups of 32 rows a width, by the format's own count of bits.
    found: list[tuple[float, float]] = []
    names = ["model.layers.0.a", "model.layers.0.a", "model.layers.1.a", "model.layers.1.b"]
    weights = sum(rows * columns for rows, columns in sizes.values())
    curves = {x.name: damage_of(measured, x.name) for x in measured.linears}
    for choice in itertools.product(*(allowed[name] for name in names)):
        groups = {name: [bits for at, bits in zip(names, choice, strict=True) if at == name] for name in sizes}
        bits = sum(linear_bits(sizes[n][1], [RowGroup(b, 32) for b in each]) for n, each in groups.items())
        damage = sum(curves[n][i, WIDTHS.index(b)] for n, each in groups.items() for i, b in enumerate(each))
        found.append((bits / weights, float(damage)))
    lowest, highest = min(x for x, _ in found), max(x for x, _ in found)
    assert exl2_bpw_range(measured, overrides=overrides) == pytest.approx((lowest, highest), rel=1e-12)
    exact = 0
    targets = rng.uniform(lowest, highest, 12)
    for bpw in targets:
        plan = make_exl2_plan(measured, bpw=bpw, head_bits=16, overrides=overrides)
        best = min(damage for size, damage in found if size <= bpw)
        assert plan.bpw <= bpw
        assert all(widths <= set(allowed[name]) for name, widths in widths_of(plan).items())
        assert plan.lower_bound_nats <= best * (1 + 1e-6)
        assert best <= plan.damage_nats * (1 + 1e-6)
        exact += plan.damage_nats <= best * (1 + 1e-6)
    assert exact >= 6  # so few groups cannot always be filled by the best saving per bit


def test_the_last_override_counts() -> None:
    plan = make_exl2_plan(
        measurement(), bpw=4.75, head_bits=16, overrides=parsed("*=4", "*.1.*=6", "*.1.mlp.*.weight=:3")
    )
    for name, widths in widths_of(plan).items():
        expected = {4} if ".1." not in name else {6} if "self_attn" in name else {3, 2}
        assert widths <= expected, name


def test_constraints_cost_damage() -> None:
    measured = measurement()
    free = make_exl2_plan(measured, bpw=4.5, head_bits=6)
    bound = make_exl2_plan(measured, bpw=4.5, head_bits=6, overrides=parsed("*.0.*=5:"))
    assert bound.damage_nats > free.damage_nats
    assert 4.4 < bound.bpw <= 4.5
    assert bound.head == free.head


def test_budget_that_overrides_leave_no_room_for() -> None:
    measured = measurement()
    with pytest.raises(BudgetError, match="with these overrides") as caught:
        make_exl2_plan(measured, bpw=3.0, head_bits=6, overrides=parsed("*=4:"))
    lowest, _ = exl2_bpw_range(measured, overrides=parsed("*=4:"))
    assert f"from {lowest:.3f}"[:10] in str(caught.value)
    with pytest.raises(BudgetError, match="7 bits per weight cannot be reached"):
        make_exl2_plan(measured, bpw=7.0, head_bits=6, overrides=parsed("model.*=:5"))


@pytest.mark.parametrize("overrides", [(), ("*=4",), ("*=5:6",), ("*.0.*=3", "*.1.*=8")], ids=" ".join)
def test_both_ends_of_the_named_range_can_be_asked_for(overrides: tuple[str, ...]) -> None:
    measured = measurement()
    with pytest.raises(BudgetError) as caught:
        make_exl2_plan(measured, bpw=15.9, head_bits=16, overrides=parsed(*overrides))
    numbers = (
        str(caught.value).split("can have from ")[1].split(" with")[0].removesuffix(". Ask for a size in this range.")
    )
    least, most = map(float, numbers.split(" to "))
    assert least <= most
    for bpw, choose in ((least, min), (most, max)):
        plan = make_exl2_plan(measured, bpw=bpw, head_bits=16, overrides=parsed(*overrides))
        allowed = {x.name: WIDTHS for x in measured.linears}
        for override in parsed(*overrides):
            allowed |= {name: override.widths for name in allowed if fnmatchcase(name, override.pattern)}
        bits = sum(
            linear_bits(p.out_features, [RowGroup(choose(allowed[p.name]), n) for n in p.group_rows])
            for p in plan.linears
        )
        assert plan.decoder_bits == bits
        assert plan.bpw <= bpw < plan.bpw + 1e-4


@pytest.mark.parametrize(
    ("text", "head_bits", "expected"),
    [("lm_head=8", 6, {8}), ("lm_head=:4", 6, {4}), ("lm_head=3", 8, {3}), ("lm_head=8", "auto", {8})],
)
def test_override_of_the_head(text: str, head_bits: int, expected: set[int]) -> None:
    plan = make_exl2_plan(measurement(), bpw=5.0, head_bits=head_bits, overrides=parsed(text))  # type: ignore[arg-type]
    assert plan.head is not None
    assert set(plan.head.group_bits) == expected


def test_override_of_the_head_within_its_bits() -> None:
    measured = measurement(head=640)
    plan = make_exl2_plan(measured, bpw=5.0, head_bits=6, overrides=parsed("lm_head=5:"))
    assert plan.head is not None
    assert min(plan.head.group_bits) == 5
    assert plan.head.stored_bits <= replace(plan.head, group_bits=(6,) * 20).stored_bits


@pytest.mark.parametrize(
    ("override", "keep", "head_bits", "message"),
    [
        ("*.gate=4", (), 6, r"--override \*\.gate: no quantized linear has such a name"),
        ("*.0.mlp.*=4", ("*.0.mlp.*",), 6, "those that have stay in float16"),
        ("lm_head=8", (), 16, "those that have stay in float16"),
        ("*=4", ("*.gate",), 6, r"--keep-fp16 \*\.gate: no linear"),
        (
            "*=4",
            ("*.0.mlp.down_proj",),
            6,
            r"0\.mlp\.down_proj would .* without model\.layers\.0\.mlp\.gate_proj, .*up_proj",
        ),
        ("*=4", ("*.down_proj",), 6, r"likewise in 2 more.*--keep-fp16 '\*\.mlp\.\*'"),
        (
            "*=4",
            ("*.1.self_attn.[qkv]*",),
            6,
            r"without model\.layers\.1\.self_attn\.o_proj.*'model\.layers\.1\.self_attn\.\*'",
        ),
        ("lm_head=4", ("model.*",), 6, "nothing is left to quantize"),
    ],
)
def test_what_is_refused(override: str, keep: tuple[str, ...], head_bits: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_exl2_plan(measurement(), bpw=5.0, head_bits=head_bits, overrides=parsed(override), keep_fp16=keep)


@pytest.mark.parametrize("bpw", [5.0, 6.5, 9.0])
def test_float16_counts_in_the_budget(bpw: float, tmp_path: Path) -> None:
    measured = measurement()
    # A unit may be put together from several patterns.
    keep = ("*.1.mlp.gate_proj", "*.1.mlp.[ud]*_proj.weight")
    plan = make_exl2_plan(measured, bpw=bpw, head_bits=6, keep_fp16=keep)
    names = [f"model.layers.1.{x}" for x in MLP]
    assert [x.name for x in plan.unquantized] == names
    assert [p.name for p in plan.linears] == [x.name for x in measured.linears if x.name not in names]
    weights = sum(x.in_features * x.out_features for x in measured.linears)
    float16_bits = 16 * (2 * 64 * 64 + 96 * 64)
    bits = float16_bits + sum(linear_bits(p.out_features, p.stored_groups) for p in plan.linears)
    assert plan.bpw == pytest.approx(bits / weights, rel=1e-12)
    assert bpw - 0.1 < plan.bpw <= bpw  # the largest step of a group: 2 bits of 32 x 64 of 92160 weights
    assert plan.shares()["16 bits"] == pytest.approx(float16_bits / 16 / weights)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_head_in_float16() -> None:
    measured = measurement()
    for head_bits in (6, "auto"):
        plan = make_exl2_plan(measured, bpw=5.0, head_bits=head_bits, keep_fp16=("lm_head",))  # type: ignore[arg-type]
        assert (plan.head, plan.head_reason) == (None, "asked for")
        assert plan.linears == make_exl2_plan(measured, bpw=5.0, head_bits=16).linears
    assert make_exl2_plan(measured, bpw=5.0, head_bits=16).head_reason is None


def test_what_exl2_cannot_hold_stays_with_its_unit() -> None:
    shapes = [(f"model.layers.{i}.{x}", 80 if "down" in x else 64, 64) for i in range(2) for x in ATTENTION + MLP]
    plan = make_exl2_plan(measurement(shapes), bpw=9.0, head_bits=6)
    assert [x.name for x in plan.unquantized] == [f"model.layers.{i}.{x}" for i in range(2) for x in MLP]
    (line,) = unquantized_lines(plan.unquantized, plan.head_reason)
    assert line.startswith("6 linears, 26624 weights: down_proj has 80 input features")
    assert "multiple of 32" in line
    with pytest.raises(ConfigError, match="nothing is left to quantize"):
        make_exl2_plan(measurement([("model.layers.0.mlp.down_proj", 80, 64)]), bpw=9.0, head_bits=6)


def test_head_that_exl2_cannot_hold() -> None:
    plan = make_exl2_plan(measurement(head=48), bpw=5.0, head_bits=6)
    assert plan.head is None
    assert "48 input features" in str(plan.head_reason)
    assert unquantized_lines(plan.unquantized, plan.head_reason) == [f"lm_head: {plan.head_reason}"]


@pytest.mark.parametrize("head_bits", [6, 16, "auto"])
@pytest.mark.parametrize("tied", [False, True])
def test_size_of_everything(tied: bool, head_bits: int) -> None:
    measured = measurement(tied=tied)
    for max_bytes in (90_000, 100_000, 110_000):
        plan = make_exl2_plan(
            measured, size=measured_limit(measured, max_bytes), head_bits=head_bits, keep_fp16=("*.2.self_attn.*",)
        )
        # Embeddings, norms, linears as stored, those in float16, and the head where it is a tensor of its own.
        size = 2 * (100 * 64 + 7 * 64) + 2 * 4 * 64 * 64
        size += sum(linear_bits(p.out_features, p.stored_groups) for p in plan.linears) // 8
        if plan.head is not None:
            size += linear_bits(100, plan.head.stored_groups) // 8
        elif not tied:
            size += 2 * 100 * 64
        assert max_bytes - 2048 < size <= max_bytes  # the largest step is one of 2 bits of 32 x 128 weights, 1024 bytes


def test_more_room_than_there_is_use_for() -> None:
    measured = measurement()
    plan = make_exl2_plan(measured, size=measured_limit(measured, 1 << 30), head_bits=6)
    assert {bits for p in plan.linears for bits in p.group_bits} == {8}
    assert plan.target_bpw <= plan.bpw < plan.target_bpw + 1e-4


def test_size_that_cannot_be_had() -> None:
    with pytest.raises(
        BudgetError, match=r"20000 bytes cannot be reached: .* takes 7000, and the whole from"
    ) as caught:
        make_exl2_plan(
            measurement(),
            size=SizeLimit(total_bytes=20_000, other_bytes=7_000, float16_head_bytes=0),
            head_bits=16,
        )
    least, most = (int(word) for word in str(caught.value).split("from ")[1].split(". Ask")[0].split(" to "))
    for total, width in ((least, 2), (most, 8)):
        size = SizeLimit(total_bytes=total, other_bytes=7_000, float16_head_bytes=0)
        plan = make_exl2_plan(measurement(), size=size, head_bits=16)
        assert {bits for p in plan.linears for bits in p.group_bits} == {width}
