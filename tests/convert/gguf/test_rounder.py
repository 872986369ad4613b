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
from bpwise.convert.gguf.ggml.types import GgmlType
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.plan.plan import GgufPlan, TypeOverride
from bpwise.convert.gguf.rounder import GgufRounder, table_importance
from bpwise.convert.rounding import RoundedModel
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.rounding.model import RoundConfig, round_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...conftest import SaveModel

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install 'bpwise[gguf]'")

# Two layers of width 64: the 32-blocks fit everywhere, the 256-blocks nowhere.
COARSE = ["*=Q4_0"]


def rows() -> CalibrationSet:
    ids = torch.randint(0, 264, (12, 32), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * 12, description="random ids", adds_bos=False)


class Case:
    def __init__(self, directory: Path, work: Path) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self.work = work
        config = MeasureConfig(device="cpu")
        self.measurement: Measurement = measure_checkpoint(
            self.checkpoint, rows(), config, [GgufCurves(measured_types())], work / "measure"
        )

    def plan(self, overrides: list[str]) -> GgufPlan:
        return make_gguf_plan(self.measurement, bpw=16.5, overrides=list(map(TypeOverride.parse, overrides)))

    def round(self, plan: GgufPlan, work: str = "round") -> RoundedModel:
        made = GgufRounder(plan, self.measurement, self.checkpoint)
        config = RoundConfig(device="cpu")
        return round_model(self.checkpoint, self.measurement, plan, made, config, self.work / work)

    def decoded(self, rounded: RoundedModel, plan: GgufPlan) -> dict[str, Tensor]:
        return {name: decode(data(rounded, name), kind) for name, kind in plan.kinds.items()}


def data(rounded: RoundedModel, name: str) -> Any:
    return rounded.artifact(name)["data"].numpy()


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


def plain(case: Case, name: str, plan: GgufPlan) -> Tensor:
    kind = plan.kinds[name]
    return decode(encode(case.checkpoint.tensor(f"{name}.weight").float(), kind), kind)


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_costs_less_than_ggmls_own_rounding(which: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(which)
    plan = case.plan(COARSE)
    rounded = case.round(plan)
    assert set(rounded.names) == set(plan.kinds)
    assert ("lm_head" in rounded.names) == (which == "untied")
    ours = kl_from_original(case.checkpoint.directory, case.decoded(rounded, plan))
    theirs = kl_from_original(case.checkpoint.directory, {name: plain(case, name, plan) for name in plan.kinds})
    assert ours < 0.8 * theirs
    # The curves promise about what comes out: the same order of magnitude, on so little text.
    assert 0.3 < plan.damage_nats / ours < 3


def test_an_unquantized_type_keeps_the_weights_where_nothing_drifts(untied: Case) -> None:
    plan = untied.plan(["*=F16"])
    for name, weight in untied.decoded(untied.round(plan, "f16"), plan).items():
        expected = untied.checkpoint.tensor(f"{name}.weight").float()
        # float16 keeps 11 bits; the drift that this makes is corrected, by less still.
        assert torch.allclose(weight, expected, rtol=2e-3, atol=1e-4), name


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
    assert dampings.keys() == rounded.numbers("distance").keys() == set(plan.kinds) - {"model.embed_tokens"}
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
    for name, distance in rounded.numbers("distance").items():
        weight = untied.checkpoint.tensor(f"{name}.weight").double()
        made = decode(data(rounded, name), plan.kinds[name]).double()
        assert distance == pytest.approx(float((made - weight).square().sum()), rel=1e-5)
