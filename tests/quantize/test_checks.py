"""What is refused before long work: nothing is measured, converted or written, whichever way a run is begun."""

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix, write_imatrix
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.errors import BpwiseError, CalibrationError, ConfigError, VerificationError, WorkDirectoryError
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig, measure_to_file
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.quantize import checks
from bpwise.quantize.checks import forecast_outputs
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from bpwise.quantize.series import output_targets, quantize_series
from safetensors.torch import load_file, save_file

from ..tiny_models import save_family
from .runs import arguments, bpwise, exl2, gguf, series_arguments

CONVERTER = "convert.gguf.base.make_base"

Tensors = dict[str, torch.Tensor]


def begun(*_: Any, **__: Any) -> None:
    pytest.fail("long work was begun")


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (
        "quantize.measuring.measure_checkpoint",
        "measure.run.measure_checkpoint",
        "convert.gguf.base.make_base",
    ):
        monkeypatch.setattr(f"bpwise.{place}", begun)


def copied(model: Path, directory: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a model with other tensors."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def far(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].bfloat16()
        tensors[name].view(-1)[5] = 1e5

    return change


def rows(count: int, row_tokens: int, largest: int = 255) -> CalibrationSet:
    tokens = torch.full((count, row_tokens), largest)
    return CalibrationSet(tokens=tokens, origins=("x",) * count, description="x", adds_bos=False)


EXL2_CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "positions": (lambda t: t.update({"model.position_ids": torch.arange(9)[None]}), "position_ids.*Got int64"),
    "mask": (
        lambda t: t.update({"model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        "self_attn.bias.*Got bool",
    ),
    "float64": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}), "norm.weight.*float64"),
    "embedding": (far("model.embed_tokens.weight"), "embed_tokens.weight: values range from .* to 9984"),
    "norm": (far("model.layers.1.input_layernorm.weight"), "layers.1.input_layernorm.weight: values range"),
    "short-norm": (
        lambda t: t.update({"model.layers.1.post_attention_layernorm.weight": torch.ones(32)}),
        r"post_attention_layernorm.weight has shape \(32,\). Expected \(64,\)",
    ),
    "lost-norm": (
        lambda t: t.pop("model.layers.1.input_layernorm.weight"),
        "nothing is stored for model.layers.1.input_layernorm.weight",
    ),
    "vocabulary": (
        lambda t: t.update({n: t[n][:260] for n in ("model.embed_tokens.weight", "lm_head.weight")}),
        "set vocab_size to 260",
    ),
    "one-table": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:260]}),
        r"lm_head.weight has shape \(260, 64\). Expected \(264, 64\).*do not belong together",
    ),
    "scalar": (lambda t: t.update({"lm_head.weight": torch.tensor(1.0)}), r"lm_head.weight has shape \(\)"),
    "head": (lambda t: t.pop("lm_head.weight"), "Set tie_word_embeddings to true"),
    "prefix": (
        lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)],
        "'module.model.layers.0.self_attn.q_proj.weight' is there.*another prefix",
    ),
}


@pytest.mark.parametrize("case", EXL2_CHANGES)
def test_tensors_that_exl2_cannot_hold(case: str, tiny_model: Path, tmp_path: Path) -> None:
    change, message = EXL2_CHANGES[case]
    model, out = copied(tiny_model, tmp_path / "m", change), tmp_path / "out"
    config = exl2()
    with pytest.raises(BpwiseError, match=message):
        quantize_model(model, out, **arguments(config))
    with pytest.raises(BpwiseError, match=message):
        quantize_series(model, out, [4.5, 6.0], **series_arguments(config))
    dry = bpwise("quantize", model, out, "--bpw", "4.5", "--dry-run")
    assert dry.exit_code == 1
    assert dry.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "LICENSE"])
