import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpwise.convert.gguf.ggml.types import TYPES as GGML_TYPES
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.importance import importance_of
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.plan.plan import GgufPlan, TypeOverride
from bpwise.convert.gguf.plan.problem import estimated_problem, measured_problem, unmeasured_problem
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.registry import load_plan
from bpwise.errors import BudgetError, ConfigError, FormatError
from bpwise.measure.measurement import Measurement
from numpy.typing import NDArray

from ...measured import GGUF, bare_linear, bare_measurement, gguf_of, in_place, layout_of, with_tensor

TYPES = ("Q8_0", "Q4_K", "Q4_0")
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K": 4.5, "Q4_0": 4.5}

TENSORS = {
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj", (96, 96)),
    "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj", (96, 256)),
    "blk.1.ffn_down.weight": ("model.layers.1.mlp.down_proj", (96, 256)),
    "output.weight": ("lm_head", (320, 96)),
    "token_embd.weight": ("model.embed_tokens", (320, 96)),
}
"""Tensors of the file: the linear that each of them is, and its shape."""

SCALES = dict(zip(TENSORS, (0.03, 0.05, 0.001, 0.02), strict=False))
TABLE = np.array([0.0002, np.inf, 0.01], dtype=np.float32)


def damage(width: int, scale: float) -> NDArray[np.float32]:
    damages = [scale / 256, scale * 0.8 if width % 256 == 0 else np.inf, scale]
    return np.array(damages, dtype=np.float32)


def measurement(*, tied: bool = True, types: Sequence[str] = TYPES) -> Measurement:
    linears = {linear: (shape[1], shape[0]) for linear, shape in list(TENSORS.values())[:-1]}
    damages = {linear: [damage(shape[1], SCALES[name])] for name, (linear, shape) in list(TENSORS.items())[:-1]}
    held = {linear: shape for linear, shape in TENSORS.values() if not (tied and linear == "lm_head")}
    layout = layout_of(held, others={"blk.0.attn_norm.weight": (400,), "output_norm.weight": (100,)})
    if tied:
        damages["lm_head"] = []
    curves = gguf_of(types, damages, TABLE, layout, np.eye(96, dtype=np.float32) if tied else None)
    made = bare_measurement(linears, {GGUF: curves}, other_weights=500)
    return replace(made, embedding=replace(made.embedding, tokens=320, tied=tied))


def shapes(tied: bool) -> dict[str, tuple[int, int]]:
    return {name: shape for name, (_, shape) in TENSORS.items() if not (tied and name == "output.weight")}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bpw", [5.0, 6.3, 9.0, 12.5])
def test_no_other_choice_within_the_size_has_less_damage(bpw: float, tied: bool) -> None:
    plan = make_gguf_plan(measurement(tied=tied), bpw=bpw)
    sizes = shapes(tied)
    budget_bits = bpw * (sum(rows * width for rows, width in sizes.values()) + 500) - 32 * 500
    damages = {
        name: dict(zip(TYPES, damage(shape[1], SCALES[name]), strict=True))
        for name, (_, shape) in list(TENSORS.items())[:-1]
    }
    damages["token_embd.weight"] = {"Q8_0": 0.0002, "Q4_0": 0.01}
    best = min(
        sum({**damages[name], "F16": 0.0}[kind] for name, kind in zip(sizes, choice, strict=True))
        for choice in itertools.product(*([k for k in BITS if k != "Q4_K" or w % 256 == 0] for _, w in sizes.values()))
        if sum(BITS[kind] * rows * width for kind, (rows, width) in zip(choice, sizes.values(), strict=True))
        <= budget_bits
    )
    assert [tensor.name for tensor in plan.tensors] == list(sizes)
    assert plan.bpw <= bpw
    assert plan.damage_nats == pytest.approx(best, rel=1e-6)
    assert plan.gap == 0.0


def test_counts_what_stays_as_it_is_stored() -> None:
    plan = make_gguf_plan(measurement(), tensor_bytes=most(measurement()))
    weights = sum(rows * width for rows, width in shapes(True).values())
    assert plan.weights == weights + 500
    assert plan.stored_bytes == 2 * weights + 4 * 500
    assert plan.shares() == {"F16": 1.0}


