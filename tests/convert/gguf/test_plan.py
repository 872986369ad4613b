import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.llama_cpp.importance import importance_of
from bpwise.convert.gguf.plan.making import make_gguf_plan, size_range
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.convert.registry import load_plan
from bpwise.errors import BudgetError, ConfigError, FormatError, UnsupportedModelError
from bpwise.measure.measurement import Measurement
from numpy.typing import NDArray

from ...measured import GGUF, bare_measurement, damage_of, gguf_of, with_tensor

TYPES = ("Q8_0", "Q4_K", "Q4_0")
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_K": 4.5, "Q4_0": 4.5}


def damage(width: int, scale: float) -> NDArray[np.float32]:
    damages = [scale / 256, scale * 0.8 if width % 256 == 0 else np.inf, scale]
    return np.array(damages, dtype=np.float32)


def measurement(*, tied: bool = True) -> Measurement:
    names = ("0.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj")
    named = dict(zip((f"model.layers.{x}" for x in names), ((96, 96), (256, 96), (256, 96)), strict=True))
    named["lm_head"] = (96, 320)
    scales = dict(zip(named, (0.03, 0.05, 0.001, 0.02), strict=True))
    damages = {name: damage(width, scales[name]) for name, (width, _) in named.items()}
    curves = gguf_of(TYPES, damages, np.array([0.0, np.inf, 0.01], dtype=np.float32))
    made = bare_measurement(named, {GGUF: curves}, other_weights=500)
    return replace(made, embedding=replace(made.embedding, tokens=320, tied=tied))


def shapes(tied: bool) -> dict[str, tuple[int, int]]:
    found = {
        "model.layers.0.self_attn.q_proj": (96, 96),
        "model.layers.0.mlp.down_proj": (96, 256),
        "model.layers.1.mlp.down_proj": (96, 256),
        "model.embed_tokens": (320, 96),
    }
    return found if tied else {**found, "lm_head": (320, 96)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bpw", [5.0, 6.3, 9.0, 12.5])
def test_no_other_choice_within_the_size_has_less_damage(bpw: float, tied: bool) -> None:
    plan = make_gguf_plan(measurement(tied=tied), bpw=bpw)
    sizes = shapes(tied)
    budget_bits = bpw * (sum(rows * width for rows, width in sizes.values()) + 500) - 32 * 500
    names = [*shapes(True), "lm_head"]
    damages = {x: dict(zip(TYPES, damage_of(measurement(), x, GGUF), strict=True)) for x in names if "embed" not in x}
    damages["model.embed_tokens"] = {"Q8_0": 0.0, "Q4_0": 0.01}
    if tied:  # one table, both uses
        damages["model.embed_tokens"] = {k: d + damages["lm_head"][k] for k, d in damages["model.embed_tokens"].items()}
    best = min(
        sum({**damages[name], "F16": 0.0}[kind] for name, kind in zip(sizes, choice, strict=True))
        for choice in itertools.product(*([k for k in BITS if k != "Q4_K" or w % 256 == 0] for _, w in sizes.values()))
        if sum(BITS[kind] * rows * width for kind, (rows, width) in zip(choice, sizes.values(), strict=True))
        <= budget_bits
    )
    assert {tensor.name for tensor in plan.tensors} == set(sizes)
    assert plan.bpw <= bpw
    assert plan.damage_nats == pytest.approx(best, rel=1e-6)
    assert plan.gap == 0.0


def test_counts_norms_as_float32() -> None:
    plan = make_gguf_plan(measurement(), tensor_bytes=size_range(measurement())[1])
    weights = sum(rows * width for rows, width in shapes(True).values())
    assert plan.weights == weights + 500
    assert plan.stored_bytes == 2 * weights + 4 * 500
    assert plan.shares() == {"F16": 1.0}


def test_a_target_in_bytes() -> None:
    least, most = size_range(measurement())
    assert make_gguf_plan(measurement(), tensor_bytes=least).stored_bytes == least
    assert make_gguf_plan(measurement(), tensor_bytes=most).stored_bytes == most
    with pytest.raises(BudgetError, match=f"from {least} to {most}"):
        make_gguf_plan(measurement(), tensor_bytes=least - 1)


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.*.mlp.down_proj", "*.down_proj.weight", "blk.*.ffn_down.weight", "blk.[01].ffn_down"],
)
def test_overrides_by_either_name(pattern: str) -> None:
    plan = make_gguf_plan(measurement(), bpw=9.0, overrides=[TypeOverride.parse(f"{pattern}=q4_0")])
    kinds = plan.kinds
    assert kinds["model.layers.0.mlp.down_proj"].name == kinds["model.layers.1.mlp.down_proj"].name == "Q4_0"
    assert kinds["model.layers.0.self_attn.q_proj"].name != "Q4_0"


