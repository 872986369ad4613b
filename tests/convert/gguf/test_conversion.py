import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.cli import cli
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.gguf import base as gguf_base
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.gguf.file.values import read_values as gguf_values
from bpwise.convert.gguf.llama_cpp.imatrix import read_imatrix
from bpwise.convert.gguf.llama_cpp.importance import export_imatrix, importance_of
from bpwise.convert.gguf.llama_cpp.vram import room_for_weights
from bpwise.convert.gguf.model.reader import GgufModel
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.measured import gguf_curves
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.errors import BrokenModelError, BudgetError, ConfigError, FormatError, WorkDirectoryError
from bpwise.eval.comparison import EvalConfig, compare_models
from bpwise.eval.metrics.overlap import shared_share, stored_spans
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize import judge, measuring, series
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.planning.plans import make_plan
from bpwise.quantize.result import QuantizeResult
from bpwise.quantize.run import measure_model, quantize_model
from bpwise.quantize.series import quantize_series
from click.testing import CliRunner
from huggingface_hub import ModelCard

from ...quantize.runs import arguments, series_arguments

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")

Made = dict[str, QuantizeResult]

TARGET = Target(bpw=5.5)
FAMILIES = ["llama3", "mistral", "qwen2", "qwen3"]


def rows(count: int = 12) -> CalibrationSet:
    ids = torch.randint(0, 320, (count, 32), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tokens=ids, origins=("random",) * count, description="random ids", adds_bos=False)


def quantize(
    directory: Path,
    output: Path,
    *,
    target: Target | None = TARGET,
    evaluate: EvalConfig | None = None,
    measurement: Path | None = None,
    count: int = 12,
    **options: Any,
) -> QuantizeResult:
    config = QuantizeConfig(target=target, options=GgufOptions(**options), evaluate=evaluate)
    calibration = rows(count) if measurement is None else None
    return quantize_model(directory, output, **arguments(config), measurement=measurement, calibration=calibration)


def to_mixture(directory: Path, output: Path, name: str, **options: Any) -> QuantizeResult:
    config = QuantizeConfig(options=GgufOptions(mixture=name, **options), evaluate=None)
    return quantize_model(directory, output, **arguments(config))


def kl(directory: Path, file: Path) -> float:
    found = compare_models(Checkpoint.open(directory), GgufModel.open(file), rows(4), EvalConfig(device="cpu"))
    return found.summary.kl_nats.value


