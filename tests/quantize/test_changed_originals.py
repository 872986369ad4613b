"""Models that are changed while they are read, through the whole line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.file.reader import Exl2Model
from bpwise.convert.gguf.base import base_path
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.llama_cpp.check import check_base
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.measure.measurement import Measurement
from safetensors.torch import load_file, save_file

from .runs import EVALUATION, TEXT, refused, succeed

Q = "model.layers.0.self_attn.q_proj"


def to_float8(source: Path, directory: Path) -> Path:
    """Save a model again, its linears in blocks of 32 x 32 float8 weights."""
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (directory / "config.json").write_text(json.dumps(config))
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.unfold(0, 32, 32).unfold(1, 32, 32).abs().amax(dim=(2, 3)) / 448
            wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            stored[name], stored[f"{name}_scale_inv"] = (tensor / wide).to(torch.float8_e4m3fn), scale
    save_file(stored, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def float8_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_float8(tiny_model, tmp_path_factory.mktemp("float8") / "model")


def make_adapter(directory: Path, features: int) -> Path:
    """An adapter of the first block's queries."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    rng = torch.Generator().manual_seed(0)
    parts = {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(2, 64, generator=rng) / 8,
        f"base_model.model.{Q}.lora_B.weight": torch.randn(features, 2, generator=rng) / 8,
    }
    save_file(parts, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter", 64)


def stretched(model: Path, directory: Path, **changes: object) -> Path:
    """Copy a model, its config edited."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("rope_parameters", None)
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_float8_adapter_and_positions_to_exl2(float8_model: Path, adapter: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", ("--lora", adapter)
    scaling = {"rope_type": "linear", "factor": 4.0}
    base, length = 10000.0 * 2 ** (16 / 14), 128 * 4 * 2
    positions = {"rope_scaling": scaling, "rope_theta": base, "max_position_embeddings": length}
    float8_model = stretched(float8_model, tmp_path / "stretched", **positions)
    succeed("quantize", float8_model, out, "--bpw", 8, *TEXT, *EVALUATION, *changes)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "exl2"
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert config["rope_theta"] == pytest.approx(base)
    assert config["max_position_embeddings"] == length
    written, source = Exl2Model.open(out), open_model(float8_model, lora=adapter)
    assert not any("scale_inv" in name for name in written.names)
    plain = open_model(float8_model).tensor(f"{Q}.weight")
    got, merged = written.tensor(f"{Q}.weight").float(), source.tensor(f"{Q}.weight").float()
    assert float((got - merged).norm()) < 0.1 * float((got - plain.float()).norm())
    provenance = json.loads((out / "bpwise.json").read_text())["provenance"]["changes"]
    assert provenance["adapters"][0]["name"] == "adapter"
    assert "merged with the adapter adapter" in (out / "README.md").read_text()
    # At 8 bits the output is nearly the changed original: had either side run at other positions, it were not.
    found = json.loads((out / "report.json").read_text())["comparison"]["summary"]["kl_nats"]["value"]
    assert found < 0.01
    succeed("eval", float8_model, out, *changes, "-r", 2, "-l", 32, "--no-cache", "--device", "cpu")
    again = json.loads((out / "report.json").read_text())["comparison"]["summary"]["kl_nats"]["value"]
    assert again == pytest.approx(found, rel=1e-6)
    succeed("eval", float8_model, out, "-r", 2, "-l", 32, "--no-cache", "--device", "cpu")
    unchanged = json.loads((out / "report.json").read_text())["comparison"]["summary"]["kl_nats"]["value"]
    assert unchanged > 10 * found


def test_longer_rows_than_the_model_was_made_for(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    succeed("quantize", tiny_model, other, "--bpw", 8, *TEXT, "--no-eval")
    long = ("-r", 1, "-l", 200, "--no-cache", "--device", "cpu", "-o", tmp_path)
    assert "positions for 128" in refused("eval", tiny_model, other, *long)
    changes = {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 256,
    }
    original, other = stretched(tiny_model, tmp_path / "a", **changes), stretched(other, tmp_path / "b", **changes)
    succeed("eval", original, other, *long)
    found = json.loads((tmp_path / "report.json").read_text())["comparison"]
    assert found["summary"]["kl_nats"]["value"] < 0.01
    assert found["profile"]["positions"][-1]["last"] == 199


def test_a_measurement_is_of_the_changed_model(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    succeed("measure", tiny_model, "-o", file, *TEXT, "--formats", "exl2", "--lora", adapter)
    assert Measurement.load(file).provenance["changes"]["adapters"][0]["name"] == "adapter"
    plain = ("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, "-m", file, "--no-eval", "--device", "cpu")
    assert "another model" in refused(*plain)
    succeed(*plain, "--lora", adapter)


def test_an_original_that_changes_in_place(tiny_model: Path, tmp_path: Path) -> None:
    model, out, file = tmp_path / "model", tmp_path / "out", tmp_path / "m.safetensors"
    shutil.copytree(tiny_model, model)
    succeed("measure", model, "-o", file, *TEXT, "--formats", "exl2")
    command = ("quantize", model, out, "--bpw", 4.5, "-m", file, "--no-eval", "--device", "cpu")
    succeed(*command)

    (model / "chat_template.jinja").write_text("{{ other }}")
    assert "is not the output of this run" in refused(*command)
    (model / "chat_template.jinja").unlink()
    weights = model / "model.safetensors"
    status = weights.stat()
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_size == status.st_size
    assert "is not the output of this run" in refused(*command)
    shutil.rmtree(out)
    assert "or to what its files were before they changed" in refused(*command)


def test_a_base_belongs_to_tokenizer_and_templates(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    places = [base_path(open_model(model), tmp_path / "work", None)]
    for name in ("chat_template.jinja", "README.md", "tokenizer.json"):
        (model / name).write_text("{}")
        places.append(base_path(open_model(model), tmp_path / "work", None))
    (model / "plot.png").write_text("")
    assert len(set(places)) == 4
    assert base_path(open_model(model), tmp_path / "work", None) == places[-1]


def test_float8_and_adapter_to_gguf(converted: Any, tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    original = to_float8(converted["mistral"].directory, tmp_path / "float8")
    features = open_model(original).shape(f"{Q}.weight")[0]
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    original = stretched(original, tmp_path / "stretched", rope_parameters=linear)
    source = open_model(original, lora=make_adapter(tmp_path / "adapter", features))
    make_base(source, tmp_path / "base.gguf")
    model = GgufModel.open(tmp_path / "base.gguf")
    for name in source.names:
        torch.testing.assert_close(model.tensor(name).float(), source.tensor(name).float(), msg=name)
    assert read_gguf_header(tmp_path / "base.gguf").metadata["llama.rope.scaling.factor"] == 4.0
    assert check_base(tmp_path / "base.gguf", source) == []
    assert {path.name for path in tmp_path.iterdir()} == {"float8", "stretched", "adapter", "base.gguf"}
