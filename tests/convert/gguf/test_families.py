"""Every family through the whole line to GGUF: converted, mapped, measured, rounded, written, read back."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.linears import model_linears
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.conversion import Target
from bpwise.convert.dense import dequantize_model
from bpwise.convert.gguf.file.header import GgufHeader, read_gguf_header
from bpwise.convert.gguf.file.roles import quantizable, role_of, trimmed
from bpwise.convert.gguf.ggml.types import TYPES
from bpwise.convert.gguf.labels import coming_header, mixture_sizes
from bpwise.convert.gguf.model.mapping import build_map, guess_map
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.rows.text import map_to_text
from bpwise.convert.opening import verify_model
from bpwise.errors import CheckpointError, FormatError, UnsupportedModelError, VerificationError
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.result import QuantizeResult
from bpwise.quantize.run import quantize_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ...byte_converter import convert_with_bytes
from ...quantize.runs import arguments
from ...tiny_models import FAMILIES, save_family, streamed_logits

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")

CHANGES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": []},  # llama.cpp has no such mixtures
    "mistral": {"sliding_window": None},  # its converter drops the window
    "gemma3_text": {"vocab_size": 258},  # its converter drops rows of the table that no token has
}
HUB_KEYS = {"cohere2": {"rotary_pct": 1.0}}
"""What config.json has on the Hub, but not as Transformers 5 saves it."""

SAMPLE = ("llama", "mixtral", "phi3", "gemma2")
NAMES = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in FAMILIES]
"""All of them run with `make test-families`."""

OWN_CONFIG = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose files tell the config themselves."""


@dataclass(frozen=True)
class Family:
    """A tiny model, its unquantized file, and a quantized one."""

    directory: Path
    base: Path
    result: QuantizeResult

    @property
    def file(self) -> Path:
        return self.result.output


@pytest.fixture(scope="module", autouse=True)
def without_engine() -> Iterator[None]:
    """No comparison with llama.cpp: it knows some families by the names of their tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpwise.convert.gguf.engine.gate._library", lambda: None)
        yield


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("families")
    made = {name: (folder / name, folder / f"{name}.base.gguf") for name in FAMILIES}
    for name, (directory, _) in made.items():
        save_family(directory, name, byte_tokenizer, **CHANGES.get(name, {}))
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | HUB_KEYS.get(name, {})))
    convert_with_bytes(list(made.values()), "--outtype", "f16")
    return made


def to_gguf(directory: Path, output: Path, base: Path, **options: Any) -> QuantizeResult:
    config = QuantizeConfig(
        target=None if "mixture" in options else Target(bpw=7.0),
        options=GgufOptions(base=base, **options),
        measure=MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu"),
        evaluate=EvalConfig(rows=2, row_tokens=32, device="cpu"),
    )
    return quantize_model(directory, output, **arguments(config))


@pytest.fixture(scope="module", params=NAMES)
def family(
    request: pytest.FixtureRequest, bases: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    directory, base = bases[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        kinds = tuple(TYPES[name] for name in ("Q8_0", "Q5_1", "Q4_0"))
        patch.setattr("bpwise.convert.gguf.conversion.measured_types", lambda: kinds)
        yield Family(directory, base, to_gguf(directory, folder / "out.gguf", base))


def roles(header: GgufHeader) -> list[tuple[str, tuple[int, ...]]]:
    """What mixtures see of the tensors that are quantized."""
    return sorted(
        (role_of(name).name, trimmed(each.shape))
        for name, each in header.tensors.items()
        if quantizable(name, each.shape)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_mixtures_have_their_sizes_before_a_model_is_converted(name: str, bases: dict[str, tuple[Path, Path]]) -> None:
    directory, base = bases[name]
    coming, header = coming_header(language_model(open_model(directory))), read_gguf_header(base)
    assert roles(coming) == roles(header)
    assert mixture_sizes(coming) == mixture_sizes(header)


def values_of(path: Path) -> dict[str, np.ndarray]:
    """Tensors as the package of llama.cpp's makers reads and decodes them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


def test_every_matrix_is_explained_bit_for_bit(family: Family) -> None:
    source, header = language_model(open_model(family.directory)), read_gguf_header(family.base)
    rows = build_map(source, header)
    assert not rows.unexplained
    linears, head = model_linears(source)
    features = {each.name: each.out_features for each in (*linears, *([] if source.tied_embeddings else [head]))}
    assert not rows.missing(features)
    left_out = 6 if family.directory.name == "gemma3_text" else 0  # tokens that the tokenizer does not know
    assert rows.missing({"model.embed_tokens": 264}) == ({"model.embed_tokens": left_out} if left_out else {})
    values = values_of(family.base)
    for name, own in rows.tensors.items():
        weights = [source.tensor(f"{linear}.weight").numpy() for linear in own.linears]
        built = np.stack([weights[s][o] for s, o in zip(own.source, own.output, strict=True)])
        assert np.array_equal(built.astype(np.float32), values[name].reshape(built.shape)), name


def test_the_file_is_what_was_planned(family: Family) -> None:
    tensors, plan = read_gguf_header(family.file).tensors, family.result.plan
    assert sum(tensor.size_bytes for tensor in tensors.values()) == plan.stored_bytes
    matrices = {name for name, tensor in read_gguf_header(family.base).tensors.items() if tensor.type.name == "F16"}
    assert {tensor.name: tensor.type for tensor in plan.tensors} == {x: tensors[x].type.name for x in matrices}
    assert 6.7 < plan.bpw <= 7
    assert not plan.plain
    kept = {name for name, tensor in tensors.items() if not tensor.type.quantized}
    before, after = values_of(family.base), values_of(family.file)
    unchanged = [name for name in kept if tensors[name].type.name == "F32"]
    assert all(np.array_equal(before[name].ravel(), after[name].ravel()) for name in unchanged)