def test_side_files_that_lead_outside(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/etc/hostname")
    with pytest.raises(BpwiseError, match=f"{name}: leads outside"):
        quantize_model(model, tmp_path / "out", **arguments(exl2()))


def test_side_files_are_looked_at_where_they_are(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A temporary directory may have no room for a tokenizer of 30 MB, and nothing of it is needed.
    shutil.copytree(tiny_model, tmp_path / "m")
    monkeypatch.setattr("bpwise.checkpoint.carry.carried.copy", begun)
    assert bpwise("quantize", tmp_path / "m", tmp_path / "out", "--bpw", 4.5, "--dry-run").exit_code == 0
    (tmp_path / "m" / "processor_config.json").write_text("{")
    dry = bpwise("quantize", tmp_path / "m", tmp_path / "out", "--bpw", 4.5, "--dry-run")
    assert dry.exit_code == 1
    assert "processor_config.json" in dry.stderr


def test_a_bias_that_float16_cannot_hold(tmp_path: Path, byte_tokenizer: Any) -> None:
    model = save_family(tmp_path / "m", "qwen2", byte_tokenizer)
    copied(model, tmp_path / "far", far("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(BpwiseError, match=r"k_proj.bias: values range"):
        quantize_model(tmp_path / "far", tmp_path / "out", **arguments(exl2()))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A Llama, and ggml's library to plan it with."""
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    return save_family(tmp_path_factory.mktemp("gguf") / "m", "llama", byte_tokenizer)


class TestGguf:
    @pytest.mark.parametrize(
        ("target", "overrides", "message"),
        [
            # All rows are of 64 or 96 weights: nothing is smaller than 4.5 bits, or 4.25 of MXFP4.
            ({"bpw": 2}, [], "cannot be reached"),
            ({"max_bytes": 30_000}, [], "cannot be reached"),
            ({"vram_bytes": 1 << 20, "context_tokens": 64}, [], "no room for weights"),
            ({"bpw": 5}, ["model.layers.0.*=Q4_K"], "rows of 64 weights. Expected a multiple of 256"),
            # 95232 weights at 2 bytes, 1216 of norms and biases at 4: 16.2017 bits each, met from below.
            ({"bpw": 5}, ["*=F16"], r"from 195\.3 kB to 195\.3 kB, that is 16\.2018 to 16\.2018 bits"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_sizes_and_overrides(
        self, target: dict[str, Any], overrides: list[str], message: str, known: Path, tmp_path: Path
    ) -> None:
        config = gguf(target=Target(**target), overrides=tuple(map(TypeOverride.parse, overrides)))
        with pytest.raises(BpwiseError, match=message):
            quantize_model(known, tmp_path / "x.gguf", **arguments(config))
        if "bpw" in target:
            with pytest.raises(BpwiseError, match=message):
                quantize_series(known, tmp_path / "x", [target["bpw"], 8.5], **series_arguments(config))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["blk.0.*=Q4_K"], "rows of 64 weights. Expected a multiple of 256"),
            (["blk.7.*=Q4_0"], "no tensor has such a name"),
            (["*=F16", "blk.1.ffn_up.weight=Q4_0"], "cannot be reached"),
        ],
    )
    def test_names_in_the_file_are_known_once_it_is_there(
        self, overrides: list[str], message: str, converted: Any, tmp_path: Path
    ) -> None:
        base = converted["mistral"].file
        config = gguf(5, base=base, overrides=tuple(map(TypeOverride.parse, overrides)))
        with pytest.raises(BpwiseError, match=message):  # before anything is measured
            quantize_model(
                converted["mistral"].directory, tmp_path / "x.gguf", **arguments(config), calibration=rows(2, 32)
            )
        assert not (tmp_path / "x.gguf").exists()

    @pytest.mark.parametrize(
        ("name", "row_weights", "message"),
        [
            ("blk.0.attn_q.weight", 128, "blk.0.attn_q.weight has 128 inputs. Expected 64"),
            ("blk.9.ffn_down.weight", 96, "none of its 1 tensors is in the model"),
        ],
        ids=["wider", "other-names"],
    )
    def test_importances_of_another_model(
        self, name: str, row_weights: int, message: str, converted: Any, tmp_path: Path
    ) -> None:
        matrix = tmp_path / "i.gguf"
        write_imatrix(matrix, ImportanceMatrix.from_means({name: torch.ones(row_weights)}, 10))
        config = gguf(mixture="Q4_0", imatrix=matrix, base=converted["mistral"].file)
        with pytest.raises(ConfigError, match=message):
            quantize_model(converted["mistral"].directory, tmp_path / "x.gguf", **arguments(config))
        assert not (tmp_path / "x.gguf").exists()

    def test_a_mixture_that_needs_importances(self, tmp_path: Path, byte_tokenizer: Any) -> None:
        wide = save_family(tmp_path / "m", "llama", byte_tokenizer, hidden_size=256, intermediate_size=256)
        with pytest.raises(ConfigError, match="garbage without importances"):
            quantize_model(wide, tmp_path / "x.gguf", **arguments(gguf(mixture="IQ2_XS")))


def test_a_base_of_another_model_is_refused_before_anything_is_measured(converted: Any, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"runs another model|is not in the file, or not whole"):
        quantize_model(
            converted["mistral"].directory,
            tmp_path / "x.gguf",
            **arguments(gguf(6, base=converted["llama"].file)),
            calibration=rows(2, 32),
        )
    assert not (tmp_path / "x.gguf").exists()


Q4_0 = {"mixture": "Q4_0"}

LONG = CalibrationConfig(rows=1, row_tokens=129)
"""One token more than ``tiny_model`` has positions for."""


class TestContext:
    @pytest.mark.parametrize(
        ("config", "use"),
        [
            (exl2(measure=MeasureConfig(calibration=LONG)), "calibration"),
            (exl2(evaluate=EvalConfig(row_tokens=129)), "evaluation"),
            (gguf(8, measure=MeasureConfig(calibration=LONG)), "calibration"),
            (gguf(8, evaluate=EvalConfig(row_tokens=129)), "evaluation"),
        ],
        ids=["exl2", "exl2-evaluation", "gguf", "gguf-evaluation"],
    )
    def test_longer_rows(self, config: QuantizeConfig, use: str, tiny_model: Path, tmp_path: Path) -> None:
        message = f"{use} text: rows of 129 tokens, but the model has positions for 128"
        with pytest.raises(ConfigError, match=message):
            quantize_model(tiny_model, tmp_path / "x", **arguments(config))
        with pytest.raises(ConfigError, match=message):
            quantize_series(tiny_model, tmp_path / "x", [8.0], **series_arguments(config))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (rows(2, 129), ConfigError, "rows of 129 tokens, but the model has positions for 128"),
            (rows(2, 32, largest=264), CalibrationError, "token id 264. Expected ids below the vocabulary size 264"),
        ],
        ids=["long", "foreign"],
    )
    def test_given_rows(
        self, given: CalibrationSet, error: type[BpwiseError], message: str, tiny_model: Path, tmp_path: Path
    ) -> None:
        given.save(tmp_path / "rows.safetensors")
        with pytest.raises(error, match=message):
            quantize_model(tiny_model, tmp_path / "x", **arguments(exl2()), calibration=given)
        with pytest.raises(error, match=message):
            measure_to_file(tiny_model, tmp_path / "m.safetensors", MeasureConfig(), formats={}, calibration=given)
        for command in (
            ("quantize", tiny_model, tmp_path / "x", "--bpw", 4.5, "--dry-run"),
            ("measure", tiny_model, "-o", tmp_path / "m.safetensors"),
        ):
            result = bpwise(*command, "-c", tmp_path / "rows.safetensors")
            assert result.exit_code == 1
        assert [path.name for path in tmp_path.iterdir()] == ["rows.safetensors"]

    def test_commands_refuse_longer_rows(self, tiny_model: Path, tmp_path: Path) -> None:
        for command in (
            ("measure", tiny_model, "-o", tmp_path / "m.safetensors", "-l", 129),
            ("quantize", tiny_model, tmp_path / "x", "--bpw", 4.5, "-l", 129, "--dry-run"),
            ("quantize", tiny_model, tmp_path / "x.gguf", "--type", "Q8_0", "--eval-row-tokens", 129),
            ("eval", tiny_model, tiny_model, "-l", 129),
        ):
            result = bpwise(*command)
            assert result.exit_code == 1
            assert "rows of 129 tokens, but the model has positions for 128" in result.stderr
        assert list(tmp_path.iterdir()) == []


def test_rows_beside_a_measurement(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = SimpleNamespace(tokens=torch.zeros(1, 4))
    monkeypatch.setattr("bpwise.quantize.measuring.load_measurement", lambda *_: measured)
    with pytest.raises(ConfigError, match="brings its own calibration rows"):
        quantize_model(tiny_model, tmp_path / "x", **arguments(exl2()), measurement=Path("m"), calibration=rows(1, 4))


def test_no_library_of_ggml(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_family(tmp_path / "m", "qwen3", byte_tokenizer)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "libggml" and find(name, *rest)) or None
    )
    with pytest.raises(BpwiseError, match="ggml's library, which is not installed"):
        quantize_model(model, tmp_path / "x.gguf", **arguments(gguf(5)))
    with pytest.raises(BpwiseError, match="ggml's library, which is not installed"):
        quantize_model(model, tmp_path / "x.gguf", **arguments(gguf(mixture="Q8_0")))


class TestBeforeAnythingIsConverted:
    """What would otherwise show after an hour of conversion, or after the model has written its own text."""

    @pytest.fixture(autouse=True)
    def nothing_begins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for place in (
            "bpwise.convert.gguf.conversion.GgufConversion.prepare",
            "bpwise.measure.run.load_or_make_rows",
            "bpwise.convert.exl2.conversion.Exl2Conversion.prepare",
        ):
            monkeypatch.setattr(place, lambda *_, **__: pytest.fail("began"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("gone.txt", "no such file or directory"),
            ("built-in,./gone", "no such file or directory"),
            ("model.gguf", "unknown kind of text file"),
        ],
    )
    def test_text(self, text: str, message: str, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("model.gguf").write_bytes(b"")
        for command in (
            ("quantize", known, "x.gguf", "--bpw", 8),
            ("quantize", known, "x", "--format", "gguf", "--bpw", "8,6"),
            ("measure", known, "-o", "m.safetensors"),
        ):
            result = bpwise(*command, "-c", text)
            assert result.exit_code == 1
            assert message in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

    @pytest.mark.parametrize("evaluated", [False, True], ids=["calibration", "evaluation"])
    def test_a_data_set_that_is_not_there(
        self, evaluated: bool, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if evaluated:
            monkeypatch.setattr(
                "bpwise.convert.gguf.conversion.GgufConversion.prepare", lambda *_: pytest.fail("was converted first")
            )

        def load(name: str, *_: Any, **__: Any) -> None:
            raise FileNotFoundError(f"{name} doesn't exist on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", load)
        measure = ("measure", known, "-o", tmp_path / "m.safetensors")
        for command in (
            ("quantize", known, tmp_path / "x.gguf", "--bpw", 8),
            ("quantize", known, tmp_path / "x.gguf", "--bpw", 8, "--dry-run"),
            ("quantize", known, tmp_path / "x", "--format", "gguf", "--bpw", "8,6"),
            *(() if evaluated else (measure,)),
        ):
            where = ("--eval-text", "org/gone:config") if evaluated else ("-c", "self,org/gone:config")
            result = bpwise(*command, *where)
            assert result.exit_code == 1
            assert "org/gone:config: no such file or directory, and reading it as the Hub data set" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_device_that_is_not_there(self, known: Path, tmp_path: Path) -> None:
        device = ("--device", "cuda:99")
        for command in (("quantize", known, tmp_path / "x.gguf", "--bpw", 8), ("measure", known, "-o", tmp_path / "m")):
            result = bpwise(*command, *device)
            assert result.exit_code == 1
            assert "cuda:99" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_measuring_without_a_tool(self, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: (name != "libggml" and find(name, *rest)) or None
        )
        result = bpwise("measure", known, "-o", tmp_path / "m.safetensors", "--formats", "gguf", "-c", "self")
        assert result.exit_code == 1
        assert "ggml's library, which is not installed" in result.stderr

    def test_measuring_on_a_full_disk(self, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        result = bpwise("measure", known, "-o", tmp_path / "m.safetensors")
        assert result.exit_code == 1
        assert "its disk has 1000 free" in result.stderr


class TestPlace:
    def test_below_a_file(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(WorkDirectoryError, match=r"a parent of it is not a directory"):
            quantize_model(tiny_model, tmp_path / "file" / "out", **arguments(exl2()))
        with pytest.raises(WorkDirectoryError, match=r"a parent of it is not a directory"):
            measure_to_file(tiny_model, tmp_path / "file" / "m.safetensors", MeasureConfig(), formats={})

    def test_a_disk_that_is_too_small(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # At 4.5 bits two layers of 30720 weights take 34560 bytes; embedding and head beside them.
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=34_560))
        with pytest.raises(WorkDirectoryError, match="its disk has 34560 free"):
            quantize_model(tiny_model, tmp_path / "out", **arguments(exl2()))

    def test_a_series_takes_what_its_outputs_take_together(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, rates = exl2(), [4.5, 6.0]
        # Each alone, by the headers; two layers of 30720 weights at 1.5 bits more are 11520 bytes.
        conversion = config.format.conversion(Checkpoint.open(tiny_model), config.options)
        small = conversion.forecast(config.target, None).output_bytes
        together = 2 * small + 11_520
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=together - 1))
        with pytest.raises(WorkDirectoryError, match=rf"out/\*: will take {together} bytes, but its disk has"):
            quantize_series(tiny_model, tmp_path / "out", rates, **series_arguments(config))
        targets = output_targets("tiny", tmp_path / "out", conversion, rates)
        for path in targets:
            path.mkdir(parents=True)
        with pytest.raises(WorkDirectoryError, match=f"will take {together} bytes"):  # they are still empty
            quantize_series(tiny_model, tmp_path / "out", rates, **series_arguments(config))
        (tmp_path / "out" / "tiny-6.0bpw-6hb-exl2" / "config.json").write_text("{}")
        found = forecast_outputs(conversion, targets, config.measure, None, tmp_path / "work")
        assert list(found) == list(targets)
        checks.require_together([(conversion, found)], tmp_path / "work", None)  # it is there

    def test_disks_are_looked_at_once(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[set[Path]] = []
        monkeypatch.setattr(checks, "require_rooms", lambda sizes: seen.append(set(sizes)))
        run = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", "4.5,6", "--dry-run")
        assert run.exit_code == 0, run.stderr
        names = {"tiny-4.5bpw-6hb-exl2", "tiny-6.0bpw-6hb-exl2"}
        assert seen == [{tmp_path / "out" / name for name in names}]

    def test_gguf_needs_room_for_the_unquantized_file_too(
        self, known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = sum(tensor.nbytes for tensor in load_file(known / "model.safetensors").values())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=stored + 1000))
        runs = [
            partial(quantize_model, known, tmp_path / "x.gguf", **arguments(gguf(**options)))
            for options in ({"bpw": 8}, Q4_0)
        ]
        for run in (*runs, partial(quantize_series, known, tmp_path / "x", [8, 6], **series_arguments(gguf()))):
            with pytest.raises(WorkDirectoryError, match=r"\*: will take .* bytes, but its disk has"):
                run()
        assert list(tmp_path.iterdir()) == []


def test_a_missing_converter_shows_before_the_model_is_read(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "_fingerprint", begun)
    nowhere = tmp_path / "nowhere"
    config = gguf(8, llama_cpp=nowhere)
    for run in (
        partial(quantize_model, known, tmp_path / "x.gguf", **arguments(config)),
        partial(quantize_model, known, tmp_path / "x.gguf", **arguments(config), measurement=tmp_path / "m"),
        partial(quantize_series, known, tmp_path / "x", [8, 6], **series_arguments(config)),
        partial(quantize_model, known, tmp_path / "x.gguf", **arguments(gguf(llama_cpp=nowhere, **Q4_0))),
    ):
        with pytest.raises(BpwiseError, match=r"nowhere: llama\.cpp's converter is not there"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_beside_a_gguf_file(known: Path, tmp_path: Path) -> None:
    for name, config in (
        ("x.report.md", gguf(8, evaluate=EvalConfig())),
        ("x.report.json", gguf(8, evaluate=EvalConfig())),
        ("x.README.md", gguf(8, card=True)),
    ):
        (tmp_path / name).write_text("# The only copy")
        with pytest.raises(WorkDirectoryError, match=f"{name}: in the way"):
            quantize_model(known, tmp_path / "x.gguf", **arguments(config))
        assert (tmp_path / name).read_text() == "# The only copy"
        (tmp_path / name).unlink()
    (tmp_path / "x.report.html").write_text("<p>the only copy")
    refused = bpwise("quantize", known, tmp_path / "x.gguf", "--type", "Q4_0")
    assert refused.exit_code == 1
    assert "x.report.html: in the way" in refused.stderr
