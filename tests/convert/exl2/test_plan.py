import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import RowGroup, padded_columns
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.file.store import linear_tensors
from bpwise.convert.exl2.plan.making import exl2_bpw_range, make_exl2_plan
from bpwise.convert.exl2.plan.plan import LinearPlan
from bpwise.convert.registry import load_plan
from bpwise.errors import BudgetError, ConfigError, FormatError
from bpwise.measure.measurement import Measurement
from numpy.typing import NDArray

from ...measured import EXL2, WIDTHS, bare_measurement, damage_of, exl2_of, with_tensor


def measurement(
    shapes: list[tuple[int, int]] | None = None,
    *,
    group_size: int = 64,
    seed: int = 0,
    head: tuple[int, int] = (64, 100),
) -> Measurement:
    rng = np.random.default_rng(seed)
    shapes = shapes or [(64, 40), (96, 64), (160, 33), (64, 64)] * 5
    named = {**{f"l.{i}": shape for i, shape in enumerate(shapes)}, "lm_head": head}
    damages, orders = {}, {}
    for name, (rows, _) in named.items():
        groups = -(-rows // group_size)
        weight = 10 ** rng.uniform(-3, 0, (groups, 1))
        damages[name] = weight * 4.0 ** -np.array(WIDTHS) * rng.uniform(0.9, 1.1, (groups, len(WIDTHS)))
        orders[name] = rng.permutation(rows).astype(np.int32)
    return bare_measurement(named, {EXL2: exl2_of(damages, orders, group_size)})


MANY_GROUPS = [(1024, 32 * (1 + i % 4)) for i in range(80)]


def naive_bits(plan: LinearPlan) -> int:
    """Bits of the tensors that a file stores for a linear of this plan."""
    stored = QuantizedLinear(
        groups=plan.stored_groups,
        codes=torch.zeros(plan.in_features, plan.out_features, dtype=torch.uint8),
        scale_codes=torch.zeros(len(plan.group_rows), plan.out_features, dtype=torch.uint8),
        max_scales=torch.ones(len(plan.group_rows), dtype=torch.float16),
        order=torch.arange(plan.in_features),
    )
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in linear_tensors(plan.name, stored).values())


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bpw", [4.0, 4.7, 6.0])
def test_bits_are_those_of_the_stored_tensors(bpw: float, group_size: int) -> None:
    plan = make_exl2_plan(measurement(group_size=group_size), bpw=bpw, head_bits=6)
    bits = weights = 0
    for p in plan.linears:
        assert p.stored_bits == naive_bits(p)
        assert p.bpw == naive_bits(p) / (p.in_features * p.out_features)
        bits += naive_bits(p)
        weights += p.in_features * p.out_features
    assert plan.bpw == bits / weights
    assert bits <= bpw * weights
    assert plan.head is not None
    assert plan.head.stored_bits == naive_bits(plan.head)


@pytest.mark.parametrize("bpw", [2.5, 3.0, 4.0, 4.65, 6.5, 8.0])
def test_target_is_met_from_below(bpw: float) -> None:
    plan = make_exl2_plan(measurement(MANY_GROUPS), bpw=bpw, head_bits=6)
    # 1280 groups; the smallest step of one is 2048 of 5.2 million weights by one bit, 0.0004 bits per weight.
    assert bpw - 0.001 < plan.bpw <= bpw
    assert plan.target_bpw == bpw


def test_damage_falls_as_bits_grow() -> None:
    measured = measurement(MANY_GROUPS)
    damages = [make_exl2_plan(measured, bpw=bpw, head_bits=6).damage_nats for bpw in np.arange(2.5, 8.1, 0.25)]
    assert bool((np.diff(damages) < 0).all())


def test_damage_is_looked_up_in_the_curves() -> None:
    measured = measurement()
    plan = make_exl2_plan(measured, bpw=4.5, head_bits=5)
    total = 0.0
    for p, curve in zip(plan.linears, measured.linears, strict=True):
        assert p.name == curve.name
        damage = damage_of(measured, p.name)
        expected = sum(float(damage[g, WIDTHS.index(bits)]) for g, bits in enumerate(p.group_bits))
        assert p.damage_nats == pytest.approx(expected)
        total += expected
    assert plan.head is not None
    head = sum(float(damage_of(measured, "lm_head")[g, WIDTHS.index(b)]) for g, b in enumerate(plan.head.group_bits))
    assert plan.decoder_damage_nats == pytest.approx(total)
    assert plan.damage_nats == pytest.approx(total + head)
    assert plan.lower_bound_nats <= total + head
    assert plan.gap == pytest.approx((total + head) / plan.lower_bound_nats - 1)


