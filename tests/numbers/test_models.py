"""Whole models whose numbers are at an edge: every format makes a correct model of each, or a sentence says why not."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.cli import cli
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.engine import gate
from bpwise.convert.registry import formats
from click.testing import CliRunner
from transformers import LlamaConfig, MixtralConfig

from ..byte_converter import convert_with_bytes
from ..conftest import SaveModel

pytestmark = pytest.mark.slow

Change = Callable[[Any], None]

ASKED: dict[str, tuple[str, ...]] = {
    "exl2": ("--bpw", "8"),
    "gguf": ("--bpw", "8.6"),
    "mlx": ("--format", "mlx", "--bpw", "9"),
}
"""By name of a registered format, what ``quantize`` is asked for."""

_DOWN = {"model.layers.0.mlp.down_proj"}
_TOO_LARGE = "Expected at most 65504.0 in magnitude"


def _first(model: Any) -> Any:
    return model.model.layers[0]


def _one_embedding(model: Any) -> None:
    table = model.model.embed_tokens.weight
    table.copy_(table[5].expand_as(table))


def _dead_channels(model: Any) -> None:
    _first(model).input_layernorm.weight[3:9] = 0
    _first(model).post_attention_layernorm.weight[::2] = 0


def _constant_channels(model: Any) -> None:
    model.model.embed_tokens.weight[:, 7] = 3.0


def _outlier_channel(model: Any) -> None:
    # What reads it is zero: the softmax of logits as much larger would tell nothing.
    _first(model).post_attention_layernorm.weight[11] = 6e4
    for linear in (_first(model).mlp.gate_proj, _first(model).mlp.up_proj):
        linear.weight[:, 11] = 0


def _outlier_token(model: Any) -> None:
    model.model.embed_tokens.weight[101] *= 1e5


def _zero_rows(model: Any) -> None:
    _first(model).self_attn.q_proj.weight[::2] = 0
    _first(model).mlp.down_proj.weight[:, 7] = 0
    model.lm_head.weight[100:] = 0


def _zero_matrices(model: Any) -> None:
    _first(model).self_attn.q_proj.weight.zero_()
    _first(model).mlp.up_proj.weight.zero_()


def _subnormal(model: Any) -> None:
    _first(model).mlp.up_proj.weight.mul_(1e-39)


def _a_million_apart(model: Any) -> None:
    _first(model).mlp.up_proj.weight.mul_(1e3)
    _first(model).mlp.down_proj.weight.mul_(1e-3)


def _tied_zero_rows(model: Any) -> None:
    model.model.embed_tokens.weight[200:] = 0


def _on_a_grid(model: Any) -> None:
    rng = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.copy_(torch.randint(-8, 8, weight.shape, generator=rng) / 64)
            weight[:, ::32] = -8 / 64


def _one_expert(model: Any) -> None:
    _first(model).mlp.gate.weight.zero_()  # ties go to the first two experts, always


def _large_weight(model: Any) -> None:
    _first(model).mlp.up_proj.weight[3, 4] = 7e4


def _large_norm(model: Any) -> None:
    _first(model).input_layernorm.weight[3] = 7e4


def _infinite_weight(model: Any) -> None:
    _first(model).mlp.up_proj.weight[3, 4] = math.inf


def _overflow(model: Any) -> None:
    _first(model).mlp.up_proj.weight.mul_(1e30)
    _first(model).mlp.down_proj.weight.mul_(1e30)


GOOD: dict[str, tuple[Change, set[str]]] = {
    "inputs of rank 1": (_one_embedding, set()),
    "dead channels": (_dead_channels, set()),
    "constant channels": (_constant_channels, set()),
    "a channel of 6e4": (_outlier_channel, set()),
    "a token of 1e5": (_outlier_token, set()),
    "zero rows": (_zero_rows, set()),
    "zero matrices": (_zero_matrices, _DOWN),
    "subnormal weights": (_subnormal, _DOWN),
    "neighbours a million apart": (_a_million_apart, set()),
    "a tied table with zero rows": (_tied_zero_rows, set()),
    "weights on a grid": (_on_a_grid, set()),
    "experts never reached": (_one_expert, set()),
}
"""How models are changed, and which linears are reported as rounded without error feedback."""

REFUSED: dict[str, tuple[Change, dict[str, str]]] = {
    "a weight of 7e4": (_large_weight, dict.fromkeys(ASKED, rf"layers\.0\.mlp\.up_proj\.weight: .*{_TOO_LARGE}")),
    # A norm is float32 in a GGUF file.
    "a norm of 7e4": (_large_norm, {"exl2": rf"layers\.0\.input_layernorm\.weight: .*{_TOO_LARGE}"}),
    "an infinite weight": (
        _infinite_weight,
        dict.fromkeys(ASKED, r"'model\.layers\.0\.mlp\.up_proj\.weight' holds NaN or infinite values"),
    ),
    "activations that overflow": (
        _overflow,
        {"exl2": r"model\.layers\.0: NaN or infinity in the activations", "gguf": r"model\.layers\.0.*"},
    ),
}
"""How models are changed, and what each format says; one that is not named makes a correct model."""

CHANGES = {name: change for name, (change, _) in (*GOOD.items(), *REFUSED.items())}


@pytest.fixture(scope="module")
def models(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, change in CHANGES.items():
        settings: dict[str, Any] = {"kind": LlamaConfig, "tie_word_embeddings": "tied" in name}
        if "experts" in name:
            settings = {"kind": MixtralConfig, "intermediate_size": 64, "num_local_experts": 4}
        save_model(folder / name, change=change, **settings)
    convert_with_bytes([(folder / name, folder / f"{name}.gguf") for name in CHANGES], "--outtype", "f32")
    return folder


def test_every_format_is_tried() -> None:
    assert set(ASKED) == set(formats())


@pytest.mark.parametrize("format_", ASKED)
@pytest.mark.parametrize("name", CHANGES)
def test_a_correct_model_or_a_sentence(
    name: str, format_: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufCurves, "warm_up", lambda _: None)  # no row has blocks that need tables
    monkeypatch.setattr(gate, "_library", lambda: None)
    output = tmp_path / f"out{formats()[format_].suffix}"
    base = ("--base", models / f"{name}.gguf") if format_ == "gguf" else ()
    text = ("--rows", 4, "--row-tokens", 32, "--eval-rows", 2, "--eval-row-tokens", 32, "--device", "cpu")
    done = CliRunner().invoke(cli, list(map(str, ("quantize", models / name, output, *ASKED[format_], *base, *text))))
    said = REFUSED[name][1].get(format_) if name in REFUSED else None
    if said is not None:
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        assert re.search(said, done.stderr.splitlines()[-1])
        assert not output.exists()
        return
    assert done.exit_code == 0, done.stderr
    assert CliRunner().invoke(cli, ["verify", str(output)]).exit_code == 0
    report = json.loads(next(tmp_path.rglob("*report.json")).read_text())
    assert report["comparison"]["summary"]["kl_nats"]["value"] < 0.02
    without = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("fallback")}
    assert without == (GOOD[name][1] if name in GOOD else set())
