from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.file.header import GgufTensor, read_gguf_header
from bpwise.convert.gguf.ggml.factors import SCALED_TYPES
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.convert.numerics import fit
from bpwise.convert.registry import format_named
from bpwise.errors import ConfigError
from bpwise.eval.comparison import EvalConfig, compare_models
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model

from ...quantize.runs import arguments

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
quants = gguf.quants

# Queries and keys reordered and one table for embeddings and head; biases.
FAMILIES = ["llama3", "qwen2"]
Files = dict[tuple[str, str], Path]


def rows(count: int = 24) -> CalibrationSet:
    ids = torch.randint(0, 320, (count, 32), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * count, description="random ids", adds_bos=False)


def quantize(directory: Path, output: Path, effort: Any, **given: Any) -> None:
    overrides = (TypeOverride.parse("blk.0.attn_output*=MXFP4"),)
    options = GgufOptions(effort=effort, overrides=overrides)
    quantize_model(
        directory, output, **arguments(QuantizeConfig(target=Target(bpw=4.8), options=options, evaluate=None)), **given
    )


@pytest.fixture(scope="module")
def files(converted: Any, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tuned")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "STEP_TOKENS", 64)  # two rows a step
        for name in FAMILIES:
            for effort in ("normal", "high"):
                made[name, effort] = folder / f"{name}-{effort}.gguf"
                quantize(converted[name].directory, made[name, effort], effort, calibration=rows())
    return made


def stored(path: Path, tensor: GgufTensor) -> Any:
    """Rows of a tensor as they lie in the file."""
    data = path.read_bytes()[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
    return np.frombuffer(data, dtype=np.uint8).reshape(tensor.shape[0], -1)


def decoded(path: Path, tensor: GgufTensor) -> Any:
    return quants.dequantize(stored(path, tensor), quants.GGMLQuantizationType[tensor.type.name])


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_multiplied_by_a_factor_of_their_column_and_one_of_their_row(name: str, files: Files) -> None:
    normal, high = files[name, "normal"], files[name, "high"]
    before, after = (read_gguf_header(path).tensors for path in (normal, high))
    assert before.keys() == after.keys()
    changed = {each for each in before if not np.array_equal(stored(normal, before[each]), stored(high, after[each]))}
    for each in before:
        assert before[each].type == after[each].type
        linear = each.startswith("blk.") and before[each].type.name in SCALED_TYPES
        assert (each in changed) == (linear and before[each].type.quantized), each
    assert "blk.0.attn_output.weight" not in changed
    for each in changed:
        old, new = (decoded(path, tensors[each]) for path, tensors in ((normal, before), (high, after)))
        shape = (len(old), -1, before[each].type.block_weights)
        old, new = old.reshape(shape), new.reshape(shape)
        largest = np.abs(old).max(axis=2)
        ratio = np.where(largest, np.abs(new).max(axis=2), 1) / np.where(largest, largest, 1)
        # Scales are rounded to float16, minima too: 0.05 % each.
        np.testing.assert_allclose(new, old * ratio[:, :, None], atol=2e-3 * largest.max())
        logs = np.log(ratio)
        rest = logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0) + logs.mean()
        assert np.abs(rest).max() < 4e-3
        assert np.abs(logs).max() > 4e-3
        assert np.abs(logs).max() < 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_come_closer(name: str, files: Files, converted: Any) -> None:
    directory = converted[name].directory

    def kl(path: Path) -> float:
        found = compare_models(Checkpoint.open(directory), GgufModel.open(path), rows(), EvalConfig(device="cpu"))
        return found.summary.kl_nats.value

    assert kl(files[name, "high"]) < 0.97 * kl(files[name, "normal"])


def test_a_tuned_file_says_so(files: Files) -> None:
    for (_, effort), path in files.items():
        told = gguf.GGUFReader(path).fields.get("bpwise.effort")
        assert (told and told.contents()) == ("high" if effort == "high" else None)
        rows = dict(format_named("gguf").card(GgufModel.open(path), "org/base").made)
        assert rows.get("scales") == ("fitted to the original's predictions" if effort == "high" else None)


@pytest.mark.parametrize("other", [{"feedback": False}, {"mixture": "Q4_0"}], ids=["ggml-alone", "mixture"])
def test_where_ggml_rounds_alone_nothing_is_tuned(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"effort: high goes with error feedback only"):
        GgufOptions(effort="high", **other)


def test_effort_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"effort: not usable\. Got 'low'"):
        GgufOptions(effort="low")  # type: ignore[arg-type]
