from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.gguf import rounder
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.kernels import decode, encode
from bpwise.convert.gguf.ggml.rounding import round_to_type
from bpwise.convert.gguf.ggml.types import GgmlType, ggml_type
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.plan.plan import GgufPlan, TypeOverride
from bpwise.convert.gguf.rounder import GgufRounder, rounded_matrices, table_importance, tensor_distances
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.rounding import RoundedModel
from bpwise.linalg.hessian import Hessian, factor_hessian
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.rounding.model import RoundConfig, round_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...conftest import SaveModel
from ...measured import plain_file

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")

# Two layers of width 64: the 32-blocks fit everywhere, the 256-blocks nowhere.
COARSE = ["*=Q4_0"]


def rows() -> CalibrationSet:
    ids = torch.randint(0, 264, (12, 32), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * 12, description="random ids", adds_bos=False)


class Case:
    def __init__(self, directory: Path, work: Path, layout: Layout | None = None) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self.work = work
        layout = layout or plain_file(directory)
        self.rows = layout.rows
        curves = GgufCurves(measured_types(), layout)
        config = MeasureConfig(device="cpu")
        self.measurement: Measurement = measure_checkpoint(self.checkpoint, rows(), config, [curves], work / "measure")

    def plan(self, overrides: list[str]) -> GgufPlan:
        return make_gguf_plan(self.measurement, bpw=16.5, overrides=list(map(TypeOverride.parse, overrides)))

    def rounder(self, plan: GgufPlan) -> GgufRounder:
        return GgufRounder(plan, self.measurement, self.checkpoint, self.rows)

    def round(self, plan: GgufPlan, work: str = "round") -> RoundedModel:
        config = RoundConfig(device="cpu")
        return round_model(self.checkpoint, self.measurement, plan, self.rounder(plan), config, self.work / work)

    def decoded(self, rounded: RoundedModel, plan: GgufPlan) -> dict[str, Tensor]:
        return {tensor.linears[0]: decode(data(rounded, tensor.linears[0]), tensor.kind) for tensor in plan.tensors}


def data(rounded: RoundedModel, name: str, part: int = 0) -> Any:
    return rounded.artifact(name)[f"data.{part}"].numpy()


@pytest.fixture(scope="module")
def tied(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tied")
    return Case(save_model(folder / "model", tie_word_embeddings=True), folder)


@pytest.fixture(scope="module")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny_model, tmp_path_factory.mktemp("untied"))


@torch.no_grad()
def kl_from_original(directory: Path, weights: dict[str, Tensor]) -> float:
    """Mean KL divergence in float64 of the whole model with these weights, by Transformers alone."""
    original, changed = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64) for _ in range(2))
    for name, weight in weights.items():
        module = changed.get_submodule(name)
        assert isinstance(module, nn.Module)
        module.weight.copy_(weight)
    log_p, log_q = (m(input_ids=rows().tokens).logits.log_softmax(-1) for m in (original, changed))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def kinds(plan: GgufPlan) -> dict[str, GgmlType]:
    """Types by linear, where every tensor is one."""
    return {tensor.linears[0]: tensor.kind for tensor in plan.tensors}


def plain(case: Case, name: str, plan: GgufPlan) -> Tensor:
    kind = kinds(plan)[name]
    return decode(encode(case.checkpoint.tensor(f"{name}.weight").float(), kind), kind)


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_costs_less_than_ggmls_own_rounding(which: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(which)
    plan = case.plan(COARSE)
    rounded = case.round(plan)
    assert set(rounded.names) == set(kinds(plan))
    assert ("lm_head" in rounded.names) == (which == "untied")
    ours = kl_from_original(case.checkpoint.directory, case.decoded(rounded, plan))
    theirs = kl_from_original(case.checkpoint.directory, {name: plain(case, name, plan) for name in kinds(plan)})
    assert ours < 0.8 * theirs
    # The curves promise about what comes out: the same order of magnitude, on so little text.
    assert 0.3 < plan.damage_nats / ours < 3


def test_a_table_that_is_the_head_is_rounded_with_feedback(tied: Case) -> None:
    made, plan, kind = tied.measurement, tied.plan(["token_embd.weight=Q4_0"]), ggml_type("Q4_0")
    curves, head = made.curves["gguf"], made.head
    power = head.fisher.sum() * head.input_power + made.embedding.importance
    assert np.allclose(curves.table["gram"].diagonal(), power, rtol=1e-4)

    inputs = torch.randn(256, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(256, 64)  # outputs hang together
    gram = (inputs.T @ inputs).double()
    curves = replace(curves, table={**curves.table, "gram": gram.float().numpy()})
    rounder = GgufRounder(plan, replace(made, curves={"gguf": curves}), tied.checkpoint, tied.rows)
    weight = tied.checkpoint.tensor("model.embed_tokens.weight").float()

    def cost(data: Any) -> float:
        missed = (decode(data, kind) - weight).double()
        return float(((missed @ gram) * missed).sum())

    ours = cost(rounder.round_table()["data.0"].numpy())
    assert ours < 0.5 * cost(encode(weight, kind, gram.diagonal().float()))


def test_an_unquantized_type_keeps_the_weights_where_nothing_drifts(untied: Case) -> None:
    plan = untied.plan(["*=F16"])
    for name, weight in untied.decoded(untied.round(plan, "f16"), plan).items():
        expected = untied.checkpoint.tensor(f"{name}.weight").float()
        # float16 keeps 11 bits; the drift that this makes is corrected, by less still.
        assert torch.allclose(weight, expected, rtol=2e-3, atol=1e-4), name


def test_what_a_type_holds_without_error_stays_as_it_is(save_model: SaveModel, tmp_path: Path) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]) / 16  # E2M1, one scale
    exact = values[torch.randint(0, len(values), (2, 64, 96), generator=torch.Generator().manual_seed(3))]

    def put_on_grid(model: Any) -> None:
        for layer, weight in zip(model.model.layers, exact, strict=True):
            layer.mlp.down_proj.weight.copy_(weight)

    case = Case(save_model(tmp_path / "model", change=put_on_grid), tmp_path)
    plan = case.plan(["*=Q4_0", "*.ffn_down.*=MXFP4"])
    found = case.decoded(case.round(plan), plan)
    for layer, weight in enumerate(exact):
        assert torch.equal(found[f"model.layers.{layer}.mlp.down_proj"], weight)
        # In every other type there is drift to cancel.
        changed = found[f"model.layers.{layer}.mlp.up_proj"]
        assert not torch.equal(changed, plain(case, f"model.layers.{layer}.mlp.up_proj", plan))


