import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.cli import cli
from bpwise.convert.exl2.plan.making import exl2_bpw_range
from bpwise.convert.exl2.plan.measured import exl2_curves
from bpwise.convert.opening import open_any
from bpwise.convert.registry import load_plan
from bpwise.eval import original as original_module
from bpwise.eval.cache import OriginalCache
from bpwise.eval.report.layers import find_plan, linear_costs
from bpwise.measure.measurement import Measurement
from bpwise.measure.run import MeasureConfig
from bpwise.quantize import checks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

from .runs import EVALUATION, TEXT, bpwise, measurement_of, refused, succeed

PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


def quantize(model: Path, out: Path, bpw: float = 4.5, *options: object) -> str:
    text = ("--device", "cpu") if "-m" in options else TEXT  # a measurement brings its rows and groups along
    return succeed("quantize", model, out, "--bpw", bpw, *text, *EVALUATION, *options)


def reused(finished: Path) -> tuple[object, ...]:
    """Options that take over what an earlier run measured, where a test is about later stages."""
    return "--device", "cpu", "-m", measurement_of(finished)


def rounding_only(model: Path, out: Path, finished: Path) -> tuple[object, ...]:
    """A command that does no more than round and write what an earlier run measured."""
    return ("quantize", model, out, "--bpw", 4.5, "--no-eval", *reused(finished))


def content(directory: Path) -> dict[str, bytes]:
    """Everything but reports, which say how long it took, the card, which says what they say, and the recipe.

    That tells what was asked for: with a measurement something else than without.
    """
    other = ("report.", "README", "recipe")
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith(other)}


def comparison(directory: Path) -> dict[str, Any]:
    """What the report in a directory says of the original and the quantized model."""
    report: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return report["comparison"]