def test_costly_groups_get_more_bits() -> None:
    measured = measurement()
    costly = measured.linears[3]
    changed = with_tensor(measured, EXL2, costly.name, "damage_nats", 1000 * damage_of(measured, costly.name))
    before = make_exl2_plan(measured, bpw=4.0, head_bits=6).linears[3]
    after = make_exl2_plan(changed, bpw=4.0, head_bits=6).linears[3]
    assert after.bpw > before.bpw + 1


@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_groups_cover_the_rows(group_size: int) -> None:
    plan = make_exl2_plan(measurement(group_size=group_size), bpw=4.5, head_bits=6)
    for p in plan.linears:
        assert sum(p.group_rows) == p.in_features
        assert all(rows == group_size for rows in p.group_rows[:-1])
        assert 0 < p.group_rows[-1] <= group_size


def test_stored_order_never_increases() -> None:
    plan = make_exl2_plan(measurement(MANY_GROUPS), bpw=4.0, head_bits=6)
    assert any(list(p.group_bits) != sorted(p.group_bits, reverse=True) for p in plan.linears)  # something to reorder
    for p in plan.linears:
        assert sorted(p.stored_order) == list(range(len(p.group_bits)))
        widths = [group.bits for group in p.stored_groups]
        assert widths == sorted(p.group_bits, reverse=True)
        assert [(p.group_bits[g], p.group_rows[g]) for g in p.stored_order] == [
            (group.bits, group.rows) for group in p.stored_groups
        ]
        for a, b in pairwise(p.stored_order):
            assert p.group_bits[a] > p.group_bits[b] or a < b  # equal widths stay in measured order


@pytest.mark.parametrize(("end", "width"), [(0, 2), (1, 8)], ids=["lowest", "highest"])
def test_both_ends_of_the_range_can_be_had(end: int, width: int) -> None:
    # Many shapes: whether bits / weights * weights comes back to the same integer is a matter of luck.
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shapes = [(int(32 * rng.integers(1, 9)), int(rng.integers(1, 200))) for _ in range(7)]
        measured = measurement(shapes, seed=seed)
        plan = make_exl2_plan(measured, bpw=exl2_bpw_range(measured)[end], head_bits=16)
        assert {bits for p in plan.linears for bits in p.group_bits} == {width}, seed


@pytest.mark.parametrize("width", [2, 8])
def test_ends_of_the_range_are_the_stored_sizes(width: int) -> None:
    measured = measurement()
    lowest, highest = exl2_bpw_range(measured)
    bits = weights = 0
    for curve in measured.linears:
        rows = tuple(min(64, curve.in_features - first) for first in range(0, curve.in_features, 64))
        whole = LinearPlan(
            name=curve.name,
            in_features=curve.in_features,
            out_features=curve.out_features,
            group_rows=rows,
            group_bits=(width,) * len(rows),
            damage_nats=0.0,
        )
        bits += naive_bits(whole)
        weights += curve.in_features * curve.out_features
    assert bits / weights == pytest.approx({2: lowest, 8: highest}[width], rel=1e-12)


def range_in(error: BudgetError) -> tuple[float, float]:
    match = re.search(r"from (\d+\.\d+) to (\d+\.\d+)", str(error))
    assert match is not None
    return float(match[1]), float(match[2])


@pytest.mark.parametrize("bpw", [1.0, 2.0, 12.0, float("inf"), float("nan"), -4.0])
def test_out_of_range_names_the_range(bpw: float) -> None:
    measured = measurement()
    lowest, highest = exl2_bpw_range(measured)
    with pytest.raises(BudgetError) as caught:
        make_exl2_plan(measured, bpw=bpw, head_bits=6)
    assert range_in(caught.value) == pytest.approx((lowest, highest), abs=2e-4)  # printed with four decimals


@pytest.mark.parametrize("seed", range(6))
def test_range_in_the_message_can_be_had(seed: int) -> None:
    # Who reads "from A to B" will ask for A or B, so they must not have been rounded to outside the range.
    rng = np.random.default_rng(seed)
    measured = measurement([(int(32 * rng.integers(1, 9)), int(rng.integers(1, 200))) for _ in range(7)])
    with pytest.raises(BudgetError) as caught:
        make_exl2_plan(measured, bpw=1.0, head_bits=6)
    for end in range_in(caught.value):
        assert make_exl2_plan(measured, bpw=end, head_bits=6).bpw <= end


