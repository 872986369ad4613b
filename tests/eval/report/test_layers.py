import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.exl2.file.writer import write_model
from bpwise.convert.exl2.plan.plan import Exl2Plan, LinearPlan
from bpwise.convert.gguf.file.header import GgufTensor
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.plan.plan import GgufPlan, TensorPlan
from bpwise.convert.opening import open_any
from bpwise.convert.plan import LinearCost
from bpwise.errors import FormatError
from bpwise.eval.report.layers import find_plan, linear_costs

NAMES = [f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qkvo"]


def linear(rows: int, columns: int) -> QuantizedLinear:
    return QuantizedLinear(
        groups=(RowGroup(5, 32), *((RowGroup(3, rows - 32),) if rows > 32 else ())),
        codes=torch.zeros(rows, columns, dtype=torch.uint8),
        scale_codes=torch.zeros(2 if rows > 32 else 1, columns, dtype=torch.uint8),
        max_scales=torch.full((2 if rows > 32 else 1,), 0.1).half(),
        order=torch.arange(rows),
    )


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    source = open_any(make_model("original", hidden_size=64))
    shapes = {name: source.shape(f"{name}.weight") for name in NAMES}
    write_model(
        source,
        {name: (lambda shape=shape: linear(shape[1], shape[0])) for name, shape in shapes.items()},
        tmp_path / "exl2",
        quantization={
            "version": "0.3.2",
            "bits": 4.0,
            "head_bits": 16,
            "calibration": {"rows": 1, "length": 8, "dataset": "none"},
        },
        provenance={},
    )
    return tmp_path / "exl2"


def plan_of(model: Path, bits: tuple[int, int] = (5, 3)) -> Path:
    source = open_any(model)
    plans = [
        LinearPlan(
            name=name,
            in_features=64,
            out_features=source.shape(f"{name}.weight")[0],
            group_rows=(32, 32),
            group_bits=bits,
            damage_nats=0.001 * number,
        )
        for number, name in enumerate(NAMES)
    ]
    path = model.with_name(f"{model.name}.work") / "plan.json"
    Exl2Plan(linears=tuple(plans), head=None, target_bpw=4.0, head_bits=16, lower_bound_nats=0.0, measurement="m").save(
        path
    )
    return path


def test_names() -> None:
    inside, outside = LinearCost("model.layers.12.mlp.down_proj", 4.0), LinearCost("lm_head", 6.0)
    assert (inside.block, inside.kind) == (12, "down_proj")
    assert (outside.block, outside.kind) == (None, "lm_head")
    assert LinearCost("model.layers.3.mlp.experts.11.up_proj", 4.0).block == 3


def test_exl2_and_its_plan(model: Path) -> None:
    assert find_plan(model) is None
    source = open_any(model)
    assert isinstance(source, Exl2Model)
    bare = linear_costs(source)
    inner = {f"model.layers.{i}.mlp.{x}_proj": 16.0 for i in (0, 1) for x in ("gate", "up", "down")}
    assert {cost.name: cost.bpw for cost in bare if cost.name not in NAMES} == inner  # they stayed in float16
    assert len(bare) == len(NAMES) + len(inner)
    expected = {name: source.linear(name).stored_bits for name in NAMES}
    for cost in (cost for cost in bare if cost.name in NAMES):
        assert cost.bpw == expected[cost.name] / (64 * source.shape(f"{cost.name}.weight")[0])
        assert cost.damage_nats is None
    path = plan_of(model)
    assert find_plan(model) == path
    damages = {cost.name: cost.damage_nats for cost in linear_costs(source, path) if cost.name in NAMES}
    assert damages == {name: 0.001 * number for number, name in enumerate(NAMES)}


def test_plan_of_another_size_is_not_believed(model: Path) -> None:
    assert {cost.damage_nats for cost in linear_costs(open_any(model), plan_of(model, (6, 3)))} == {None}


EXL2, GGUF = {"bpwise_plan": 3, "format": "exl2"}, {"bpwise_plan": 3, "format": "gguf"}
NO_TYPE = {"name": "x", "type": "Q9_K", "damage_nats": 0.1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not a plan. Got format None. Expected one of exl2, gguf"),
        ({"format": "exl2"}, "not a plan"),
        ({**EXL2, "format": ["exl2"]}, "not a plan"),
        ({**EXL2, "bpwise_plan": 2}, "not a plan of version 3"),
        ({**EXL2, "linears": [{"name": "x"}], "head": None}, "The plan is damaged"),
        ({**GGUF, "tensors": 5}, "The plan is damaged"),
        ({**GGUF, "tensors": [NO_TYPE]}, "The plan is damaged"),
        ({**GGUF, "tensors": [{**NO_TYPE, "type": "F16", "name": 1}]}, "The plan is damaged"),
    ],
    ids=["empty", "no-version", "format-a-list", "old", "linear", "tensors-a-number", "no-such-type", "name-a-number"],
)
def test_damaged_plan(model: Path, content: dict[str, Any], message: str) -> None:
    path = plan_of(model)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"plan\.json: .*{message}.*[Mm]ake it again with `bpwise plan`"):
        linear_costs(open_any(model), path)


def test_unquantized_models_have_none(make_model: Callable[..., Path]) -> None:
    assert linear_costs(open_any(make_model("original"))) == ()


def test_gguf_and_its_plan(tmp_path: Path) -> None:
    types = {"token_embd.weight": "Q8_0", "blk.10.ffn_up.weight": "Q4_0", "blk.9.ffn_up.weight": "Q6_K"}
    shapes = dict.fromkeys(types, (4, 256))
    stored = {name: GgufTensor(name, ggml_type(kind), shapes[name], 0, 0, Path()) for name, kind in types.items()}
    stored["output_norm.weight"] = GgufTensor("output_norm.weight", ggml_type("F32"), (256,), 0, 0, Path())
    header: Any = SimpleNamespace(tensors=stored, metadata={}, path=tmp_path / "x.gguf")
    file = GgufModel(header, None)
    costs = linear_costs(file)
    assert [(cost.name, cost.bpw) for cost in costs] == [
        ("token_embd", 8.5),
        ("blk.9.ffn_up", 6.5625),
        ("blk.10.ffn_up", 4.5),
    ]
    assert [cost.block for cost in costs] == [None, 9, 10]
    tensors = [
        TensorPlan(name=name, shape=(4, 256), linears=(), type=kind, damage_nats=0.25) for name, kind in types.items()
    ]
    path = tmp_path / "plan.json"
    plan = GgufPlan(
        tensors=tuple(tensors),
        other_weights=256,
        other_bytes=1024,
        target_bytes=9999,
        lower_bound_nats=0.0,
        measurement="m",
    )
    plan.save(path)
    assert {cost.damage_nats for cost in linear_costs(file, path)} == {0.25}
