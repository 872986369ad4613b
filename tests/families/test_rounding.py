"""Rounding that rounds nothing, on every family: what it looks for is where it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.linears import model_linears
from bpwise.convert.rounding import RoundedModel, Rounder
from bpwise.linalg.hessian import Hessian
from bpwise.measure.measurement import MeasuredLinear
from bpwise.measure.model.stream import StreamedModel
from bpwise.progress import silent
from bpwise.quantize.rounding.rounding_pass import RoundingPass
from torch import Tensor

from ..measured import bare_linear, bare_measurement
from .models import build_family, family_names

SAMPLE = ("granitemoehybrid", "gemma4_moe", "falcon_h1")
"""Experts called before what they are added to, in the place of an MLP, or two mixers side by side."""

NAMES = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in family_names()]
TOKENS = (4, 16)


class Exact(Rounder):
    """Makes of every linear what it should be."""

    names = ()
    identity: ClassVar[dict[str, object]] = {}

    def round_linear(self, measured: MeasuredLinear, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        return {"weight": target.T.contiguous()}

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        return artifact["weight"]


@pytest.mark.parametrize("name", NAMES)
def test_without_errors_there_is_no_drift_to_correct(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpwise.measure.model.batches.MICRO_BATCH_TOKENS", TOKENS[1])  # a row
    source = language_model(Checkpoint.open(build_family(name, tmp_path / "model")))
    model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)
    linears, head = model_linears(source)
    weights = np.ones(TOKENS, dtype=np.float16)
    measured = [
        replace(bare_linear(each.name, each.in_features, each.out_features), token_weights=weights)
        for each in (*linears, head)
    ]
    tokens = torch.randint(3, 250, TOKENS, generator=torch.Generator().manual_seed(0))
    measurement = bare_measurement(
        {"head": (1, 1)}, {}, linears=measured[:-1], head=measured[-1], tokens=tokens.numpy().astype(np.int32)
    )
    store = ResumeStore(tmp_path, "exact", {})
    RoundingPass(model, measurement, Exact(), store, correct_drift=True).blocks(silent)
    drifts = RoundedModel((), model.block_count, store).drift()
    # Float32. A group that looked for what another adds to the stream would move its weights by as much.
    assert max(max(drift.first_token, drift.other_tokens) for drift in drifts) < 1e-4
