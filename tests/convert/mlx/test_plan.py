"""Plans of MLX models, against all choices tried."""

import itertools
import math
from pathlib import Path

import pytest
from bpwise.convert.mlx.file.layout import Layout, StoredTensor
from bpwise.convert.mlx.grid.schemes import SCHEMES, Scheme
from bpwise.convert.mlx.plan.plan import MlxPlan, Override, TensorPlan
from bpwise.convert.mlx.plan.problem import plan_problem
from bpwise.convert.registry import load_plan
from bpwise.errors import BudgetError, ConfigError, FormatError

SHAPES = {"a": (64, 128), "b": (32, 96), "experts": (2, 16, 64)}


def layout() -> Layout:
    tensors = {f"{x}.weight": matrix(x, shape) for x, shape in SHAPES.items()}
    tensors["norm.weight"] = StoredTensor(shape=(64,), dtype="bfloat16", source="norm.weight")
    return Layout(tensors=tensors, modules=tuple(SHAPES))


def matrix(name: str, shape: tuple[int, ...]) -> StoredTensor:
    count = math.prod(shape[:-2])
    linears = (name,) if count == 1 else tuple(f"{name}.{i}" for i in range(count))
    return StoredTensor(shape=shape, dtype="bfloat16", linears=linears, outputs=(shape[-2],) * count)


def damages() -> dict[str, list[float]]:
    found = {}
    for name, tensor in layout().tensors.items():
        for number, linear in enumerate(tensor.linears):
            scale = 1.0 + len(name) + number
            found[linear] = [
                scale * 4.0**-x.bits * (1 + x.group_size / 64) if x.fits(tensor.shape[-1]) else math.inf
                for x in SCHEMES
            ]
    return found


def test_sizes_are_those_of_codes_scales_and_all_else() -> None:
    problem = plan_problem(layout(), damages())
    least = 64 * (128 * 2 // 8 + 4) + 32 * (96 * 2 // 8 + 4 * 3) + 32 * (64 * 2 // 8 + 4)
    most = 2 * (64 * 128 + 32 * 96 + 32 * 64)
    assert problem.size_range == (least + 128, most + 128)
    assert problem.weights == 64 * 128 + 32 * 96 + 32 * 64 + 64
    assert problem.target_bytes(bpw=4.5, tensor_bytes=None) == problem.weights * 4.5 // 8
    with pytest.raises(BudgetError, match="cannot be reached"):
        problem.target_bytes(bpw=2.0, tensor_bytes=None)


def test_stacked_experts_have_one_scheme_and_the_sum_of_their_damages() -> None:
    known = damages()
    (stack,) = (each for each in plan_problem(layout(), known).candidates if each.name == "experts.weight")
    for place, scheme in enumerate(SCHEMES):
        if scheme.fits(64):
            assert stack.damages[scheme.name] == pytest.approx(known["experts.0"][place] + known["experts.1"][place])
    assert "4g128" not in stack.damages
    assert stack.damages["16"] == 0


def test_overrides_leave_a_choice_and_are_refused_where_they_leave_none() -> None:
    problem = plan_problem(layout(), damages(), overrides=[Override.parse("*=4"), Override.parse("experts*=6g32,16")])
    choices = {each.name: set(each.damages) for each in problem.candidates}
    assert choices == {
        "a.weight": {"4g32", "4g64", "4g128"},
        "b.weight": {"4g32"},
        "experts.weight": {"6g32", "16"},
    }
    with pytest.raises(ConfigError, match=r"b\.weight has 96 input channels"):
        plan_problem(layout(), damages(), overrides=[Override.parse("b=4g128")])
    with pytest.raises(ConfigError, match="no module has such a name"):
        plan_problem(layout(), damages(), overrides=[Override.parse("c=4")])
    for text in ("a", "a=7", "a=4g48", "=4"):
        with pytest.raises(ConfigError, match="--override"):
            Override.parse(text)


def planned(schemes: dict[str, str | None]) -> MlxPlan:
    tensors = tuple(
        TensorPlan(
            name=f"{name}.weight",
            shape=SHAPES[name],
            dtype="bfloat16",
            linears=(name,),
            scheme=scheme,
            damage_nats=0.01,
        )
        for name, scheme in schemes.items()
    )
    return MlxPlan(
        tensors=tensors, other_weights=64, other_bytes=128, target_bytes=9999, lower_bound_nats=0.02, measurement="m"
    )


def test_a_plan_is_saved_and_read_again(tmp_path: Path) -> None:
    plan = planned({"a": "4g64", "b": None})
    assert plan.stored_bytes == 64 * (64 + 8) + 32 * 96 * 2 + 128
    assert plan.kinds == {"a.weight": Scheme(4, 64)}
    assert plan.shares() == {"4g64": 64 * 128 / (64 * 128 + 32 * 96), "16": 32 * 96 / (64 * 128 + 32 * 96)}
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace("4g64", "4g99"))
    with pytest.raises(FormatError):
        load_plan(tmp_path / "plan.json")


def test_the_choice_is_the_best_of_all() -> None:
    # By hand, through the same problem: every combination of three schemes for each module.
    problem = plan_problem(layout(), damages(), overrides=[Override.parse("*=3g32,4g32,6g32")])
    budget = 9500
    best = min(
        (sum(each.damages[name] for each, name in zip(problem.candidates, names, strict=True)), names)
        for names in itertools.product(("3g32", "4g32", "6g32"), repeat=3)
        if sum(
            dict(zip(each.damages, each.sizes, strict=True))[name]
            for each, name in zip(problem.candidates, names, strict=True)
        )
        <= budget - problem.other_bytes
    )
    chosen = problem.best(budget)
    assert tuple(chosen.options) == tuple(
        list(each.damages).index(name) for each, name in zip(problem.candidates, best[1], strict=True)
    )