def decoder_bpw(directory: Path) -> float:
    """Counted from the bytes of the stored tensors and the original's sizes."""
    bits = 0
    for name, tensor in load_file(directory / "output.safetensors").items():
        linear, _, part = name.rpartition(".")
        if part in PARTS and linear != "lm_head":
            bits += 8 * tensor.numel() * tensor.element_size()
    return bits / (2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96))  # two layers: q, k, v, o; gate, up, down


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that no test may change, its work directory beside it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    quantize(tiny_model, out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "out"


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_again(*_: Any, **__: Any) -> None:
        pytest.fail("was done again")

    for place in (
        "quantize.measuring.measure_checkpoint",
        "quantize.output.round_model",
        "convert.exl2.conversion.write_model",
    ):
        monkeypatch.setattr(f"bpwise.{place}", not_again)


class TestQuantize:
    def test_what_is_written(self, finished: Path, tiny_model: Path) -> None:
        names = {path.name for path in finished.iterdir()}
        assert {"config.json", "output.safetensors", "tokenizer.json", "README.md"} <= names
        assert {f"report.{end}" for end in ("csv", "html", "json", "md")} <= names
        config = json.loads((finished / "config.json").read_text())
        original = json.loads((tiny_model / "config.json").read_text())
        assert config["hidden_size"] == original["hidden_size"]
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == "exl2"
        assert (quantization["bits"], quantization["head_bits"]) == (4.5, 6)
        assert (quantization["calibration"]["rows"], quantization["calibration"]["length"]) == (8, 32)
        assert comparison(finished)["predicted_tokens"] == 2 * 31

    def test_report_has_the_bits_and_damage_of_every_linear(self, finished: Path) -> None:
        linears = json.loads((finished / "report.json").read_text())["linears"]
        plan = load_plan(finished.with_name("out.work") / "plan.json")
        assert plan.head is not None
        assert linears == [
            {"name": each.name, "bpw": each.bpw, "damage_nats": each.damage_nats} for each in (*plan.linears, plan.head)
        ]
        # What the model itself says, and a plan that is found beside it, come to the same.
        found = linear_costs(open_any(finished), find_plan(finished))
        assert {cost.name: (pytest.approx(cost.bpw), cost.damage_nats) for cost in found} == {
            each["name"]: (each["bpw"], each["damage_nats"]) for each in linears
        }
        assert 'aria-label="Damage"' in (finished / "report.html").read_text()

    def test_size_is_met_from_below(self, finished: Path) -> None:
        # The smallest group has 32 rows of 32 of the 61440 weights: 0.017 bits per weight for a bit more.
        assert 4.5 - 0.02 < decoder_bpw(finished) <= 4.5

    def test_summary_tells_the_size(self, tiny_model: Path, out: Path) -> None:
        assert quantize(tiny_model, out) == f"finished already: {out} holds what this command makes\n"
        fresh = out.with_name("fresh")
        printed = quantize(tiny_model, fresh)
        assert f"decoder {decoder_bpw(fresh):.4f} bpw" in printed
        assert "(asked 4.5, " in printed
        assert str(fresh) in printed

    def test_work_is_cleared_but_for_what_serves_again(self, finished: Path) -> None:
        work = finished.with_name("out.work")
        assert {path.name for path in work.iterdir()} == {
            "calibration.safetensors",
            "finished.json",
            "measurement.safetensors",
            "plan.json",
        }
        assert (
            load_plan(work / "plan.json").measurement == Measurement.load(work / "measurement.safetensors").fingerprint
        )

    def test_prediction_has_the_right_size(self, finished: Path) -> None:
        # Second order, Fisher and Gram independent: within a factor of five of what is measured on other text.
        predicted = load_plan(finished.with_name("out.work") / "plan.json").damage_nats
        measured = comparison(finished)["summary"]["kl_nats"]["value"]
        assert predicted / 5 < measured < predicted * 5

    def test_same_command_again(self, tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, time = content(out), (out / "output.safetensors").stat().st_mtime_ns
        forbid_work(monkeypatch)
        monkeypatch.setattr("bpwise.quantize.judge.compare_with", lambda *_: pytest.fail("was evaluated again"))
        assert quantize(tiny_model, out) == f"finished already: {out} holds what this command makes\n"
        assert content(out) == before
        assert (out / "output.safetensors").stat().st_mtime_ns == time

    @pytest.mark.parametrize(
        "change",
        [
            lambda out: (out / "report.html").unlink(),
            lambda out: (out / "report.json").write_text('{"bpwise_report": 1}'),
            lambda out: (out / "report.json").write_text((out / "report.json").read_text().replace("Transf", "Other")),
        ],
        ids=["page-deleted", "of-another-version", "by-another-engine"],
    )
    def test_same_command_again_without_its_report(
        self, tiny_model: Path, out: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = comparison(out)
        change(out)
        forbid_work(monkeypatch)
        assert "KL" in quantize(tiny_model, out)
        assert comparison(out)["summary"] == before["summary"]
        assert (out / "report.html").is_file()

    def test_another_bitrate_does_not_run_the_original_again(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bpwise.quantize.run.original_cache", lambda: OriginalCache(tmp_path / "cache"))
        quantize(tiny_model, tmp_path / "first", 5.0, *reused(finished))
        monkeypatch.setattr("bpwise.eval.original._original_state", lambda *_: pytest.fail("was run again"))
        quantize(tiny_model, tmp_path / "second", 4.0, *reused(finished))
        first, second = comparison(tmp_path / "first"), comparison(tmp_path / "second")
        assert first["summary"]["original_perplexity"] == second["summary"]["original_perplexity"]
        assert first["summary"]["kl_nats"]["value"] < second["summary"]["kl_nats"]["value"]

    def test_without_a_cache_the_original_runs_again(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bpwise.quantize.run.original_cache", lambda: OriginalCache(tmp_path / "cache"))
        quantize(tiny_model, tmp_path / "none", 5.0, *reused(finished), "--no-cache")
        assert not (tmp_path / "cache").exists()
        quantize(tiny_model, tmp_path / "first", 5.0, *reused(finished))
        assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
        runs, run = [], original_module._original_state
        monkeypatch.setattr(original_module, "_original_state", lambda *given: runs.append(given) or run(*given))
        quantize(tiny_model, tmp_path / "second", 4.0, *reused(finished), "--no-cache")
        assert len(runs) == 1

    def test_only_the_output_is_left(self, tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Moved away and its work directory deleted: measured again, but not rounded again.
        shutil.rmtree(out.with_name("out.work"))
        before = content(out)
        monkeypatch.setattr("bpwise.quantize.output.round_model", lambda *_: pytest.fail("was done again"))
        quantize(tiny_model, out)
        assert content(out) == before

    @pytest.mark.parametrize(
        "options",
        [
            ("--bpw", "5"),
            ("--head-bits", "8"),
            ("--effort", "high"),
            ("--seed", "1"),
            ("--damping", "0.1"),
            ("--shard-size", "1"),
        ],
        ids="".join,
    )
    def test_other_options_over_the_same_output(self, tiny_model: Path, out: Path, options: tuple[str, str]) -> None:
        before = content(out)
        message = refused("quantize", tiny_model, out, "--bpw", "4.5", *TEXT, "--no-eval", *options)
        assert f"{out}: exists already" in message
        assert content(out) == before

    def test_other_directory_in_the_way(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("the only copy")
        message = refused("quantize", tiny_model, tmp_path / "out", "--bpw", "4.5", *TEXT, "--no-eval")
        assert "exists already" in message
        assert (tmp_path / "out" / "thesis.txt").read_text() == "the only copy"

    def test_occupied_output_is_noticed_before_the_long_work(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Hours of measuring must not end with "exists already".
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("the only copy")
        forbid_work(monkeypatch)
        refused("quantize", tiny_model, tmp_path / "out", "--bpw", "4.5", *TEXT, "--no-eval")

    def test_impossible_size_is_noticed_before_the_long_work(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forbid_work(monkeypatch)
        message = refused("quantize", tiny_model, tmp_path / "out", "--bpw", "2.01", *TEXT, "--no-eval")
        assert "from" in message

    def test_empty_directory_is_fine(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        quantize(tiny_model, tmp_path / "out", 4.5, "--no-eval", *reused(finished))
        assert content(tmp_path / "out") == content(finished)

    def test_same_seed_same_bytes_anywhere(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(tiny_model, tmp_path / "elsewhere" / "model")
        monkeypatch.chdir(tmp_path / "elsewhere")
        torch.manual_seed(12345)
        quantize(Path("model"), Path("q"), 4.5, "--work-dir", tmp_path / "scratch")
        assert content(Path("q")) == content(finished)

    def test_other_seed_other_bytes(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        quantize(tiny_model, tmp_path / "out", 4.5, "--seed", 1, "--no-eval")
        assert content(tmp_path / "out")["output.safetensors"] != content(finished)["output.safetensors"]

    def test_no_eval(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        printed = quantize(tiny_model, tmp_path / "out", 4.5, "--no-eval", *reused(finished))
        assert not list((tmp_path / "out").glob("report.*"))
        assert "KL" not in printed

    def test_shards(self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bpwise.cli.format_options.MIB", 20000)
        quantize(tiny_model, tmp_path / "out", 4.5, "--no-eval", "--shard-size", 1, *reused(finished))
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert len(files) > 2
        assert files[0] == f"output-00001-of-{len(files):05d}.safetensors"
        assert "read back exactly as written" in succeed("verify", tmp_path / "out")

    def test_biases_and_tied_embeddings(self, save_model: Any, tmp_path: Path) -> None:
        model = save_model(tmp_path / "model", kind=Qwen2Config, tie_word_embeddings=True)
        quantize(model, tmp_path / "out", 6.0, "--no-eval", "--head-bits", 8)
        stored = load_file(tmp_path / "out" / "output.safetensors")
        original = load_file(model / "model.safetensors")
        name = "model.layers.1.self_attn.k_proj.bias"
        assert torch.equal(stored[name], original[name].half())
        assert "lm_head.q_weight" in stored  # beside the embedding
        assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


class TestInterrupted:
    @pytest.mark.parametrize(
        ("stage", "after"),
        [("measure: backward, curves", 1), ("quantize: round", 1), ("evaluate: logits", 0)],
        ids=["measuring", "rounding", "evaluating"],
    )
    def test_goes_on_and_gives_the_same(
        self,
        tiny_model: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        stage: str,
        after: int,
    ) -> None:
        def progress(items: Sequence[Any], name: str) -> Iterable[Any]:
            for number, item in enumerate(items):
                if name == stage and number == after:
                    raise KeyboardInterrupt
                yield item

        arguments = ("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, *EVALUATION)
        with monkeypatch.context() as patch:
            patch.setattr("bpwise.cli.quantize.RunBar", lambda: progress)
            result = bpwise(*arguments)
        assert result.exit_code == 130
        kept = f"Stopped. Run the same command to resume. Finished work is kept in {tmp_path / 'out.work'}."
        assert result.stderr.splitlines()[-1] == kept
        # Complete or not there: only once it is written and verified.
        assert (tmp_path / "out").exists() == stage.startswith("evaluate")
        succeed(*arguments)
        assert content(tmp_path / "out") == content(finished)
        assert {path.name for path in tmp_path.iterdir()} == {"out", "out.work"}

    def test_cut_after_any_piece_of_rounding(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = rounding_only(tiny_model, tmp_path / "out", finished)
        save = ResumeStore.save
        saved: list[str] = []

        def save_and_die(self: ResumeStore, artifact: str, *rest: Any) -> None:
            save(self, artifact, *rest)
            if artifact not in saved:
                saved.append(artifact)
                raise KeyboardInterrupt

        monkeypatch.setattr(ResumeStore, "save", save_and_die)
        for _ in range(40):
            if bpwise(*arguments).exit_code == 0:
                break
        assert len(saved) >= 2 * 7 + 1  # linears of two blocks, the head, and what the blocks leave behind
        assert content(tmp_path / "out") == content(finished)

    def test_failed_write_leaves_nothing_loadable(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        arguments = rounding_only(tiny_model, tmp_path / "out", finished)
        with monkeypatch.context() as patch:
            patch.setattr("bpwise.convert.exl2.file.writer.copy_side_files", interrupt)
            result = bpwise(*arguments)
        assert result.exit_code == 130
        assert {path.name for path in tmp_path.iterdir()} == {"out.work"}
        succeed(*arguments)
        assert content(tmp_path / "out") == content(finished)


class TestDryRun:
    def test_writes_nothing_and_tells_the_sizes(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        printed = succeed("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, "--dry-run")
        assert list(tmp_path.iterdir()) == []
        lines = {line[:14].strip(): line[14:].split() for line in printed.splitlines()}
        lowest, highest = exl2_bpw_range(Measurement.load(measurement_of(finished)))
        # Rounded up, so that both can be asked for.
        assert lines["possible bpw"][0] == f"{math.ceil(lowest * 10_000) / 10_000:.4f}"
        assert lines["possible bpw"][2] == f"{math.ceil(highest * 10_000) / 10_000:.4f}"
        original = sum(t.numel() * t.element_size() for t in load_file(tiny_model / "model.safetensors").values())
        written = sum(t.numel() * t.element_size() for t in load_file(finished / "output.safetensors").values())
        assert lines["original"] == [f"{original / 1000:.1f}", "kB"]
        assert lines["quantized"][1] == "kB"
        assert float(lines["quantized"][0]) == pytest.approx(written / 1000, rel=0.01)  # headers come on top

    def test_existing_output_stays(self, tiny_model: Path, out: Path) -> None:
        before = content(out)
        succeed("quantize", tiny_model, out, "--bpw", 5, *TEXT, "--dry-run")
        assert content(out) == before


class TestStageByStage:
    def test_all_commands_in_turn(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        measurement, plan = tmp_path / "m.safetensors", tmp_path / "plan.json"
        assert "14 linears measured" in succeed("measure", tiny_model, "-o", measurement, *TEXT)
        kept = measurement_of(finished)
        alone, within = Measurement.load(measurement), Measurement.load(kept)
        one, other = exl2_curves(alone), exl2_curves(within)
        for linear in (*alone.linears, alone.head):
            assert np.array_equal(one.damage_nats(linear.name), other.damage_nats(linear.name))
        assert set(within.curves) == {"exl2"}  # a run measures for its own format only

        printed = succeed("plan", measurement, "--bpw", 4.5, "-o", plan)
        made = load_plan(plan)
        assert f"{made.bpw:.4f} bpw, at most" in printed
        assert all(p.name in printed for p in made.linears)

        out = tmp_path / "out"
        quantize(tiny_model, out, 4.5, "-m", measurement)
        # The manifest names the measurement behind the model, and this one holds more.
        ours, before = ({k: v for k, v in content(x).items() if k != "bpwise.json"} for x in (out, finished))
        assert ours == before
        assert made.bpw == pytest.approx(decoder_bpw(out))

        assert "15 quantized and 6 other tensors" in succeed("verify", out)

        dense = tmp_path / "dense"
        succeed("dequantize", out, dense)
        succeed("eval", tiny_model, out, "-r", 2, "-l", 32, "-o", tmp_path / "a", "--device", "cpu")
        succeed("eval", tiny_model, dense, "-r", 2, "-l", 32, "-o", tmp_path / "b", "--device", "cpu")
        one, other = comparison(tmp_path / "a"), comparison(tmp_path / "b")
        # The same weights by way of codes and by way of a plain checkpoint, which has embedding and norms in float16.
        for key in ("kl_nats", "quantized_perplexity"):
            assert one["summary"][key]["value"] == pytest.approx(other["summary"][key]["value"], rel=0.01)
        assert one["summary"]["kl_nats"]["value"] > one["floor_nats"]
        # And the evaluation that quantize made of itself.
        assert comparison(finished)["summary"] == one["summary"]

        # Transformers loads the dense model, and it is near the original.
        ids = torch.arange(200).view(4, 50)
        with torch.no_grad():
            logits, original = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits
                for path in (dense, tiny_model)
            )
        divergence = torch.nn.functional.kl_div(
            logits.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="none"
        )
        assert float(divergence.sum(dim=-1).mean()) < 1

    def test_plan_goes_beside_the_measurement(self, out: Path) -> None:
        work = out.with_name("out.work")
        succeed("plan", work / "measurement.safetensors", "--bpw", 5.25)
        assert load_plan(work / "plan-5.25.json").target_bpw == 5.25

    def test_one_measurement_serves_other_sizes(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bpwise.quantize.measuring.measure_checkpoint", lambda *_: pytest.fail("was done again"))
        measurement = measurement_of(finished)
        quantize(tiny_model, tmp_path / "out", 6.0, "-m", measurement, "--head-bits", 16, "--no-eval")
        assert 6.0 - 0.02 < decoder_bpw(tmp_path / "out") <= 6.0
        stored = load_file(tmp_path / "out" / "output.safetensors")
        assert stored["lm_head.weight"].dtype == torch.float16

    def test_a_measurement_has_its_own_range_of_sizes(self, tiny_model: Path, tmp_path: Path) -> None:
        measurement = tmp_path / "m.safetensors"
        succeed("measure", tiny_model, "-o", measurement, *TEXT, "--formats", "exl2", "--group-size", 64)
        lowest, _ = exl2_bpw_range(Measurement.load(measurement))  # below that of the default groups of 32
        quantize(tiny_model, tmp_path / "out", lowest + 0.001, "-m", measurement, "--no-eval")
        assert decoder_bpw(tmp_path / "out") == pytest.approx(lowest, abs=0.002)

    @pytest.mark.parametrize(
        "option", [("--rows", 4), ("--group-size", 64), ("-c", "text.txt"), ("--seed", 1), ("--damping", 0.1)]
    )
    def test_calibration_options_beside_a_measurement(
        self, tiny_model: Path, finished: Path, tmp_path: Path, option: tuple[object, ...]
    ) -> None:
        result = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *reused(finished), *option)
        assert result.exit_code == 2
        assert "no effect with --measurement" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_dry_run_knows_how_the_measurement_was_made(self, tiny_model: Path, tmp_path: Path) -> None:
        measurement = tmp_path / "m.safetensors"
        succeed("measure", tiny_model, "-o", measurement, *TEXT, "--formats", "exl2", "--group-size", 64)
        lowest, _ = exl2_bpw_range(Measurement.load(measurement))  # below that of the default groups of 32
        printed = succeed(
            "quantize", tiny_model, tmp_path / "out", "--bpw", lowest + 0.01, "-m", measurement, "--dry-run"
        )
        assert f"{math.ceil(lowest * 10_000) / 10_000:10.4f} to" in printed

    @pytest.mark.parametrize("option", ["-m", "-c"], ids=["measurement", "saved-rows"])
    def test_a_dry_run_forecasts_the_run_that_is_asked_for(
        self, option: str, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[MeasureConfig, tuple[int, int]]] = []
        forecast = checks.forecast_run

        def remembered(conversion: Any, target: Any, config: MeasureConfig, **settings: Any) -> Any:
            asked.append((config, settings["rows_shape"]))
            return forecast(conversion, target, config, **settings)

        monkeypatch.setattr(checks, "forecast_run", remembered)
        file = finished.with_name("out.work") / f"{'measurement' if option == '-m' else 'calibration'}.safetensors"
        folder = tmp_path / "files"
        succeed(
            *("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, option, file),
            *("--offload-dir", folder, "--device", "cpu", "--dry-run"),
        )
        ((config, rows_shape),) = asked
        assert rows_shape == (8, 32)  # as TEXT has it
        assert (config.offload_dir, config.device) == (folder, "cpu")
        assert list(tmp_path.iterdir()) == []

    def test_a_dry_run_with_a_measurement_of_another_model(
        self, save_model: Any, finished: Path, tmp_path: Path
    ) -> None:
        other = save_model(tmp_path / "other", seed=1)
        measurement = measurement_of(finished)
        message = refused("quantize", other, tmp_path / "out", "--bpw", 4.5, "-m", measurement, "--dry-run")
        assert "belongs to another model" in message

    def test_rows_are_as_long_as_a_short_context(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        # Of 128 tokens, where 1024 are the default.
        shorter = "rows have 128 tokens instead of 1024: the model's context is no longer"
        command = (
            "measure",
            tiny_model,
            "-o",
            tmp_path / "m.safetensors",
            "-r",
            1,
            "--formats",
            "exl2",
            "--device",
            "cpu",
        )
        result = bpwise(*command)
        assert result.exit_code == 0
        assert f"calibration {shorter}" in result.stderr.splitlines()
        assert Measurement.load(tmp_path / "m.safetensors").tokens.shape == (1, 128)
        result = bpwise("eval", tiny_model, finished, "-r", 1, "--device", "cpu", "-o", tmp_path / "report")
        assert result.exit_code == 0
        assert f"evaluation {shorter}" in result.stderr.splitlines()
        assert comparison(tmp_path / "report")["row_tokens"] == 128
        result = bpwise("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, "--dry-run")
        assert {f"calibration {shorter}", f"evaluation {shorter}"} <= set(result.stderr.splitlines())

    def test_saved_calibration_rows(self, tiny_model: Path, finished: Path, tmp_path: Path) -> None:
        saved = finished.with_name("out.work") / "calibration.safetensors"
        succeed("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, "--group-size", 32, "-c", saved, "--no-eval")
        assert content(tmp_path / "out") == content(finished)

    @pytest.mark.parametrize(
        ("what", "expected"),
        [
            ("out", ["EXL2 model", "15 quantized linears", "model.layers.1.mlp.down_proj", "lm_head"]),
            ("model", ["checkpoint", "model_type llama", "model.layers.1.mlp.down_proj.weight", "96"]),
            ("measurement.safetensors", ["measurement", "exl2 8", "model.layers.1.mlp.down_proj", "lm_head"]),
            ("calibration.safetensors", ["calibration set", "8 rows of 32 tokens", "essays"]),
            ("plan.json", ["EXL2 plan", "asked 4.5", "model.layers.1.mlp.down_proj", "lm_head"]),
        ],
    )
    def test_inspect(self, tiny_model: Path, finished: Path, what: str, expected: list[str]) -> None:
        path = {"out": finished, "model": tiny_model}.get(what, finished.with_name("out.work") / what)
        printed = succeed("inspect", path)
        assert printed.startswith(f"{path}: {expected[0]}")
        for word in expected:
            assert word in printed

    @pytest.mark.parametrize("name", ["words.txt", "words.json", "words.safetensors"])
    def test_inspect_refuses_the_rest(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("{}")
        assert name in refused("inspect", tmp_path / name)


class TestRefusals:
    def test_measurement_of_another_model(self, save_model: Any, finished: Path, tmp_path: Path) -> None:
        other = save_model(tmp_path / "other", seed=1)
        measurement = measurement_of(finished)
        message = refused("quantize", other, tmp_path / "out", "--bpw", 4.5, "--device", "cpu", "-m", measurement)
        assert "belongs to another model" in message
        assert not (tmp_path / "out").exists()

    def test_measurement_that_is_none(self, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").write_bytes(b"nonsense")
        message = refused(
            "quantize", tiny_model, tmp_path / "out", "-b", 4.5, "--device", "cpu", "-m", tmp_path / "m.safetensors"
        )
        assert "m.safetensors" in message

    @pytest.mark.parametrize("bpw", ["1.5", "16.5", "nan"])
    def test_size_that_makes_no_sense(self, tiny_model: Path, tmp_path: Path, bpw: str) -> None:
        message = refused("quantize", tiny_model, tmp_path / "out", "--bpw", bpw, *TEXT)
        assert "bpw" in message or f"{bpw} bits per weight cannot be reached" in message
        assert list(tmp_path.iterdir()) == []

    def test_size_out_of_range_names_the_range(self, finished: Path, tmp_path: Path) -> None:
        measurement = measurement_of(finished)
        message = refused("plan", measurement, "--bpw", 2, "-o", tmp_path / "plan.json")
        assert "2 bits per weight cannot be reached" in message
        assert not (tmp_path / "plan.json").exists()

    def test_no_model_there(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "config.json" in refused("quantize", tmp_path / "empty", tmp_path / "out", "--bpw", 4.5)

    def test_quantized_model_as_input(self, finished: Path, tmp_path: Path) -> None:
        assert "already quantized" in refused("quantize", finished, tmp_path / "out", "--bpw", 4.5, *TEXT)

    def test_unsupported_architecture(self, tiny_model: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_model, tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
        message = refused("quantize", tmp_path / "model", tmp_path / "out", "--bpw", 4.5, *TEXT)
        assert "model_type 'mamba' is not supported" in message

    @pytest.mark.parametrize(
        "part",
        [
            "model.layers.0.self_attn.q_proj.q_weight",
            "model.layers.1.mlp.down_proj.q_scale",
            "model.layers.1.mlp.up_proj.q_scale_max",
            "model.layers.0.mlp.gate_proj.q_groups",
            "model.layers.0.self_attn.k_proj.q_invperm",
            "model.norm.weight",
            "model.embed_tokens.weight",
        ],
    )
    def test_verify_finds_a_flipped_bit(self, out: Path, part: str) -> None:
        path = out / "output.safetensors"
        image = bytearray(path.read_bytes())
        header_bytes = int.from_bytes(image[:8], "little")
        first, _ = json.loads(image[8 : 8 + header_bytes])[part]["data_offsets"]
        image[8 + header_bytes + first] ^= 1
        path.write_bytes(image)
        # Either it breaks a rule of the format, or it decodes to something else than was meant.
        message = refused("verify", out)
        assert part.rpartition(".q_")[0] in message or part in message

    def test_verify_finds_a_cut_file(self, out: Path) -> None:
        path = out / "output.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert "output.safetensors" in refused("verify", out)

    def test_verify_needs_no_manifest(self, out: Path) -> None:
        (out / "bpwise.json").unlink()
        assert "no hashes to compare with" in succeed("verify", out)

    def test_dequantize_again(self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dense, other = tmp_path / "dense", shutil.copytree(finished, tmp_path / "other")
        succeed("dequantize", finished, dense)
        before = content(dense)
        with monkeypatch.context() as patch:
            patch.setattr("bpwise.convert.dense.ShardWriter", lambda *_, **__: pytest.fail("was decoded again"))
            result = bpwise("dequantize", finished, dense)
        assert result.exit_code == 0
        assert f"finished already: {dense}" in result.stderr
        assert content(dense) == before
        # Not what another model decodes to, nor what has lost a file.
        (other / "generation_config.json").write_text('{"temperature": 0.5}')
        assert "in the way" in refused("dequantize", other, dense)
        (dense / "model.safetensors").unlink()
        assert "in the way" in refused("dequantize", finished, dense)

    def test_dequantize_into_something(self, finished: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("the only copy")
        assert "in the way" in refused("dequantize", finished, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize",),
        ("quantize", "model", "out", "--bpw", "four"),
        ("quantize", "model", "out", "--bpw", "4", "--head-bits", "7"),
        ("quantize", "model", "out", "--bpw", "4", "--rows", "0"),
        ("quantize", "model", "out", "--bpw", "4", "--row-tokens", "1"),
        ("quantize", "model", "out", "--bpw", "4", "-m", "nowhere.safetensors"),
        ("quantize", "model", "out", "--bpw", "4", "--nonsense"),
        ("measure", "model"),
        ("plan", "nowhere.safetensors", "--bpw", "4"),
        ("verify", "nowhere"),
        ("dequantize", "nowhere", "out"),
        ("inspect", "nowhere"),
        ("eval", "model", "nowhere"),
        ("eval", "model"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = bpwise(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [(), *((name,) for name in sorted(cli.commands))], ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    printed = succeed(*command, "--help")
    assert "Usage: " in printed