@pytest.mark.parametrize("head_bits", [2, 3, 4, 5, 6, 8])
def test_head_bits(head_bits: int) -> None:
    measured = measurement(head=(640, 96))
    plan = make_exl2_plan(measured, bpw=4.0, head_bits=head_bits)
    assert plan.head is not None
    uniform = replace(plan.head, group_bits=(head_bits,) * 10)
    assert plan.head.stored_bits <= uniform.stored_bits
    column = WIDTHS.index(head_bits)
    # The same size as with one width for all, and no more damage; its groups differ a thousandfold in weight.
    assert plan.head.damage_nats <= damage_of(measured, "lm_head")[:, column].sum() * (1 + 1e-6)
    assert (set(plan.head.group_bits) == {head_bits}) == (head_bits in (2, 8))
    assert plan.head_bits == plan.head_code_bits == head_bits
    assert plan.linears == make_exl2_plan(measured, bpw=4.0, head_bits=16).linears  # the decoder's budget is its own


def test_head_in_the_common_budget() -> None:
    measured = measurement()
    plan = make_exl2_plan(measured, bpw=4.0, head_bits="auto")
    assert plan.head is not None
    everything = [*plan.linears, plan.head]
    weights = sum(p.weights for p in everything)
    bits = sum(p.stored_bits for p in everything)
    step = max(max(p.group_rows) * padded_columns(p.out_features) * 2 for p in everything)
    assert 0 <= 4.0 * weights - bits < step
    # No fixed width of the head of any size gives a better model for the same bits.
    for head_bits in (2, 3, 4, 5, 6, 8):
        fixed = make_exl2_plan(measured, bpw=4.0, head_bits=head_bits)
        assert fixed.head is not None
        left = 4.0 * weights - fixed.head.stored_bits
        decoder_bpw = left / sum(p.weights for p in fixed.linears)
        other = make_exl2_plan(measured, bpw=decoder_bpw, head_bits=head_bits)
        assert plan.damage_nats <= other.damage_nats * (1 + plan.gap)
    assert plan.gap < 0.05


def test_unquantized_head() -> None:
    plan = make_exl2_plan(measurement(), bpw=4.0, head_bits=16)
    assert plan.head is None
    assert plan.damage_nats == plan.decoder_damage_nats


@pytest.mark.parametrize("head_bits", [0, 1, 7, 9, 32])
def test_other_head_bits_are_refused(head_bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"head bits: not usable. Got {head_bits}"):
        make_exl2_plan(measurement(), bpw=4.0, head_bits=head_bits)


def test_shares() -> None:
    plan = make_exl2_plan(measurement(), bpw=4.0, head_bits=6)
    counts: dict[int, int] = {}
    for p in plan.linears:
        for bits, rows in zip(p.group_bits, p.group_rows, strict=True):
            counts[bits] = counts.get(bits, 0) + rows * p.out_features
    total = sum(p.in_features * p.out_features for p in plan.linears)
    expected = {f"{bits} bits": counts[bits] / total for bits in sorted(counts, reverse=True)}
    assert plan.shares() == expected
    assert list(plan.shares()) == list(expected)


