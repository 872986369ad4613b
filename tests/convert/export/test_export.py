"""Plans for other programs: read back by each program's own rules, and by its own code where that is installed."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from bpwise.checkpoint.model.structure_json import structure_to_json
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.cli import cli
from bpwise.convert.conversion import Target
from bpwise.convert.export.export import export_plan, exporters
from bpwise.convert.export.units import Unit, joined_units, single_units
from bpwise.convert.export.widths import Grid, choose_bits
from bpwise.convert.gguf.export.rules import tensor_rules
from bpwise.convert.gguf.plan.plan import GgufPlan, TensorPlan
from bpwise.errors import BudgetError, ConfigError
from bpwise.measure.measurement import Measurement
from click.testing import CliRunner, Result
from transformers import PreTrainedTokenizerFast

from ...measured import EXL2, GGUF, bare_measurement, exl2_of, gguf_of, layout_of
from ...tiny_models import save_family, save_with_vision

ENGINES = ["llama-quantize", "ik", "exllamav3", "gptqmodel", "auto-round"]
TYPES = ("Q8_0", "Q5_0", "IQ4_NL", "Q4_0")
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def measured(tiny_model: Path) -> Measurement:
    """Made-up damages of a two-layer Llama: hidden size 64, 96 neurons, 264 tokens."""
    source = language_model(open_model(tiny_model))
    shapes = {f"model.layers.{index}.{name}": _shape(source, index, name) for index in range(2) for name in NAMES}
    shapes["lm_head"] = (64, 264)
    rng = np.random.default_rng(0)
    costs = {name: rng.uniform(0.1, 4) for name in shapes}
    widths = np.array([4.0**-bits for bits in (8, 6, 5, 4, 3, 2)])
    exl2 = exl2_of(
        {name: np.outer(np.ones(shape[0] // 32), widths) * costs[name] for name, shape in shapes.items()},
        {name: np.arange(shape[0], dtype=np.int32) for name, shape in shapes.items()},
        group_size=32,
    )
    types = np.array([4.0**-8.5, 4.0**-5.5, 4.0**-4.5, 1.5 * 4.0**-4.5], dtype=np.float32)
    matrices = {name: (columns, rows) for name, (rows, columns) in shapes.items()}
    layout = layout_of({**matrices, "model.embed_tokens": (264, 64)}, others={"output_norm.weight": (64,)})
    gguf = gguf_of(TYPES, {name: [types * np.float32(cost)] for name, cost in costs.items()}, types, layout)
    return bare_measurement(
        shapes,
        {EXL2: exl2, GGUF: gguf},
        provenance={"model": "x", "structure": structure_to_json(source.structure)},
    )


def _shape(source: object, index: int, name: str) -> tuple[int, int]:
    rows, columns = source.shape(f"model.layers.{index}.{name}.weight")  # type: ignore[attr-defined]
    return columns, rows


@pytest.fixture
def file(measured: Measurement, tmp_path: Path) -> Path:
    measured.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def export(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=False)


def exported(file: Path, engine: str, bpw: float) -> str:
    result = export(file, "--for", engine, "--bpw", bpw)
    assert result.exit_code == 0, result.stderr
    (path,) = file.parent.glob(f"m-{engine}-{bpw:g}bpw.*")
    assert path.name in result.stdout
    return path.read_text(encoding="utf-8")


def test_all_engines_are_tried() -> None:
    assert list(exporters()) == ENGINES


# Rules for tensors


def first_match(rules: list[tuple[str, str]], tensor: str) -> str | None:
    return next((kind for pattern, kind in rules if re.search(pattern, tensor)), None)


TENSORS = {
    **{f"blk.{index}.{name}.weight": (32, 64) for index in range(12) for name in ("attn_q", "ffn_down")},
    "blk.3.ffn_gate_exps.weight": (4, 32, 64),
    "token_embd.weight": (100, 64),
    "output.weight": (100, 64),
}


def plan_of(types: dict[str, str]) -> GgufPlan:
    tensors = [TensorPlan(name=x, shape=TENSORS[x], linears=(), type=kind, damage_nats=0) for x, kind in types.items()]
    numbers = {"other_weights": 64, "other_bytes": 256, "target_bytes": 1 << 30, "lower_bound_nats": 0}
    return GgufPlan(tensors=tuple(tensors), measurement="x", **numbers)


def test_rules_name_every_tensor_and_no_other() -> None:
    rng = np.random.default_rng(1)
    wide = {name: str(rng.choice(["Q8_0", "F16", "MXFP4", "IQ4_NL"])) for name in TENSORS}
    rules = [tuple(rule.split("=", 1)) for rule in tensor_rules(plan_of(wide))]
    assert {name: first_match(rules, name) for name in TENSORS} == {name: kind.lower() for name, kind in wide.items()}
    for other in ("blk.0.attn_q_norm.weight", "xblk.0.attn_q.weight", "blk.0.attn_q.bias", "blk.12.attn_q.weight"):
        assert first_match(rules, other) is None
    assert len(rules) < len(TENSORS)


IK_TYPES = "f16 q4_0 q4_1 q5_0 q5_1 q6_0 q8_0 q2_K q3_K q4_K q5_K q6_K iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s"
IK_TYPES += " iq4_nl iq4_xs mxfp4"
"""Of ik_llama.cpp's ``ggml_type_name`` those that it shares with llama.cpp; it compares with strcmp."""