def test_finished_blocks_are_not_done_again(untied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = untied.plan(COARSE)
    whole = untied.round(plan)
    monkeypatch.setattr("bpwise.convert.gguf.rounder.round_to_type", None)
    again = untied.round(plan)
    assert np.array_equal(data(whole, "lm_head"), data(again, "lm_head"))
    assert data(whole, "lm_head").shape == (264, 64 // 32 * 18)


def test_importance_of_a_table_counts_both_uses(tied: Case, untied: Case) -> None:
    head, table = tied.measurement.head, tied.measurement.embedding
    expected = [
        float(e) + sum(float(f) for f in head.fisher) * float(h)
        for e, h in zip(table.importance, head.input_power, strict=True)
    ]
    assert table_importance(tied.measurement).tolist() == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(table_importance(untied.measurement).numpy(), untied.measurement.embedding.importance)


def test_reports_drift_and_damping(untied: Case) -> None:
    plan = untied.plan(COARSE)
    rounded = untied.round(plan)
    assert len(rounded.drift()) == 2
    dampings = rounded.numbers("damping")
    assert dampings.keys() == rounded.numbers("distance.0").keys() == set(kinds(plan)) - {"model.embed_tokens"}
    assert all(damping > 0 for damping in dampings.values())


def test_distances_are_those_of_what_a_reader_sees(untied: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = untied.plan(COARSE)
    lengths: list[int] = []

    def decoded(encoded: Any, kind: GgmlType, **options: Any) -> Tensor:
        lengths.append(len(encoded))
        return decode(encoded, kind, **options)

    monkeypatch.setattr(rounder, "_SLICE_OUTPUTS", 40)
    monkeypatch.setattr(rounder, "decode", decoded)
    rounded = untied.round(plan, "slices")
    assert lengths.count(264) == 1  # the embeddings' table; of the head, which is as large, only slices
    for name, distance in rounded.numbers("distance.0").items():
        weight = untied.checkpoint.tensor(f"{name}.weight").double()
        made = decode(data(rounded, name), kinds(plan)[name]).double()
        assert distance == pytest.approx(float((made - weight).square().sum()), rel=1e-5)


BLOCK = "model.layers.0"
COLUMNS = np.random.default_rng(0).permutation(96)


def changed_file(directory: Path) -> Layout:
    """A file whose first block joins, splits, stacks and reorders: what converters do, all at once."""
    plain = plain_file(directory)
    tensors, rows = {**plain.tensors}, {**plain.rows.tensors}
    for stem in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        del tensors[f"blk.0.{stem}.weight"], rows[f"blk.0.{stem}.weight"]
    q, k, o = (f"{BLOCK}.self_attn.{name}_proj" for name in "qko")
    gate, up, down = (f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up", "down"))
    heads = np.arange(64).reshape(4, 2, 8).transpose(0, 2, 1).reshape(-1)
    none = np.zeros(32, dtype=np.int64)
    made = {
        # Queries in llama.cpp's order of rows, and keys behind them.
        "attn_qk": (TensorRows((q, k), np.repeat([0, 1], [64, 32]), np.concatenate([heads, np.arange(32)])), (96, 64)),
        # Gate and up interleaved in one tensor.
        "ffn_gate_up": (TensorRows((gate, up), np.tile([0, 1], 96), np.repeat(np.arange(96), 2)), (192, 64)),
        # One linear in two tensors, every other output in each.
        "attn_o_a": (TensorRows((o,), none, np.arange(0, 64, 2)), (32, 64)),
        "attn_o_b": (TensorRows((o,), none, np.arange(1, 64, 2)), (32, 64)),
        # Other columns, and half of the rows in a matrix of its own, as experts are.
        "ffn_down_exps": (TensorRows((down,), np.zeros(64, dtype=np.int64), np.arange(64), COLUMNS), (2, 32, 96)),
    }
    for stem, (own, shape) in made.items():
        rows[f"blk.0.{stem}.weight"] = own
        tensors[f"blk.0.{stem}.weight"] = StoredTensor(ggml_type("F16"), shape)
    return Layout(tensors, RowMap(rows, {}), 4096)


@pytest.fixture(scope="module")
def changed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tiny_model, tmp_path_factory.mktemp("changed"), changed_file(tiny_model))


def as_in_file(own: TensorRows, weights: dict[str, Tensor]) -> Tensor:
    """The rows that a map describes, one by one."""
    picked = [weights[own.linears[s]][o] for s, o in zip(own.source, own.output, strict=True)]
    return torch.stack(picked) if own.columns is None else torch.stack(picked)[:, torch.from_numpy(own.columns)]


def test_tensors_of_any_rows_are_what_later_blocks_saw(changed: Case, untied: Case) -> None:
    overrides = ["*=Q4_0", "blk.0.attn_o_b=Q8_0", "blk.0.attn_v=F16"]
    plan = changed.plan(overrides)
    rounded, made = changed.round(plan), changed.rounder(plan)
    seen = {name: made.decoded(name, rounded.artifact(name)) for name in rounded.names}
    originals = {name: changed.checkpoint.tensor(f"{name}.weight") for name in rounded.names}
    distances = tensor_distances(rounded, changed.rows)
    for tensor in plan.tensors:
        matrices = list(rounded_matrices(rounded, changed.rows, tensor.name, tensor.shape))
        assert [matrix.shape[0] for matrix in matrices] == [tensor.shape[-2]] * (len(matrices))
        values = decode(np.concatenate(matrices), tensor.kind)
        own = changed.rows.tensors[tensor.name]
        assert torch.equal(values, as_in_file(own, seen)), tensor.name
        if tensor.name != "token_embd.weight":
            expected = float((values - as_in_file(own, originals)).double().square().sum())
            assert distances[tensor.name] == pytest.approx(expected, rel=1e-5)
    # It costs what the same bits cost in a file that changes nothing.
    directory = changed.checkpoint.directory
    same = untied.plan(["*=Q4_0", "blk.0.attn_v=F16"])
    plainly = kl_from_original(directory, untied.decoded(untied.round(same, "same"), same))
    assert 0.5 * plainly < kl_from_original(directory, seen) < 1.2 * plainly


def test_columns_are_rounded_in_the_files_order(changed: Case) -> None:
    # Feedback runs from column to column as the file has them, and blocks of 32 hold neighbours there.
    plan, name = changed.plan(COARSE), f"{BLOCK}.mlp.down_proj"
    measured = next(x for x in changed.measurement.linears if x.name == name)
    measured = replace(measured, coupling=np.zeros((64, 0), dtype=np.float16))  # each output for itself
    rng = torch.Generator().manual_seed(3)
    inputs, target = torch.randn(400, 96, generator=rng), 0.1 * torch.randn(96, 64, generator=rng)
    gram = inputs.T @ inputs / 400
    made = changed.rounder(plan).round_linear(measured, target.clone(), Hessian(gram))
    columns = torch.from_numpy(COLUMNS)
    factor = factor_hessian(gram[columns][:, columns], measured.damping)
    expected = round_to_type(target[columns].contiguous(), factor.upper, ggml_type("Q4_0"))
    assert np.array_equal(made["data.0"].numpy(), expected)
    decoded = changed.rounder(plan).decoded(name, made)
    assert torch.equal(decoded[:, columns], decode(expected, ggml_type("Q4_0")))
    assert (decoded - target.T).abs().max() < 0.1


def test_what_no_planned_tensor_holds_stays(tiny_model: Path, tmp_path: Path) -> None:
    plain = plain_file(tiny_model)
    rows = {**plain.rows.tensors}
    v, up = "blk.0.attn_v.weight", "blk.0.ffn_up.weight"
    rows[v] = TensorRows(rows[v].linears, rows[v].source[:20], rows[v].output[:20])
    del rows[up]
    tensors = {**plain.tensors, v: StoredTensor(ggml_type("F16"), (20, 64))}
    case = Case(tiny_model, tmp_path, Layout(tensors, RowMap(rows, {up: "no linear"}), 4096))
    plan = case.plan(COARSE)
    assert [tensor.name for tensor in plan.plain] == [up]
    rounder = case.rounder(plan)
    linear, name = f"{BLOCK}.mlp.up_proj", f"{BLOCK}.self_attn.v_proj"
    assert linear in rounder.unquantized
    rounded = case.round(plan)
    assert linear not in rounded.names
    weight = rounder.decoded(name, rounded.artifact(name))
    original = case.checkpoint.tensor(f"{name}.weight")
    assert torch.equal(weight[20:], original[20:])
    assert not torch.equal(weight[:20], original[:20])