@pytest.mark.parametrize("head_bits", [6, 16])
def test_save_and_load(tmp_path: Path, head_bits: int) -> None:
    measured = measurement()
    plan = make_exl2_plan(measured, bpw=4.1, head_bits=head_bits)
    assert plan.measurement == measured.fingerprint
    plan.save(tmp_path / "plan.json")
    read = load_plan(tmp_path / "plan.json")
    assert read == plan
    assert read.bpw == plan.bpw
    # People and scripts read it too.
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["bpw"] == plan.bpw
    assert raw["predicted_damage_nats"] == plan.damage_nats


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: {},
        lambda raw: {**raw, "bpwise_plan": 999},
        lambda raw: {key: value for key, value in raw.items() if key != "linears"},
        lambda raw: {**raw, "linears": 3},
        lambda raw: {**raw, "linears": [{"name": "x"}]},
        lambda raw: {**raw, "head": "none"},
    ],
    ids=["empty", "other-version", "no-linears", "linears-a-number", "linear-without-groups", "head-a-word"],
)
def test_refuses_other_files(tmp_path: Path, change) -> None:
    make_exl2_plan(measurement(), bpw=4.0, head_bits=6).save(tmp_path / "plan.json")
    raw = json.loads((tmp_path / "plan.json").read_text())
    del raw["sha256"]
    (tmp_path / "plan.json").write_text(json.dumps(change(raw)))
    with pytest.raises(FormatError, match=r"plan\.json"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("linear", {"group_rows": [32]}, r"linears\[0\]: group_rows must add up to in_features"),
        ("linear", {"group_bits": []}, r"linears\[0\]: group_rows must add up .* group_bits for each"),
        ("linear", {"in_features": 0}, r"linears\[0\]\.in_features: .* Got 0\. Expected int >= 1"),
        ("linear", {"out_features": "8"}, r"linears\[0\]\.out_features: .* Got '8'\. Expected int"),
        ("linear", {"damage_nats": -1}, r"linears\[0\]\.damage_nats: .* Got -1\. Expected float >= 0"),
        ("head", {"group_bits": [7]}, "head: group_bits must be among"),
        ("head", {"name": None}, r"head\.name: .* Got None\. Expected str"),
        ("plan", {"linears": []}, "linears and unquantized are both empty"),
        ("plan", {"head_bits": 7}, "head_bits must be one of"),
        ("plan", {"head_bits": True}, r"head_bits: .* Got True\. Expected int \| str"),
        ("plan", {"target_bpw": float("inf")}, r"target_bpw: .* Got inf"),
        (
            "plan",
            {"unquantized": [{"name": "x", "in_features": 1, "out_features": 1}]},
            r"unquantized\[0\]: .*field reason",
        ),
        ("plan", {"measurement": 10**4000}, r"measurement: .* Got 10+\.\.\.0+\. Expected str"),
    ],
)
def test_refuses_a_damaged_plan(tmp_path: Path, where: str, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    make_exl2_plan(measurement([(64, 40), (96, 64)]), bpw=4.0, head_bits=6).save(path)
    plan = json.loads(path.read_text())
    plan.pop("sha256", None)
    {"plan": plan, "head": plan["head"], "linear": plan["linears"][0]}[where].update(changes)
    path.write_text(json.dumps(plan))
    with pytest.raises(FormatError, match=rf"plan\.json: {message}.* make it again with `bpwise plan`"):
        load_plan(path)


def test_stored_groups_of_a_short_last_group() -> None:
    plan = LinearPlan(
        name="l", in_features=160, out_features=8, group_rows=(64, 64, 32), group_bits=(2, 4, 8), damage_nats=0.0
    )
    assert plan.stored_groups == (RowGroup(8, 32), RowGroup(4, 64), RowGroup(2, 64))


def test_a_format_that_was_not_measured() -> None:
    with pytest.raises(
        ConfigError, match=r"curves/exl2: this format was not measured. Got no curves.*`bpwise measure`"
    ):
        make_exl2_plan(replace(measurement(), curves={}), bpw=4.5, head_bits=6)


def _first(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values = values.copy()
        values.flat[0] = value
        return values

    return change


BAD_CURVES = {
    "repeated-input": ("order", np.zeros_like),
    "input-too-large": ("order", _first(96)),
    "negative-input": ("order", _first(-1)),
    "no-inputs": ("order", lambda order: order[:0]),
    "order-in-64-bits": ("order", lambda order: order.astype(np.int64)),
    "order-a-matrix": ("order", lambda order: order[None]),
    "group-missing": ("damage_nats", lambda damage: damage[1:]),
    "width-missing": ("damage_nats", lambda damage: damage[:, 1:]),
    "nan-damage": ("damage_nats", _first(np.nan)),
    "infinite-damage": ("damage_nats", _first(np.inf)),
    "negative-damage": ("damage_nats", _first(-1.0)),
}


@pytest.mark.parametrize(("field", "change"), BAD_CURVES.values(), ids=BAD_CURVES)
def test_curves_that_nothing_can_be_done_with(field: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    made = measurement([(96, 5)])
    values = change(made.curves[EXL2].linears["l.0"][field])
    message = rf"^measurement: curves/exl2: tensor 'l\.0\.{field}' .* measure the model again"
    with pytest.raises(FormatError, match=message):
        make_exl2_plan(with_tensor(made, EXL2, "l.0", field, values), bpw=4.5, head_bits=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8, 7]}, "widths must be some of"),
        ({"widths": [2, 3, 4, 5, 6, 8]}, "widths must be some of"),
        ({"widths": []}, "widths: .*length >= 1"),
        ({"group_size": 33}, "group_size must be a multiple of 32"),
        ({"group_size": 0}, r"group_size: .* Got 0\. Expected int >= 1"),
        ({"group_size": "32"}, r"group_size: .* Got '32'\. Expected int"),
    ],
    ids=str,
)
def test_curves_that_say_what_exl2_has_not(changes: dict[str, Any], message: str) -> None:
    made = measurement()
    curves = made.curves[EXL2]
    changed = replace(made, curves={EXL2: replace(curves, header={**curves.header, **changes})})
    with pytest.raises(FormatError, match=rf"^measurement: curves/exl2: header.*{message}.*measure the model again"):
        make_exl2_plan(changed, bpw=4.5, head_bits=6)


@pytest.mark.parametrize("group_size", [48, 0, -32])
def test_groups_that_cannot_be_measured(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size: not usable. Got {group_size}"):
        Exl2Curves(group_size)