def test_costs_what_was_predicted(family: Family) -> None:
    assert family.result.comparison is not None
    found, predicted = family.result.comparison.summary, family.result.plan.damage_nats
    assert found.kl_nats.value > 0.3 * predicted
    # A router may send a token to another expert, which no curve foresees: such tokens are most of the mean.
    has_experts = family.result.experts is not None
    assert (found.kl_median_nats if has_experts else found.kl_nats.value) < 4 * predicted


def test_the_file_decodes_to_the_dense_model_of_its_weights(family: Family, tmp_path: Path) -> None:
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    model = GgufModel.open(family.file).beside(open_model(family.directory))
    dequantize_model(family.file, tmp_path / "dense", original=family.directory)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(family.directory, dtype=torch.float32)
    with torch.no_grad():
        logits, wanted = (each(tokens).logits for each in (dense, original))
    streamed = streamed_logits(model, tokens)
    missed = (streamed - logits).square().mean(dim=2)
    # The dense model is in float16, by which a router may send a token to another expert: the median token counts.
    typical = missed.median() if family.result.experts is not None else missed.mean()
    assert float(typical / wanted.var()) < 1e-5
    assert 0 < float((logits - wanted).square().mean() / wanted.var()) < 0.05
    stored = values_of(family.file)
    rows = build_map(language_model(open_model(family.directory)), read_gguf_header(family.base))
    for name, own in rows.tensors.items():
        weights = [model.tensor(f"{linear}.weight").float().numpy() for linear in own.linears]
        built = np.stack([weights[s][o] for s, o in zip(own.source, own.output, strict=True)])
        assert np.array_equal(built, stored[name].reshape(built.shape)), name


def test_verify_and_inspect_need_no_original(family: Family) -> None:
    found = verify_model(family.file)
    assert not found.warnings
    assert found.bpw == pytest.approx(family.result.plan.bpw)
    model = GgufModel.open(family.file)
    assert model.describe().table.rows
    if not model.stands_alone:
        with pytest.raises(UnsupportedModelError, match="without the original"):
            model.tensor("model.embed_tokens.weight")
        with pytest.raises(UnsupportedModelError, match="Name the original"):
            dequantize_model(family.file, family.file.with_name("dense"))


def test_a_file_without_a_map_is_read_by_likeness(family: Family, tmp_path: Path) -> None:
    name = family.directory.name
    result = to_gguf(family.directory, tmp_path / "q.gguf", family.base, mixture="Q4_0")  # llama-quantize's own bytes
    assert result.comparison is not None
    assert "bpwise.map" not in read_gguf_header(result.output).metadata
    source, header = language_model(open_model(family.directory)), read_gguf_header(result.output)
    guessed, exact = guess_map(source, header), build_map(source, read_gguf_header(family.base))
    assert exact.tensors.keys() == guessed.tensors.keys()
    for tensor, own in exact.tensors.items():
        other = guessed.tensors[tensor]
        assert other.linears == own.linears
        assert np.array_equal(other.output, own.output), tensor
    model = GgufModel.open(result.output).beside(source)
    if name not in OWN_CONFIG:
        decoded = values_of(result.output)["token_embd.weight"]
        read = model.tensor("model.embed_tokens.weight").float().numpy()
        assert np.array_equal(read[: len(decoded)], decoded)
    else:
        assert GgufModel.open(result.output).stands_alone


@pytest.fixture
def gemma(bases: dict[str, tuple[Path, Path]]) -> tuple[Path, Path]:
    return bases["gemma"]


def test_another_model_is_not_the_original(
    gemma: tuple[Path, Path], tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    directory, base = gemma
    other = save_family(tmp_path / "other", "gemma", byte_tokenizer, hidden_size=32, head_dim=8)
    with pytest.raises(VerificationError, match="is not in the file"):
        _ = GgufModel.open(base).beside(open_model(other)).tensor("model.norm.weight")
    made = to_gguf(directory, tmp_path / "x.gguf", base)
    with pytest.raises(CheckpointError, match="not made of"):
        _ = GgufModel.open(made.output).beside(open_model(other)).tensor("model.norm.weight")


def test_a_base_of_another_model_is_refused(bases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    directory, base = bases["gemma"][0], tmp_path / "base.gguf"
    shutil.copyfile(bases["gemma"][1], base)
    tensor = read_gguf_header(base).tensors["blk.1.ffn_up.weight"]
    with base.open("r+b") as file:
        file.seek(tensor.offset_bytes + 5000)
        file.write(b"\x01\x02")
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj is not in the file, or not whole. Got 0 of"):
        to_gguf(directory, tmp_path / "x.gguf", base)
    assert not (tmp_path / "x.gguf").exists()


def test_maps_of_other_tensors_are_refused(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    directory, base = gemma
    rows = build_map(language_model(open_model(directory)), read_gguf_header(base))
    del rows.tensors["blk.0.attn_q.weight"]  # type: ignore[attr-defined]  # it is a dictionary here
    text = map_to_text(rows)
    model = GgufModel.open(base)
    model.header.metadata["bpwise.map"] = text  # type: ignore[index]  # so is this
    assert model.own_map is not None
    again = GgufModel.open(base)
    again.header.metadata["bpwise.map"] = text.replace("A", "B")  # type: ignore[index]
    with pytest.raises(FormatError, match="map"):
        _ = again.own_map