@pytest.fixture(scope="module")
def made(converted: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    return {name: quantize(converted[name].directory, folder / f"{name}.gguf") for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_file_is_what_was_planned(name: str, made: Made, converted: Any) -> None:
    result = made[name]
    model = GgufModel.open(result.output)
    tensors = model.header.tensors
    assert {tensor.name: tensor.type for tensor in result.plan.tensors} == {
        each.name: each.type.name for each in tensors.values() if each.type.quantized
    }
    assert 5.4 < result.plan.bpw <= 5.5
    assert sum(tensor.size_bytes for tensor in tensors.values()) == result.plan.stored_bytes
    assert not (result.output.with_name(f"{name}.gguf.work") / "base.gguf").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata_is_what_other_programs_read(name: str, made: Made, converted: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    fields = gguf.GGUFReader(made[name].output).fields
    values = {key: field.contents() for key, field in fields.items()}
    assert values[gguf.Keys.General.QUANTIZED_BY] == "bpwise"
    assert values["quantize.imatrix.file"] == "bpwise measurement"
    assert values["quantize.imatrix.chunks_count"] == 12
    assert values["quantize.imatrix.entries_count"] >= len(made[name].plan.tensors) - len(made[name].plan.plain)
    kinds = {key: fields[key].types[0].name for key in values if key.startswith("quantize.") or key.endswith("_type")}
    assert {kinds[f"quantize.imatrix.{each}_count"] for each in ("chunks", "entries")} == {"UINT32"}
    # K types do not fit rows this short, so that the mixture is the one nearest to 5.5 bits in llama.cpp's own table.
    assert gguf.LlamaFileType(values[gguf.Keys.General.FILE_TYPE]).name == "MOSTLY_Q5_K_S"


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_about_what_was_predicted_and_less_than_llama_quantize(
    name: str, made: Made, converted: Any, tmp_path: Path
) -> None:
    directory = converted[name].directory
    ours = kl(directory, made[name].output)
    to_mixture(directory, tmp_path / "theirs.gguf", "Q5_0")  # 5.5 bits and more, and none of it measured
    assert (tmp_path / "theirs.gguf").stat().st_size >= made[name].verification.file_bytes - 4096
    assert ours < 0.9 * kl(directory, tmp_path / "theirs.gguf")
    assert 0.3 < made[name].plan.damage_nats / ours < 3


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_loads_it_and_sees_the_same_weights(name: str, made: Made, converted: Any) -> None:
    pytest.importorskip("xllamacpp", reason="the engine is not installed: pip install '.[gguf]'")
    from bpwise.convert.gguf.engine.library import load_library
    from bpwise.eval.engines.engine import compare_in_engine

    source, base = Checkpoint.open(converted[name].directory), GgufModel.open(converted[name].file)
    file = GgufModel.open(made[name].output)
    engine = compare_in_engine(source, base, file, rows(4), load_library()).summary.kl_nats.value
    # llama.cpp rounds activations to 8 bits as well, which adds to it; rows in a wrong order would make it nats.
    assert engine == pytest.approx(kl(converted[name].directory, made[name].output), rel=0.5)


def test_a_large_model_is_written_in_parts(made: Made, converted: Any, tmp_path: Path) -> None:
    directory, single = converted["mistral"].directory, made["mistral"]
    options: dict[str, Any] = {"measurement": single.measurement, "split_max_size": single.plan.stored_bytes // 2}
    result = quantize(directory, tmp_path / "out.gguf", **options)
    assert result.output.name == "out-00001-of-00003.gguf"
    first, one = GgufModel.open(result.output), GgufModel.open(single.output)
    assert all(torch.equal(first.tensor(name), one.tensor(name)) for name in one.names)
    before = result.output.stat().st_mtime_ns
    assert quantize(directory, tmp_path / "out.gguf", **options).output.stat().st_mtime_ns == before
    if importlib.util.find_spec("xllamacpp") is not None:
        from bpwise.convert.gguf.engine.library import load_library

        logits = []
        for file in (result.output, single.output):
            with load_library().model(file, row_tokens=32, threads=1) as model:
                logits.append(torch.cat(list(model.logits(rows(1).tokens[0]))))
        assert torch.equal(*logits)


def test_the_same_run_again_does_nothing(made: Made, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = made["mistral"].output
    before = output.stat()
    monkeypatch.setattr("bpwise.convert.gguf.base.make_base", lambda *_, **__: pytest.fail("was converted again"))
    again = quantize(converted["mistral"].directory, output)
    assert again.summary_lines() == [f"finished already: {output} holds what this command makes"]
    assert again.verification.file_bytes == before.st_size
    assert output.stat().st_mtime_ns == before.st_mtime_ns


def test_refuses_what_is_in_the_way(made: Made, converted: Any, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    shutil.copyfile(converted["mistral"].file, output)
    with pytest.raises(WorkDirectoryError, match="not the output of this run"):
        quantize(converted["mistral"].directory, output)
    shutil.copyfile(made["mistral"].output, output)
    with pytest.raises(WorkDirectoryError, match="not the output of this run"):
        quantize(
            converted["mistral"].directory, output, target=Target(bpw=6.0), measurement=made["mistral"].measurement
        )
    with pytest.raises(WorkDirectoryError, match="exists already"):
        to_mixture(converted["mistral"].directory, output, "Q8_0")
    (tmp_path / "directory.gguf").mkdir()
    with pytest.raises(WorkDirectoryError, match=r"in the way. Got a directory"):
        quantize(converted["mistral"].directory, tmp_path / "directory.gguf")
    assert not any((tmp_path / "directory.gguf").iterdir())
    card = tmp_path / "mine.README.md"
    card.write_text("I quantized to 4 bits with bpwise once.")
    with pytest.raises(WorkDirectoryError, match="a card of bpwise"):
        to_mixture(converted["mistral"].directory, tmp_path / "mine.gguf", "Q8_0", card=True)
    assert card.read_text() == "I quantized to 4 bits with bpwise once."


def test_the_run_depends_on_what_the_base_holds(made: Made, converted: Any, tmp_path: Path) -> None:
    directory, output, base = converted["mistral"].directory, tmp_path / "x.gguf", tmp_path / "base.gguf"
    settings = {"measurement": made["mistral"].measurement, "feedback": False}
    shutil.copyfile(converted["mistral"].file, base)
    quantize(directory, output, base=base, **settings)
    before = output.read_bytes()
    base.rename(tmp_path / "moved.gguf")  # where it lies does not matter
    quantize(directory, output, base=tmp_path / "moved.gguf", **settings)
    name = b"general.name"
    changed = bytearray((tmp_path / "moved.gguf").read_bytes())
    start = changed.index(name) + len(name) + 4 + 8  # behind the type and the length of its value
    changed[start] ^= 1
    base.write_bytes(changed)
    with pytest.raises(WorkDirectoryError, match="not the output of this run"):
        quantize(directory, output, base=base, **settings)
    assert output.read_bytes() == before


def test_what_appears_meanwhile_is_not_replaced(made: Made, converted: Any, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    mixture = QuantizeConfig(options=GgufOptions(mixture="Q8_0", base=converted["mistral"].file), evaluate=None)

    def progress(items: Any, stage: str) -> Any:
        output.write_text("theirs")
        return items

    with pytest.raises(WorkDirectoryError, match=r"x\.gguf: in the way"):
        quantize_model(converted["mistral"].directory, output, **arguments(mixture), progress=progress)
    assert output.read_text() == "theirs"
    with pytest.raises(FormatError):
        quantize(converted["mistral"].directory, output, feedback=False, measurement=made["mistral"].measurement)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_mixture_with_the_importances_of_a_measurement(made: Made, converted: Any, tmp_path: Path) -> None:
    directory, measurement = converted["qwen3"].directory, made["qwen3"].measurement
    assert measurement is not None
    export_imatrix(Measurement.load(measurement), tmp_path / "exported.gguf")
    for name, options in {"x": ["-m", measurement], "y": ["--imatrix", tmp_path / "exported.gguf"], "z": []}.items():
        command = ["quantize", directory, tmp_path / f"{name}.gguf", "--type", "Q4_K_M", "--no-eval", *options]
        run = CliRunner().invoke(cli, [str(each) for each in command], catch_exceptions=False)
        assert run.exit_code == 0, run.stderr
        said = f"plan        errors weighted with the importances of measurement {measurement.name}"
        assert (said in run.output.splitlines()) is (name == "x")
    given, exported, plain = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in "xyz"
    )
    assert given == exported
    assert given != plain
    with pytest.raises(FormatError, match="belongs to another model"):
        to_mixture(converted["mistral"].directory, tmp_path / "m.gguf", "Q4_K_M", imatrix=measurement)


def test_a_largest_size_holds_for_the_whole_file(made: Made, converted: Any, tmp_path: Path) -> None:
    name, size = "qwen3", made["qwen3"].verification.file_bytes + 20_000
    result = quantize(
        converted[name].directory,
        tmp_path / "x.gguf",
        target=Target(max_bytes=size),
        measurement=made[name].measurement,
    )
    assert size - 12_000 < result.verification.file_bytes == (tmp_path / "x.gguf").stat().st_size <= size
    planned = make_plan(made[name].measurement, max_bytes=size, options=GgufOptions())
    assert 0 <= result.plan.target_bytes - planned.target_bytes < 4_096
    with pytest.raises(BudgetError):
        quantize(
            converted[name].directory,
            tmp_path / "y.gguf",
            target=Target(max_bytes=9_000),
            measurement=made[name].measurement,
        )
    assert not (tmp_path / "y.gguf").exists()


def on_gpu(path: Path) -> int:
    """Bytes that llama.cpp loads into a GPU's memory: all layers, and not the input (src/llama-model.cpp)."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_gpu_that_the_cache_fits_into_too(name: str, made: Made, converted: Any, tmp_path: Path) -> None:
    taken = (1 << 30) - room_for_weights(1 << 30, Checkpoint.open(converted[name].directory).config, 64)
    settings = {"measurement": made[name].measurement, "feedback": False}
    room = on_gpu(made[name].output) + 20_000
    result = quantize(
        converted[name].directory,
        tmp_path / "x.gguf",
        target=Target(vram_bytes=taken + room, context_tokens=64),
        **settings,
    )
    # Metadata and, of a model whose head is a table of its own, the embeddings are in main memory.
    assert room - 12_000 < on_gpu(tmp_path / "x.gguf") <= room
    measurement = made[name].measurement
    planned = make_plan(measurement, vram_bytes=taken + room, context_tokens=64, options=GgufOptions())
    assert planned.identity() == result.plan.identity()
    assert planned.vram_bytes == on_gpu(tmp_path / "x.gguf")
    with pytest.raises(BudgetError, match="shorter context"):
        quantize(
            converted[name].directory,
            tmp_path / "y.gguf",
            target=Target(vram_bytes=1 << 20, context_tokens=64),
            **settings,
        )


def test_without_feedback_ggml_rounds_alone(converted: Any, tmp_path: Path) -> None:
    directory = converted["mistral"].directory
    fed_back = quantize(directory, tmp_path / "fed-back.gguf", count=48)
    result = quantize(directory, tmp_path / "x.gguf", measurement=fed_back.measurement, feedback=False)
    assert result.plan == fed_back.plan
    assert result.drift == ()
    assert kl(directory, fed_back.output) < 0.8 * kl(directory, result.output)


def test_overrides_and_report(made: Made, converted: Any, tmp_path: Path) -> None:
    name = "mistral"
    result = quantize(
        converted[name].directory,
        tmp_path / "x.gguf",
        target=Target(bpw=6.5),
        measurement=made[name].measurement,
        overrides=(TypeOverride.parse("blk.0.attn_v=F16"),),
    )
    assert read_gguf_header(result.output).tensors["blk.0.attn_v.weight"].type.name == "F16"
    lines = "\n".join(result.summary_lines())
    assert "; all tensors 6.4" in lines
    assert "predicted" in lines


def test_importances_are_those_of_the_measurement(made: Made) -> None:
    measured = Measurement.load(made["llama3"].measurement)
    matrix = importance_of(measured, gguf_curves(measured).layout)
    power = matrix.mean_squares("blk.1.ffn_down.weight")
    assert power is not None
    linear = next(x for x in measured.linears if x.name == "model.layers.1.mlp.down_proj")
    assert np.allclose(power.numpy(), linear.input_power, rtol=1e-6)
    assert "output.weight" not in matrix.sums  # tied
    assert len(matrix.sums) == 2 * 7 + 1


@pytest.mark.parametrize(
    "settings", [{}, {"bpw": 4.5, "max_bytes": 1 << 20}, {"bpw": 0.5}], ids=["no-target", "two", "too-small"]
)
def test_refuses_other_targets(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Target(**settings)


def test_a_mixture_has_no_target(converted: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target"):
        quantize(converted["mistral"].directory, tmp_path / "x.gguf", target=Target(bpw=5.5), mixture="Q8_0")


class TestCommandLine:
    def test_plan_and_imatrix(self, made: Made, tmp_path: Path) -> None:
        measurement = str(made["mistral"].measurement)
        command = ["plan", measurement, "--format", "gguf", "-b", "6", "-o", str(tmp_path / "p.json")]
        run = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert run.exit_code == 0, run.output
        assert "blk.1.ffn_down.weight" in run.output
        run = CliRunner().invoke(cli, ["inspect", str(tmp_path / "p.json")], catch_exceptions=False)
        assert run.exit_code == 0, run.output
        assert run.output.startswith(f"{tmp_path / 'p.json'}: GGUF plan\n")
        # As the file has it.
        for entry in json.loads((tmp_path / "p.json").read_text())["tensors"]:
            line = next(line for line in run.output.splitlines() if line.startswith(entry["name"] + " "))
            rows, row_weights = entry["shape"]
            assert line.split()[1:5] == [str(rows), "x", str(row_weights), entry["type"]]
        for name in ("i.gguf", "i.dat"):
            run = CliRunner().invoke(cli, ["imatrix", measurement, "-o", str(tmp_path / name)], catch_exceptions=False)
            assert run.exit_code == 0, run.output
        new, old = (read_imatrix(tmp_path / name) for name in ("i.gguf", "i.dat"))
        assert new.sums.keys() == old.sums.keys()

    def test_an_imatrix_of_others_is_replaced_only_by_force(self, made: Made, converted: Any, tmp_path: Path) -> None:
        # llama-imatrix may have worked on it for hours. The older format does not say whose it is.
        command = ["imatrix", str(made["mistral"].measurement), "-o"]
        own, legacy, model = tmp_path / "own.gguf", tmp_path / "i.dat", tmp_path / "model.gguf"
        shutil.copyfile(converted["mistral"].file, model)
        for path, allowed in ((own, True), (legacy, False), (model, False)):
            CliRunner().invoke(cli, [*command, str(path)])
            before = path.read_bytes()
            run = CliRunner().invoke(cli, [*command, str(path)])
            assert (run.exit_code == 0) == allowed
            assert path.read_bytes() == before
            assert CliRunner().invoke(cli, [*command, str(path), "--force"]).exit_code == 0
        assert read_imatrix(model).sums.keys() == read_imatrix(own).sums.keys()

    @pytest.mark.parametrize(
        "options",
        [
            ["x.gguf", "--bpw", "4", "--type", "Q8_0"],
            ["x.gguf", "--bpw", "4", "--head-bits", "8"],
            ["x.gguf", "--bpw", "4", "--imatrix", __file__],
            ["x.gguf", "--type", "Q8_0", "--override", "*=Q8_0"],
            ["x", "--bpw", "4", "--type", "Q8_0"],
            ["x", "--bpw", "4", "--no-feedback"],
            ["x.gguf", "--max-size", "much"],
            ["x.gguf", "--bpw", "4", "--context", "100"],
            ["x.gguf", "--vram", "8GB", "--max-size", "5GB"],
        ],
    )
    def test_refuses_options_that_do_not_go_together(self, options: list[str]) -> None:
        assert CliRunner().invoke(cli, ["quantize", "no-model", *options]).exit_code == 2


class TestHonesty:
    def test_a_broken_file_is_marked(
        self,
        made: Made,
        converted: Any,
        byte_tokenizer: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(judge, "load_tokenizer", lambda _: byte_tokenizer)  # the model's own needs more packages
        output = tmp_path / "x.gguf"
        directory, measurement = converted["mistral"].directory, made["mistral"].measurement
        settings = {"measurement": measurement, "evaluate": EvalConfig(rows=2, row_tokens=32, device="cpu")}
        with monkeypatch.context() as patch:
            # What the plan thinks is far less than what can be.
            patch.setattr(judge, "BROKEN_NATS", 1e-6)
            patch.setattr(judge, "BROKEN_RATIO", 1e-6)
            with pytest.raises(BrokenModelError, match=r"x.gguf: broken\. .* marked by x.gguf.BROKEN.md"):
                quantize(directory, output, **settings)
        assert "the plan predicted" in (tmp_path / "x.gguf.BROKEN.md").read_text()
        assert (tmp_path / "x.report.json").is_file()
        assert not (tmp_path / "x.gguf.work" / "base.gguf").exists()
        with pytest.raises(BrokenModelError, match="marked as broken by an earlier run"):
            quantize(directory, output, measurement=measurement)
        first = json.loads((tmp_path / "x.report.json").read_text())["details"]
        quantize(directory, output, **settings)
        assert not (tmp_path / "x.gguf.BROKEN.md").exists()
        # The report of the same command again tells of the making what the first one told.
        again = json.loads((tmp_path / "x.report.json").read_text())["details"]
        assert {title: section for title, section in again.items() if "Drift" in title or title == "Plan"} == {
            title: section for title, section in first.items() if "Drift" in title or title == "Plan"
        }
        assert len(again) == len(first) == 6
        assert "nats per token from Transformers" in first["Base"]["in llama.cpp"]

    def test_remembers_what_it_was_calibrated_on(self, made: Made) -> None:
        spans = stored_spans(GgufModel.open(made["llama3"].output))
        assert spans is not None
        assert shared_share(rows(), spans) == 1
        assert shared_share(rows(40), spans) == pytest.approx(12 / 40)  # the first twelve are the same


def test_several_sizes_from_one_measurement(made: Made, converted: Any, tmp_path: Path) -> None:
    directory = converted["mistral"].directory
    result = quantize_series(  # cards belong to every series
        directory,
        tmp_path / "out",
        [6.5, 5.5],
        options=GgufOptions(),
        evaluate=False,
        measurement=made["mistral"].measurement,
    )
    assert [output.path.name for output in result.outputs] == [
        "mistral-6.5bpw-Q6_K.gguf",
        "mistral-5.5bpw-Q5_K_S.gguf",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mistral-5.5bpw-Q5_K_S.README.md",
        "mistral-5.5bpw-Q5_K_S.gguf",
        "mistral-5.5bpw-Q5_K_S.recipe.yaml",
        "mistral-6.5bpw-Q6_K.README.md",
        "mistral-6.5bpw-Q6_K.gguf",
        "mistral-6.5bpw-Q6_K.recipe.yaml",
        "report.json",
        "report.md",
    ]
    assert "not measured" in result.report.read_text()
    assert result.outputs[1].path.read_bytes() == made["mistral"].output.read_bytes()
    assert not list((tmp_path / "out.work").rglob("base.gguf"))
    card = ModelCard.load(tmp_path / "out" / "mistral-5.5bpw-Q5_K_S.README.md")
    assert card.data.library_name == "gguf"
    assert "5.4" in next(line for line in card.text.splitlines() if line.startswith("| bits per weight"))
    assert "random ids" in card.text


def test_as_large_as_llama_cpps_files(made: Made, converted: Any, tmp_path: Path) -> None:
    directory, names = converted["qwen3"].directory, ["Q8_0", "Q5_1"]
    options = GgufOptions(feedback=False)
    targets = [Target(size_of=name) for name in names]
    result = quantize_series(
        directory,
        tmp_path / "out",
        targets,
        options=options,
        evaluate=False,
        measurement=made["qwen3"].measurement,
    )
    for name, output in zip(names, result.outputs, strict=True):
        assert output.path.name == f"qwen3-bpwise-{name}.gguf"
        # The mixture's file is llama-quantize's byte for byte. Tensors are few: one more of a larger type is a lot.
        theirs = to_mixture(directory, tmp_path / f"{name}.gguf", name).output.stat().st_size
        assert theirs - 12_000 < output.path.stat().st_size <= theirs
        assert f"| {output.path.name} | size of {name} |" in result.report.read_text()
    with pytest.raises(ConfigError, match=r"size of Q8_1: not known\. Expected .*Q8_0"):
        quantize_model(directory, tmp_path / "x.gguf", size_of="Q8_1", options=options, evaluate=False)
    with pytest.raises(ConfigError, match="Expected another target for this format"):
        quantize_model(directory, tmp_path / "x", size_of=names[0], evaluate=False)


def test_both_formats_from_one_measurement(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, options = converted["mistral"].directory, (GgufOptions(feedback=False), Exl2Options())
    make, begun = series.make_output, list[str]()

    def cut_off(job: Any, path: Path, *more: Any) -> Any:
        begun.append(path.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return make(job, path, *more)

    def run() -> Any:
        return quantize_series(directory, tmp_path / "out", [6.0], options=options, evaluate=False, calibration=rows(4))

    with monkeypatch.context() as patch:
        patch.setattr(series, "make_output", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert re.fullmatch(r"mistral-6\.0bpw-I?Q\d_\w+\.gguf", begun[0])
    names = [begun[0], "mistral-6.0bpw-6hb-exl2"]
    assert begun == names
    first = (tmp_path / "out" / names[0]).stat().st_mtime_ns
    monkeypatch.setattr(measuring, "measure_checkpoint", lambda *_: pytest.fail("was measured twice"))
    result = run()
    assert [output.path.name for output in result.outputs] == names
    assert (tmp_path / "out" / names[0]).stat().st_mtime_ns == first
    assert Measurement.load(result.measurement).curves.keys() == {"exl2", "gguf"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    beside = {f"{Path(names[0]).stem}.{name}" for name in ("README.md", "recipe.yaml")}
    assert found == {*names, *beside, "report.json", "report.md"}
    assert (tmp_path / "out" / names[1] / "README.md").is_file()
    text = result.report.read_text()
    assert all(f"| {name} | 6 | 5.9" in text for name in names)
    assert "Bits per weight (bpw): GGUF, of all tensors; EXL2, of all linears but the head." in text


@pytest.fixture
def conversions(converted: Any, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a finished file where the converter would be run; tells where."""
    made: list[Path] = []

    def convert(_: Checkpoint, output: Path, *, check: Callable[[Path], object], **__: Any) -> None:
        made.append(output)
        shutil.copyfile(converted["mistral"].file, output)
        check(output)

    monkeypatch.setattr(gguf_base, "make_base", convert)
    monkeypatch.setattr(gguf_base, "converter_digest", lambda _: "a converter")
    monkeypatch.setattr("bpwise.convert.gguf.conversion.find_converter", lambda *_: None)
    return made


@pytest.fixture
def measurement(made: Made, tmp_path: Path) -> Path:
    """A measurement of its own, so that what is kept beside it goes with the test."""
    assert made["mistral"].measurement is not None
    return Path(shutil.copy(made["mistral"].measurement, tmp_path / "m.safetensors"))


def kept(folder: Path) -> list[Path]:
    return list(folder.rglob("base.gguf"))


FAST = QuantizeConfig(target=Target(bpw=6.5), options=GgufOptions(feedback=False), evaluate=None)


@pytest.mark.parametrize("several", [False, True], ids=["one", "series"])
def test_a_base_is_made_once_and_kept_with_the_measurement(
    several: bool, conversions: list[Path], measurement: Path, converted: Any, tmp_path: Path
) -> None:
    directory = converted["mistral"].directory
    if several:
        quantize_series(directory, tmp_path / "out", [6.5, 5.5], **series_arguments(FAST), measurement=measurement)
    else:
        quantize_model(directory, tmp_path / "out.gguf", **arguments(FAST), measurement=measurement)
    (base,) = kept(tmp_path)
    assert base.parent.parent == measurement.parent
    assert base.parent.name.startswith("m.safetensors.base-")
    quantize_model(directory, tmp_path / "more.gguf", **arguments(FAST), measurement=measurement)
    assert conversions == kept(tmp_path) == [base]


def test_another_model_has_another_base(
    conversions: list[Path], measurement: Path, converted: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(converted["mistral"].directory, directory)
    checkpoint = Checkpoint.open(directory)
    before = gguf_base.base_path(checkpoint, tmp_path / "work", None, measurement)
    (directory / "chat_template.jinja").write_text("{{ x }}")
    assert gguf_base.base_path(checkpoint, tmp_path / "work", None, measurement) != before


def test_a_base_is_kept_where_there_is_room_for_twice_as_much(
    conversions: list[Path], measurement: Path, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = converted["mistral"].directory
    size = Checkpoint.open(directory).total_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    quantize_model(directory, tmp_path / "out.gguf", **arguments(FAST), measurement=measurement)
    assert [path.parent.parent.name for path in conversions] == ["out.gguf.work"]
    assert kept(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size + 1))
    quantize_model(directory, tmp_path / "more.gguf", **arguments(FAST), measurement=measurement)
    assert kept(tmp_path) == conversions[1:]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    quantize_model(directory, tmp_path / "third.gguf", **arguments(FAST), measurement=measurement)
    assert len(conversions) == 2


@pytest.mark.parametrize("several", [False, True], ids=["one", "series"])
def test_a_damaged_base_is_converted_again(
    several: bool, conversions: list[Path], measurement: Path, converted: Any, tmp_path: Path
) -> None:
    directory, work = converted["mistral"].directory, tmp_path / "work"
    base = gguf_base.base_path(Checkpoint.open(directory), work, None, measurement)
    base.write_bytes(converted["mistral"].file.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"base\.gguf: .* It is converted again now"):
        if several:
            quantize_series(
                directory, tmp_path / "out", [6.5, 5.5], **series_arguments(FAST), measurement=measurement, work=work
            )
        else:
            quantize_model(directory, tmp_path / "out.gguf", **arguments(FAST), measurement=measurement, work=work)
    assert conversions == [base]


def test_a_base_with_the_channels_of_the_original_is_refused_beside_others(converted: Any, tmp_path: Path) -> None:
    directory, measured = converted["mistral"].directory, tmp_path / "m.safetensors"
    config = MeasureConfig(device="cpu", equalize=True)
    measure_model(directory, measured, formats=["gguf"], measure=config, calibration=rows())
    with pytest.raises(FormatError, match="is of equalized channels, and the base is not"):
        quantize(directory, tmp_path / "x.gguf", base=converted["mistral"].file, measurement=measured)


def test_equalized_channels(made: Made, converted: Any, tmp_path: Path) -> None:
    directory, measured = converted["mistral"].directory, tmp_path / "m.safetensors"
    config = MeasureConfig(device="cpu", equalize=True)
    equal = measure_model(directory, measured, formats=["gguf"], measure=config, calibration=rows())
    assert all(linear.input_factors is not None for linear in equal.linears)
    output = quantize(directory, tmp_path / "x.gguf", measurement=measured).output
    header = read_gguf_header(output)
    assert header.metadata["bpwise.equalized"] == "1"
    norm = gguf_values(header.tensors["blk.0.attn_norm.weight"])
    assert not torch.equal(norm, Checkpoint.open(directory).tensor("model.layers.0.input_layernorm.weight").float())
    assert kl(directory, output) < 2 * kl(directory, made["mistral"].output)

    # Importances are those of the original. Tokens count by gradients, which rounding moves a little.
    assert made["mistral"].measurement is not None
    export_imatrix(made["mistral"].measurement, tmp_path / "plain.gguf")
    export_imatrix(equal, tmp_path / "equal.gguf")
    expected, got = (read_imatrix(tmp_path / f"{name}.gguf") for name in ("plain", "equal"))
    for name in ("blk.0.attn_q.weight", "blk.1.attn_output.weight", "blk.1.ffn_up.weight", "blk.0.ffn_down.weight"):
        one, two = expected.mean_squares(name), got.mean_squares(name)
        assert one is not None
        assert two is not None
        torch.testing.assert_close(two, one, rtol=0.05, atol=0.01 * float(one.mean()))