def most(measured: Measurement) -> int:
    return measured_problem(measured).size_range[1]


def test_a_target_in_bytes() -> None:
    least, largest = measured_problem(measurement()).size_range
    assert make_gguf_plan(measurement(), tensor_bytes=least).stored_bytes == least
    assert make_gguf_plan(measurement(), tensor_bytes=largest).stored_bytes == largest
    with pytest.raises(BudgetError, match=rf"from {least / 1e3:.1f} kB to {largest / 1e3:.1f} kB"):
        make_gguf_plan(measurement(), tensor_bytes=least - 1)


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.*.mlp.down_proj", "*.down_proj.weight", "blk.*.ffn_down.weight", "blk.[01].ffn_down"],
)
def test_overrides_by_either_name(pattern: str) -> None:
    plan = make_gguf_plan(measurement(), bpw=9.0, overrides=[TypeOverride.parse(f"{pattern}=q4_0")])
    kinds = plan.kinds
    assert kinds["blk.0.ffn_down.weight"].name == kinds["blk.1.ffn_down.weight"].name == "Q4_0"
    assert kinds["blk.0.attn_q.weight"].name != "Q4_0"


def test_the_last_override_wins() -> None:
    overrides = [
        TypeOverride.parse("*=Q8_0"),
        TypeOverride.parse("blk.1.*=Q4_K"),
        TypeOverride.parse("blk.0.ffn_down=F16"),
    ]
    kinds = make_gguf_plan(measurement(), bpw=10.0, overrides=overrides).kinds
    assert [kinds[name].name for name in shapes(True)] == ["Q8_0", "F16", "Q4_K", "Q8_0"]


def test_slow_types_of_a_backend_are_left_out() -> None:
    measured = measurement(types=("Q8_0", "IQ4_XS", "Q4_0"))

    def kinds(backend: str | None, *overrides: str) -> dict[str, str]:
        options = GgufOptions(backend=backend, overrides=tuple(map(TypeOverride.parse, overrides)))
        chosen = make_gguf_plan(measured, bpw=6.0, overrides=options.choices).kinds
        return {name: kind.name for name, kind in chosen.items()}

    slow = {name for name, kind in kinds(None).items() if kind == "IQ4_XS"}
    assert slow
    assert kinds("cuda") == kinds(None)
    for backend in ("cpu", "metal", "vulkan"):
        assert "IQ4_XS" not in kinds(backend).values()
        assert all(kinds(backend)[name] == "Q4_0" for name in slow)
    name = min(slow)
    assert kinds("cpu", f"{name}=IQ4_XS")[name] == "IQ4_XS"
    with pytest.raises(ConfigError, match=r"backend: not known. Got 'abacus'. Expected one of cpu, cuda"):
        GgufOptions(backend="abacus")


def test_a_measurement_of_another_format_says_why() -> None:
    with pytest.raises(ConfigError, match=r"Got no curves.*`bpwise quantize` measures for its own format"):
        make_gguf_plan(replace(measurement(), curves={}), bpw=6.0)


def test_a_backend_changes_nothing_that_was_not_measured() -> None:
    plain = make_gguf_plan(mixture_of_experts(), bpw=9.0)
    assert make_gguf_plan(mixture_of_experts(), bpw=9.0, overrides=GgufOptions(backend="cpu").choices) == plain


def test_several_types_leave_a_choice() -> None:
    asked = [TypeOverride.parse("*=q8_0,Q4_0,F16"), TypeOverride.parse("blk.1.ffn_down=F16")]
    plan = make_gguf_plan(measurement(), bpw=11.0, overrides=asked)
    kinds = {name: kind.name for name, kind in plan.kinds.items()}
    assert set(kinds.values()) <= {"Q8_0", "Q4_0", "F16"}
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert plan.bpw <= 11.0
    # Of these, every way to keep to the size costs at least as much.
    names = [name for name in kinds if name != "blk.1.ffn_down.weight"]
    problem = {each.name: each for each in measured_problem(measurement(), asked).candidates}
    costs = []
    for chosen in itertools.product(("Q8_0", "Q4_0", "F16"), repeat=len(names)):
        pairs = [*zip(names, chosen, strict=True), ("blk.1.ffn_down.weight", "F16")]
        sizes = [dict(zip(problem[n].damage_nats, problem[n].sizes, strict=True))[kind] for n, kind in pairs]
        if sum(sizes) + plan.other_bytes <= plan.target_bytes:
            costs.append(sum(problem[n].damage_nats[kind] for n, kind in pairs))
    assert plan.damage_nats == pytest.approx(min(costs), rel=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("*=Q4_K,IQ4_XS", "multiple of 256 for"),
        ("blk.7.*=Q8_0", "no tensor"),
        ("*.q_proj=Q4_K", "multiple of 256"),
        ("*.down_proj=Q6_K", "does not know this type"),
    ],
)
def test_refuses_an_override_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_gguf_plan(measurement(), bpw=6.0, overrides=[TypeOverride.parse(override)])