def test_ik(file: Path) -> None:
    text = exported(file, "ik", 6)
    assert text.count("\n") == 1 and text.endswith("\n") and not re.search(r"\s", text[:-1])
    rules = []
    for item in text[:-1].split(","):  # string_split at commas; find('='), the rest is the type
        position = item.find("=")
        assert item[position + 1 :] in IK_TYPES.split()
        rules.append((item[:position], item[position + 1 :]))
    ours = GgufPlan.from_json(made_plan(file, 6), "plan")
    assert {x.name: first_match(rules, x.name) for x in ours.tensors} == {x.name: x.type.lower() for x in ours.tensors}


def made_plan(file: Path, bpw: float) -> dict[str, object]:
    path = file.with_name("plan.json")
    arguments = ["plan", str(file), "--format", "gguf", "--bpw", str(bpw), "-o", str(path)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    raw: dict[str, object] = json.loads(path.read_text())
    return raw


def test_names_of_types_are_ggmls() -> None:
    quantized = {f"blk.{index}.ffn_down.weight": kind for index, kind in enumerate(("Q2_K", "IQ4_XS", "Q6_K"))}
    tensors = [
        TensorPlan(name=name, shape=(32, 256), linears=(), type=kind, damage_nats=0) for name, kind in quantized.items()
    ]
    numbers = {"other_weights": 0, "other_bytes": 0, "target_bytes": 1 << 30, "lower_bound_nats": 0}
    rules = tensor_rules(GgufPlan(tensors=tuple(tensors), measurement="x", **numbers))
    assert [rule.split("=")[1] for rule in rules] == ["q2_K", "iq4_xs", "q6_K"]


def test_llama_quantize(file: Path) -> None:
    lines = exported(file, "llama-quantize", 6).split()  # parse_tensor_type_file reads words
    rules = [(line[: line.find("=")].lower(), line[line.find("=") + 1 :].lower()) for line in lines]
    ours = GgufPlan.from_json(made_plan(file, 6), "plan")
    assert {x.name: first_match(rules, x.name) for x in ours.tensors} == {x.name: x.type.lower() for x in ours.tensors}
    commands = export_plan(file, engine="llama-quantize", bpw=6, dry_run=True).commands
    assert [command.split()[0] for command in commands] == ["bpwise", "llama-quantize"]
    assert commands[0].split()[-1] == commands[1].split()[2]  # the matrix


# Bits of linears


@pytest.mark.parametrize("bpw", [3.2, 4.5, 7.9])
def test_choice_is_the_best(measured: Measurement, bpw: float) -> None:
    # By trying all: six of the linears, three widths.
    linears = measured.linears[:6]
    few = bare_measurement(
        {x.name: (x.in_features, x.out_features) for x in (*linears, measured.head)}, measured.curves
    )
    units = [Unit("layers.0", linears=[x.name]) for x in linears]
    grid = Grid(engine="e", widths=(2, 4, 8), group_size=32)
    found = choose_bits(few, units, grid, Target(bpw=bpw))
    curves = measured.curves[EXL2].linears
    damage = [dict(zip((8, 6, 5, 4, 3, 2), curves[x.name]["damage_nats"].sum(axis=0), strict=True)) for x in linears]
    weights = [x.in_features * x.out_features for x in linears]
    bits = {
        choice: sum(w * (b + (16 + b) / 32) for w, b in zip(weights, choice, strict=True)) / sum(weights)
        for choice in product(grid.widths, repeat=len(linears))
    }
    costs = {
        choice: sum(d[b] for d, b in zip(damage, choice, strict=True)) for choice, size in bits.items() if size <= bpw
    }
    best = min(costs, key=lambda choice: costs[choice])
    assert found.damage_nats == pytest.approx(costs[best], rel=1e-5)  # float32 damages
    assert found.bpw == pytest.approx(bits[found.bits])


def test_a_size_counts_what_is_not_planned(measured: Measurement) -> None:
    units = [Unit("layers", linears=[x.name]) for x in measured.linears]
    beside = 2 * (100 * 64 + 64 * 264)  # the made-up table and the head, in 16 bits
    found = choose_bits(measured, units, Grid(engine="e", widths=(2, 3, 4)), Target(max_bytes=beside + 20000))
    weights = sum(x.in_features * x.out_features for x in measured.linears)
    assert 19000 < found.bpw * weights / 8 <= 20000


def test_exllamav3(file: Path, measured: Measurement) -> None:
    recipe = yaml.safe_load(exported(file, "exllamav3", 4.3))
    assert recipe.keys() == {"achieved_bpw", "head_bits", "tensors"}
    entries = recipe["tensors"]
    assert all(isinstance(bits, int) and 1 <= bits <= 8 for bits in entries.values())
    # The last that matches wins, all linears of the decoder are matched, and nothing else may be named.
    names = [linear.name for linear in measured.linears]
    found = {name: [bits for pattern, bits in entries.items() if fnmatchcase(name, pattern)] for name in names}
    assert all(found.values())
    assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in entries)
    assert not any(fnmatchcase("lm_head", pattern) for pattern in entries)
    padded = {x.name: -(-x.in_features // 128) * -(-x.out_features // 128) for x in measured.linears}
    average = sum(padded[name] * bits[-1] for name, bits in found.items()) / sum(padded.values())
    assert recipe["achieved_bpw"] == pytest.approx(average, abs=1e-4)
    assert 4.1 < average <= 4.3


def test_gptqmodel(file: Path, measured: Measurement) -> None:
    settings = json.loads(exported(file, "gptqmodel", 4.8))
    assert settings.keys() == {"dynamic", "bits", "group_size", "sym"}
    assert settings["group_size"] == 32  # of 64 and 96 inputs

    def bits(name: str) -> int:  # matched from the start, the first wins
        return next(own["bits"] for pattern, own in settings["dynamic"].items() if re.match(pattern, name))

    for index in range(2):
        layer = f"model.layers.{index}"
        parts = {bits(f"{layer}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")}
        assert len(parts) == 1
        assert len({bits(f"{layer}.mlp.{name}") for name in ("gate_proj", "up_proj", "gate_up_proj")}) == 1
        assert bits(f"{layer}.mlp.down_proj") == bits(f"language_model.{layer}.mlp.down_proj")
    assert not any(re.match(pattern, "lm_head") for pattern in settings["dynamic"])
    assert not any(re.match(pattern, "model.vision_tower.layers.0.mlp.down_proj") for pattern in settings["dynamic"])
    sizes = {x.name: x.in_features * x.out_features for x in measured.linears}
    average = sum(size * (bits(name) + (16 + bits(name)) / 32) for name, size in sizes.items()) / sum(sizes.values())
    assert 4.2 < average <= 4.8
    assert {bits(name) for name in sizes} <= {2, 3, 4, 8}


def test_gptqmodel_itself(file: Path) -> None:
    reason = "GPTQModel is not installed: docs/export.md says how it was tried"
    gptqmodel = pytest.importorskip("gptqmodel", reason=reason)
    settings = json.loads(exported(file, "gptqmodel", 4.8))
    config = gptqmodel.QuantizeConfig(**settings)
    for pattern, own in settings["dynamic"].items():
        names = [name for name in _modules() if re.match(pattern, name)]
        assert names and {config.dynamic_get(name, "bits", config.bits) for name in names} == {own["bits"]}
    assert config.dynamic_get("lm_head") is None


def _modules() -> list[str]:
    return [f"model.layers.{index}.{name}" for index in range(2) for name in NAMES]


def test_auto_round(file: Path) -> None:
    config = json.loads(exported(file, "auto-round", 4.8))
    other = json.loads(exported(file, "gptqmodel", 4.8))["dynamic"]
    assert all(own == {"bits": own["bits"], "group_size": 32} for own in config.values())
    # It puts a backslash before every dot that no star follows.
    escaped = {pattern.replace(".", r"\."): own["bits"] for pattern, own in config.items()}
    assert escaped == {pattern: own["bits"] for pattern, own in other.items()}


def test_auto_round_itself(file: Path) -> None:
    utils = pytest.importorskip(
        "auto_round.utils", reason="AutoRound is not installed: docs/export.md says how it was tried"
    )
    config = utils.parse_layer_config_arg(exported(file, "auto-round", 4.8).strip())
    matched = {
        name: [own["bits"] for pattern, own in config.items() if re.search(utils.to_standard_regex(pattern), name)]
        for name in (*_modules(), "lm_head")
    }
    assert matched.pop("lm_head") == []
    assert all(len(bits) == 1 for bits in matched.values())


# Units


@pytest.fixture
def structure_of(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], object]:
    def build(family: str) -> object:
        return language_model(open_model(save_family(tmp_path / family, family, byte_tokenizer))).structure

    return build


def matched(units: list[Unit], name: str) -> list[str]:
    return [linear for unit in units if re.match(unit.pattern, name) for linear in unit.linears]


def test_fused_linears_are_one_module(structure_of: Callable[[str], object]) -> None:
    units = joined_units(structure_of("phi3"))  # type: ignore[arg-type]
    layer = "model.layers.1.self_attn"
    assert matched(units, f"{layer}.qkv_proj") == [f"{layer}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert matched(units, f"{layer}.q_proj") == []
    single = single_units(structure_of("phi3"))  # type: ignore[arg-type]
    assert [unit.linears for unit in single if unit.names == ["self_attn.q_proj"]] == [
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.1.self_attn.q_proj"],
    ]


@pytest.mark.parametrize(("family", "file_name"), [("mixtral", "block_sparse_moe"), ("qwen2_moe", "mlp")])
def test_experts_are_one_unit(structure_of: Callable[[str], object], family: str, file_name: str) -> None:
    structure = structure_of(family)
    joined, single = joined_units(structure), single_units(structure)  # type: ignore[arg-type]
    for name in ("mlp.experts", "mlp.experts.3.gate_proj", f"{file_name}.experts", f"{file_name}.experts.0.w1"):
        assert len(matched(joined, f"model.layers.1.{name}")) == 12  # four experts, three linears each
    (own,) = (unit for unit in single if unit.below and unit.place == "layers.1")
    assert own.names == [f"{file_name}.experts"]
    if family == "qwen2_moe":
        shared = matched(joined, "model.layers.1.mlp.shared_expert.gate_up_proj")
        assert [name.rpartition(".")[2] for name in shared] == ["gate_proj", "up_proj"]


def test_inside_of_another_model(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = open_model(save_with_vision(tmp_path / "model", "mistral3", byte_tokenizer))
    units = joined_units(language_model(model).structure)
    for prefix in ("language_model.model", "model.language_model", "model"):
        assert len(matched(units, f"{prefix}.layers.0.self_attn.qkv_proj")) == 3
    assert matched(units, "model.vision_tower.transformer.layers.0.self_attn.qkv_proj") == []


# What is refused


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_that_small_or_large(file: Path, engine: str) -> None:
    for bpw in (1.1, *([] if engine in ENGINES[:2] else [15])):
        result = export(file, "--for", engine, "--bpw", bpw)
        assert result.exit_code == 1
        assert "cannot be reached" in result.stderr and "Ask for a size in this range." in result.stderr
    with pytest.raises(BudgetError, match="cannot be reached"):
        export_plan(file, engine=engine, max_bytes=10)
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("engine", "left"), [("ik", EXL2), ("llama-quantize", EXL2), ("gptqmodel", GGUF)])
def test_curves_are_needed(measured: Measurement, tmp_path: Path, engine: str, left: str) -> None:
    curves = {left: measured.curves[left]}
    bare_measurement(
        {x.name: (x.in_features, x.out_features) for x in (*measured.linears, measured.head)},
        curves,
        provenance=measured.provenance,
    ).save(tmp_path / "m.safetensors")
    result = export(tmp_path / "m.safetensors", "--for", engine, "--bpw", 5)
    assert result.exit_code == 1
    assert f"Got {left}" in result.stderr or f"Got those of {left}" in result.stderr
    assert "bpwise measure" in result.stderr


def test_a_structure_is_needed(measured: Measurement, tmp_path: Path) -> None:
    shapes = {x.name: (x.in_features, x.out_features) for x in (*measured.linears, measured.head)}
    for structure in (None, {**measured.provenance["structure"], "blocks": "other"}):
        provenance = {"model": "x", **({} if structure is None else {"structure": structure})}
        bare_measurement(shapes, measured.curves, provenance=provenance).save(tmp_path / "m.safetensors")
        result = export(tmp_path / "m.safetensors", "--for", "exllamav3", "--bpw", 5)
        assert result.exit_code == 1
        assert "structure" in result.stderr


def test_inputs_are_whole_groups(measured: Measurement, tmp_path: Path) -> None:
    shapes = {x.name: (x.in_features, x.out_features) for x in (*measured.linears, measured.head)}
    odd = {name: (48 if shape[0] == 96 else shape[0], shape[1]) for name, shape in shapes.items()}
    bare_measurement(odd, measured.curves, provenance=measured.provenance).save(tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="48 inputs"):
        export_plan(tmp_path / "m.safetensors", engine="auto-round", bpw=5)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_files_stay(file: Path, engine: str) -> None:
    output = file.with_name("out")
    output.write_text("mine\n")
    result = export(file, "--for", engine, "--bpw", 6, "-o", output)
    assert result.exit_code == 1
    assert "in the way" in result.stderr
    assert output.read_text() == "mine\n"
    assert export(file, "--for", engine, "--bpw", 6, "-o", output, "--force").exit_code == 0
    assert export(file, "--for", engine, "--bpw", 5, "-o", output).exit_code == 0  # its own
    assert export(file, "--for", engine, "--bpw", 5, "-o", file, "--force").exit_code == 1


def test_one_target(file: Path) -> None:
    for targets in ((), ("--bpw", 4, "--max-size", "1MB")):
        result = export(file, "--for", "ik", *targets)
        assert result.exit_code == 2
        assert "one target" in result.stderr
    with pytest.raises(ConfigError, match="engine: not known"):
        export_plan(file, engine="other", bpw=4)


def test_a_dry_run_writes_nothing(file: Path) -> None:
    result = export(file, "--for", "exllamav3", "--bpw", 4, "--dry-run")
    assert result.exit_code == 0
    assert "not written" in result.stdout and "convert.py" in result.stdout
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]
