"""What a run says: a line at the start, how far an earlier run came, a total; less and more with -q and -v."""

import re
from pathlib import Path

import pytest

from ..quantize.runs import EVALUATION, TEXT, bpwise
from ..quantize.test_times import MEASURE, told


def test_a_run_from_its_start_to_its_end(tiny_model: Path, tmp_path: Path) -> None:
    command = ("quantize", tiny_model, tmp_path / "out", "--bpw", "4.5", *TEXT, *EVALUATION)
    result = bpwise(*command)
    first, expected, *steps = result.stderr.splitlines()
    made = rf"-> {tmp_path}/out \(EXL2, 4.5 bits per weight\), on cpu"
    assert re.fullmatch(rf"tiny \(llama, 2 blocks, [0-9.]+ million parameters\) {made}", first)
    assert expected.startswith("expected    ")
    assert steps and all(re.match(r"\[[1-4]/4 (measure|round|write|evaluate)\] ", line) for line in steps), steps
    total = result.stdout.splitlines()[-2]
    assert re.fullmatch(r"total       \d+\.\d min; [0-9.]+% of the original's size: [a-z ]+", total)


def test_quiet_and_verbose(tiny_model: Path, tmp_path: Path) -> None:
    measure = ("measure", tiny_model, "--formats", "exl2", *TEXT, "-o")
    assert bpwise(*measure, tmp_path / "m.safetensors", "-q").stderr == ""
    before = (tmp_path / "m.safetensors").stat().st_mtime_ns
    again = bpwise(*measure, tmp_path / "m.safetensors")
    assert f"finished already: {tmp_path}/m.safetensors holds what this command makes" in again.stderr.splitlines()
    assert (tmp_path / "m.safetensors").stat().st_mtime_ns == before
    lines = bpwise(*measure, tmp_path / "n.safetensors", "--verbose").stderr.splitlines()
    assert f"original: {tiny_model}, config.json and model.safetensors" in lines
    assert any(line.startswith("calibration text: ") for line in lines)
    dampings = [line for line in lines if line.startswith("damping ") and "layers.1.self_attn.q_proj" in line]
    assert len(dampings) == 1
    result = bpwise("verify", tmp_path, "-q", "-v")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


@pytest.mark.parametrize(
    ("stage", "after", "said"),
    [
        ("measure: backward, curves", 1, "resuming: 1 of 2 blocks measured"),
        ("quantize: round", 1, "resuming: 1 of 2 blocks rounded for out"),
    ],
)
def test_a_run_that_resumes(stage: str, after: int, said: str, tiny_model: Path, tmp_path: Path) -> None:
    told(tiny_model, tmp_path / "out", stage=stage, after=after)
    rows = MEASURE.calibration.rows
    command = ("quantize", tiny_model, tmp_path / "out", "--bpw", "4.5", "--rows", rows, "--row-tokens", 32)
    lines = bpwise(*command, "--device", "cpu", "--no-eval").stderr.splitlines()
    assert said in lines
    assert ("resuming: the model is measured" in lines) is (stage == "quantize: round")