@pytest.mark.parametrize("text", ["blk.0", "=Q8_0", "blk.0=Q9"])
def test_refuses_an_override_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError):
        TypeOverride.parse(text)


def joined(linears: Sequence[str], rows: int) -> TensorRows:
    """Linears of as many rows each, one after another."""
    return TensorRows(tuple(linears), np.repeat(np.arange(len(linears)), rows), np.tile(np.arange(rows), len(linears)))


def mixture_of_experts(kind: str = "BF16") -> Measurement:
    """Two experts stacked, queries and keys joined, a linear in two tensors, and much that is none of the linears."""
    experts = [f"model.layers.0.experts.{e}.up" for e in range(2)]
    layout = Layout(
        {
            "output_norm.weight": StoredTensor(GGML_TYPES["F32"], (64,)),
            "token_embd.weight": StoredTensor(GGML_TYPES[kind], (320, 64)),
            "output.weight": StoredTensor(GGML_TYPES[kind], (320, 64)),
            "blk.0.attn_qk.weight": StoredTensor(GGML_TYPES[kind], (96, 64)),
            "blk.0.ffn_up_exps.weight": StoredTensor(GGML_TYPES[kind], (2, 32, 64)),
            "blk.0.attn_v_b.weight": StoredTensor(GGML_TYPES[kind], (64, 64)),
            "blk.0.attn_z.weight": StoredTensor(GGML_TYPES[kind], (32, 64)),
            "blk.0.attn_k_b.weight": StoredTensor(GGML_TYPES[kind], (2, 64, 32)),
            "blk.0.ffn_gate_inp.weight": StoredTensor(GGML_TYPES["F32"], (2, 64)),
            "blk.0.ssm_conv1d.weight": StoredTensor(GGML_TYPES["F32"], (64, 4)),
            "blk.0.odd.weight": StoredTensor(GGML_TYPES[kind], (2, 40)),
            "blk.1.nextn.eh_proj.weight": StoredTensor(GGML_TYPES[kind], (64, 128)),
        },
        RowMap(
            {
                "token_embd.weight": in_place("model.embed_tokens", 320),
                "output.weight": in_place("lm_head", 320),
                "blk.0.attn_qk.weight": joined(["model.layers.0.q", "model.layers.0.k"], 48),
                "blk.0.ffn_up_exps.weight": joined(experts, 32),
                "blk.0.attn_v_b.weight": in_place("model.layers.0.vz", 64),
                "blk.0.attn_z.weight": TensorRows(
                    ("model.layers.0.vz",), np.zeros(32, dtype=np.int64), np.arange(64, 96)
                ),
            },
            {"blk.0.attn_k_b.weight": "x", "blk.0.odd.weight": "x", "blk.1.nextn.eh_proj.weight": "x"},
        ),
        4096,
    )
    outs = {"model.layers.0.q": 48, "model.layers.0.k": 48, "model.layers.0.vz": 96, **dict.fromkeys(experts, 32)}
    scales = dict(zip(outs, (1.0, 10.0, 100.0, 1000.0, 10_000.0), strict=True))
    damages = {name: [damage(64, scale)] for name, scale in scales.items()}
    damages["model.layers.0.vz"] = [damage(64, 100.0), damage(64, 3.0)]
    damages["lm_head"] = [damage(64, 7.0)]
    linears = {**{name: (64, rows) for name, rows in outs.items()}, "lm_head": (64, 320)}
    made = bare_measurement(linears, {GGUF: gguf_of(TYPES, damages, TABLE, layout)})
    return replace(made, embedding=replace(made.embedding, tokens=320))