def test_the_last_override_wins() -> None:
    overrides = [
        TypeOverride.parse("*=Q8_0"),
        TypeOverride.parse("blk.1.*=Q4_K"),
        TypeOverride.parse("blk.0.ffn_down=F16"),
    ]
    kinds = make_gguf_plan(measurement(), bpw=10.0, overrides=overrides).kinds
    assert [kinds[name].name for name in shapes(True)] == ["Q8_0", "F16", "Q4_K", "Q8_0"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
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


def test_refuses_a_measurement_without_types() -> None:
    with pytest.raises(ConfigError, match=r"bpwise\[gguf\]"):
        make_gguf_plan(replace(measurement(), curves={}), bpw=6.0)
    curves = measurement().curves[GGUF]
    with pytest.raises(FormatError, match=r"of another version. Got 2. Expected 1. Measure the model again"):
        make_gguf_plan(replace(measurement(), curves={GGUF: replace(curves, version=2)}), bpw=6.0)


NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: with_tensor(x, GGUF, NAME, "damage_nats", np.ones(2, dtype=np.float32)), "wrong dtype or shape"),
        (lambda x: with_tensor(x, GGUF, "lm_head", "other", np.ones(2)), None),
        (
            lambda x: replace(x, curves={GGUF: replace(x.curves[GGUF], table={})}),
            "embed_tokens.damage_nats' is missing",
        ),
        (lambda x: with_header(x, ["Q9_K", "Q8_0", "Q4_0"]), "types must be different types"),
        (lambda x: with_header(x, ["Q8_0", "Q8_0", "Q4_0"]), "types must be different types"),
        (lambda x: with_header(x, []), "types: .*length >= 1"),
    ],
    ids=["one-type-less", "another-tensor", "no-table", "types-unknown", "type-twice", "no-types"],
)
def test_damaged_curves(change: Callable[[Measurement], Measurement], message: str | None) -> None:
    changed = change(measurement())
    if message is None:
        assert make_gguf_plan(changed, bpw=6.0).bpw <= 6
        return
    with pytest.raises(FormatError, match=rf"measurement: curves/gguf: .*{message}.*measure the model again"):
        make_gguf_plan(changed, bpw=6.0)


def with_header(made: Measurement, types: list[str]) -> Measurement:
    return replace(made, curves={GGUF: replace(made.curves[GGUF], header={"types": types})})


def test_round_trip(tmp_path: Path) -> None:
    plan = make_gguf_plan(measurement(), bpw=6.0)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.tensors[0].kind == ggml_type(plan.tensors[0].type)


def test_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"bpwise_type_plan": 1}))
    with pytest.raises(FormatError, match="not a plan"):
        load_plan(path)
    path.write_text(json.dumps({"bpwise_plan": 1, "format": "gguf"}))
    with pytest.raises(FormatError, match="not a GGUF plan of version 2"):
        load_plan(path)
    path.write_text(json.dumps({"bpwise_plan": 2, "format": "gguf", "tensors": [{"name": "x"}]}))
    with pytest.raises(FormatError, match="damaged"):
        load_plan(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": []}, "tensors: .*length >= 1"),
        ({"type": "Q9_K"}, r"tensors\[0\]: type must be one of"),
        ({"type": "Q4_K", "row_weights": 64}, r"tensors\[0\]: .*row_weights a multiple of its blocks"),
        ({"rows": 0}, r"tensors\[0\]\.rows: .* Got 0\. Expected int >= 1"),
        ({"damage_nats": float("nan")}, r"tensors\[0\]\.damage_nats: .* Got nan"),
        ({"other_weights": "1"}, r"other_weights: .* Got '1'\. Expected int"),
        ({"lower_bound_nats": None}, r"lower_bound_nats: .* Got None\. Expected float"),
    ],
)
def test_refuses_a_damaged_plan(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    make_gguf_plan(measurement(), bpw=6.0).save(path)
    plan = json.loads(path.read_text())
    for key, value in changes.items():
        (plan if key in plan else plan["tensors"][0])[key] = value
    path.write_text(json.dumps(plan))
    with pytest.raises(FormatError, match=rf"plan\.json: {message}.*make it again with `bpwise plan`"):
        load_plan(path)


def test_importances_of_linears_that_gguf_does_not_know() -> None:
    measured = measurement()
    expert = replace(measured.linears[0], name="model.layers.0.block_sparse_moe.experts.0.w1")
    with pytest.raises(UnsupportedModelError, match=r"experts\.0\.w1: has no name in GGUF"):
        importance_of(replace(measured, linears=(expert, *measured.linears[1:])))