def at(kind: str) -> GgufPlan:
    return make_gguf_plan(mixture_of_experts(), bpw=16.0, overrides=[TypeOverride.parse(f"*={kind}")])


def test_one_entry_a_tensor_whatever_it_is_made_of() -> None:
    plan = at("Q4_0")
    damages = {tensor.name: tensor.damage_nats for tensor in plan.tensors}
    assert list(damages) == [
        "blk.0.attn_qk.weight",
        "blk.0.attn_v_b.weight",
        "blk.0.attn_z.weight",
        "blk.0.ffn_up_exps.weight",
        "output.weight",
        "token_embd.weight",
        "blk.0.attn_k_b.weight",
        "blk.1.nextn.eh_proj.weight",
    ]
    assert damages["blk.0.attn_qk.weight"] == pytest.approx(11)
    assert (damages["blk.0.attn_v_b.weight"], damages["blk.0.attn_z.weight"]) == (100, 3)
    assert damages["blk.0.ffn_up_exps.weight"] == pytest.approx(11_000)
    assert (damages["output.weight"], damages["token_embd.weight"]) == (7, pytest.approx(0.01))
    assert damages["blk.0.attn_k_b.weight"] is None
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert by_name["blk.0.ffn_up_exps.weight"].linears == (
        "model.layers.0.experts.0.up",
        "model.layers.0.experts.1.up",
    )
    assert by_name["blk.0.ffn_up_exps.weight"].shape == (2, 32, 64)


def test_matrices_that_nothing_is_known_of_are_rounded_plainly() -> None:
    plan = make_gguf_plan(mixture_of_experts(), bpw=6.0)
    assert {tensor.name: tensor.type for tensor in plan.plain} == {
        "blk.0.attn_k_b.weight": "Q8_0",
        "blk.1.nextn.eh_proj.weight": "Q8_0",
    }
    facts = "\n".join(plan.describe().facts)
    assert "not measured, rounded by ggml alone: 2 tensors" in facts
    assert "blk.0.attn_k_b.weight, blk.1.nextn.eh_proj.weight" in facts
    # Norm, router and convolution in F32, and a matrix whose rows no type takes in BF16.
    assert plan.other_weights == 64 + 2 * 64 + 64 * 4 + 2 * 40
    assert plan.other_bytes == 4 * (64 + 2 * 64 + 64 * 4) + 2 * 2 * 40
    assert plan.stored_bytes == sum(tensor.stored_bytes for tensor in plan.tensors) + plan.other_bytes
    assert 5.9 < plan.bpw <= 6.0
    override = TypeOverride.parse("blk.1.*=F16")
    kinds = make_gguf_plan(mixture_of_experts(), bpw=8.0, overrides=[override]).kinds
    assert kinds["blk.1.nextn.eh_proj.weight"].name == "F16"


def test_a_file_in_float32_is_planned_as_one_in_16_bits() -> None:
    wide, narrow = (make_gguf_plan(made, bpw=16.0) for made in (mixture_of_experts("F32"), mixture_of_experts()))
    assert {tensor.name for tensor in narrow.plain} <= {tensor.name for tensor in wide.plain}
    assert wide.kinds.keys() >= narrow.kinds.keys()


def test_a_tensor_that_is_measured_in_part_is_not_measured() -> None:
    made = mixture_of_experts()
    without = replace(made, linears=tuple(x for x in made.linears if not x.name.endswith(".k")))
    plan = make_gguf_plan(without, bpw=8.0)
    assert "blk.0.attn_qk.weight" in {tensor.name for tensor in plan.plain}


def test_before_a_measurement_sizes_are_the_same() -> None:
    made = mixture_of_experts()
    measured = measured_problem(made)
    layout = Layout.from_json(made.curves[GGUF].header["file"], where="x", remedy="y")
    matrices = [x.name for x in (*made.linears, made.head)] + [made.embedding.name]
    asked = unmeasured_problem(layout, matrices, TYPES)
    assert (asked.weights, asked.size_range) == (measured.weights, measured.size_range)
    assert [x.name for x in asked.candidates] == [x.name for x in measured.candidates]


def test_before_there_is_a_file_sizes_are_about_the_same() -> None:
    made = measurement(tied=False)
    linears = [*made.linears, made.head, bare_linear("model.embed_tokens", 96, 320)]
    asked = estimated_problem(linears, 500, TYPES, [TypeOverride.parse("blk.9.*=F16")])
    assert asked.size_range == measured_problem(made).size_range
    held = estimated_problem(linears, 500, TYPES, [TypeOverride.parse("*.q_proj=F16")])
    assert held.size_range[0] == asked.size_range[0] + 96 * 96 * 2 - 96 * 96 * 18 // 32


def test_refuses_a_measurement_without_types() -> None:
    with pytest.raises(ConfigError, match=r"pip install '.\[gguf\]'"):
        make_gguf_plan(replace(measurement(), curves={}), bpw=6.0)
    curves = measurement().curves[GGUF]
    with pytest.raises(FormatError, match=r"of another version. Got 1. Expected 5. Measure the model again"):
        make_gguf_plan(replace(measurement(), curves={GGUF: replace(curves, version=1)}), bpw=6.0)


NAME = "model.layers.0.mlp.down_proj"


def with_header(made: Measurement, **changes: Any) -> Measurement:
    curves = made.curves[GGUF]
    return replace(made, curves={GGUF: replace(curves, header={**curves.header, **changes})})


def with_file(made: Measurement, **changes: Any) -> Measurement:
    return with_header(made, file={**made.curves[GGUF].header["file"], **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: with_tensor(x, GGUF, NAME, "damage_nats", np.ones(3, dtype=np.float32)), "wrong dtype or shape"),
        (
            lambda x: with_tensor(x, GGUF, NAME, "damage_nats", np.ones((2, 3), dtype=np.float32)),
            "wrong dtype or shape",
        ),
        (lambda x: with_tensor(x, GGUF, "lm_head", "other", np.ones(2)), None),
        (
            lambda x: replace(x, curves={GGUF: replace(x.curves[GGUF], table={})}),
            "embed_tokens.damage_nats' is missing",
        ),
        (
            lambda x: replace(x, curves={GGUF: replace(x.curves[GGUF], table={"damage_nats": TABLE})}),
            "embed_tokens.gram' is missing",
        ),
        (lambda x: with_header(x, types=["Q9_K", "Q8_0", "Q4_0"]), "types must be different types"),
        (lambda x: with_header(x, types=["Q8_0", "Q8_0", "Q4_0"]), "types must be different types"),
        (lambda x: with_header(x, types=[]), "types: .*length >= 1"),
        (lambda x: with_header(x, file={}), "file: .*tensors"),
        (lambda x: with_file(x, tensors={"a": ["F16", [0, 2]]}), "file: tensors"),
        (lambda x: with_file(x, tensors={"a": ["Q4_K", [2, 40]]}), "a cannot be stored as it says"),
        (lambda x: with_file(x, tensors={"a": ["F16", [2, 40]]}), "the map is of other tensors"),
        (lambda x: with_file(x, rows="?"), "rows: cannot be unpacked"),
    ],
    ids=[
        *(
            "one-axis",
            "a-part-more",
            "another-tensor",
            "no-table",
            "no-gram",
            "types-unknown",
            "type-twice",
            "no-types",
        ),
        *("no-file", "no-rows", "no-blocks", "other-tensors", "no-map"),
    ],
)
def test_damaged_curves(change: Callable[[Measurement], Measurement], message: str | None) -> None:
    changed = change(measurement())
    if message is None:
        assert make_gguf_plan(changed, bpw=6.0).bpw <= 6
        return
    with pytest.raises(FormatError, match=rf"measurement: curves/gguf: .*{message}"):
        make_gguf_plan(changed, bpw=6.0)


def test_round_trip(tmp_path: Path) -> None:
    plan = make_gguf_plan(mixture_of_experts(), bpw=6.0)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.tensors[0].kind == ggml_type(plan.tensors[0].type)
    assert {cost.name: cost.block for cost in plan.costs()}["blk.0.attn_qk"] == 0


def test_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"bpwise_type_plan": 1}))
    with pytest.raises(FormatError, match="not a plan"):
        load_plan(path)
    path.write_text(json.dumps({"bpwise_plan": 2, "format": "gguf"}))
    with pytest.raises(FormatError, match="not a GGUF plan of version 3"):
        load_plan(path)
    path.write_text(json.dumps({"bpwise_plan": 3, "format": "gguf", "tensors": [{"name": "x"}]}))
    with pytest.raises(FormatError, match="damaged"):
        load_plan(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": []}, "tensors: .*length >= 1"),
        ({"type": "Q9_K"}, r"tensors\[0\]: type must be one of"),
        ({"type": "Q4_K", "shape": [96, 64]}, r"tensors\[0\]: .*with rows of whole blocks"),
        ({"shape": [0, 64]}, r"tensors\[0\]\.shape\[0\]: .* Got 0\. Expected int >= 1"),
        ({"damage_nats": float("nan")}, r"tensors\[0\]\.damage_nats: .* Got nan"),
        ({"other_weights": "1"}, r"other_weights: .* Got '1'\. Expected int"),
        ({"other_bytes": -1}, r"other_bytes: .* Got -1\. Expected int"),
        ({"lower_bound_nats": None}, r"lower_bound_nats: .* Got None\. Expected float"),
    ],
)
def test_refuses_a_damaged_plan(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    make_gguf_plan(measurement(), bpw=6.0).save(path)
    plan = json.loads(path.read_text())
    del plan["sha256"]
    for key, value in changes.items():
        (plan if key in plan else plan["tensors"][0])[key] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(FormatError, match=rf"plan\.json: {message}.*make it again with `bpwise plan`"):
        load_plan(path)


def with_powers(made: Measurement) -> Measurement:
    rng = np.random.default_rng(0)
    changed = [
        replace(x, input_power=rng.random(64, dtype=np.float32), fisher=rng.random(len(x.fisher), dtype=np.float32))
        for x in (*made.linears, made.head)
    ]
    return replace(made, linears=tuple(changed[:-1]), head=changed[-1], provenance=PROVENANCE)


PROVENANCE = {"calibration_text": "t", "calibration_origins": ["r"], "calibration_adds_bos": False}


def test_importances_of_tensors() -> None:
    made = with_powers(mixture_of_experts())
    layout = Layout.from_json(made.curves[GGUF].header["file"], where="x", remedy="y")
    by_name = {x.name: x for x in made.linears}
    matrix = importance_of(made, layout)
    assert set(matrix.sums) == set(layout.rows.tensors)

    def mean(name: str) -> NDArray[np.float32]:
        found = matrix.mean_squares(name)
        assert found is not None
        return np.asarray(found)

    experts = [by_name[f"model.layers.0.experts.{e}.up"].input_power for e in range(2)]
    assert np.allclose(mean("blk.0.ffn_up_exps.weight"), np.concatenate(experts), rtol=1e-6)
    # A squared error in a column of a joined tensor costs each linear its outputs' Fisher times its inputs' power.
    q, k = (by_name[f"model.layers.0.{x}"] for x in "qk")
    cost = q.fisher.sum() * q.input_power + k.fisher.sum() * k.input_power
    assert np.allclose(mean("blk.0.attn_qk.weight"), cost / (q.fisher.sum() + k.fisher.sum()), rtol=1e-5)
    for name in ("blk.0.attn_v_b.weight", "blk.0.attn_z.weight"):
        assert np.allclose(mean(name), by_name["model.layers.0.vz"].input_power, rtol=1e-6)


def test_importances_follow_the_columns() -> None:
    made = with_powers(mixture_of_experts())
    layout = Layout.from_json(made.curves[GGUF].header["file"], where="x", remedy="y")
    columns = np.random.default_rng(1).permutation(64)
    tensors = {**layout.rows.tensors}
    tensors["blk.0.attn_v_b.weight"] = replace(tensors["blk.0.attn_v_b.weight"], columns=columns)
    matrix = importance_of(made, Layout(layout.tensors, RowMap(tensors, {}), 4096))
    found = matrix.mean_squares("blk.0.attn_v_b.weight")
    assert found is not None
    power = next(x for x in made.linears if x.name.endswith("vz")).input_power
    assert np.allclose(np.asarray(found), power[columns], rtol=1e-6)
