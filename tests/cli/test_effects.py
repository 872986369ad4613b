"""Options that have no effect beside others: one usage sentence that names them, and nothing is begun."""

from pathlib import Path

import pytest
from bpwise.cli import cli
from bpwise.cli.effects import CONFLICTS
from bpwise.convert.registry import formats
from click.testing import CliRunner, Result

EXL2 = ("quantize", "./no-model", "out", "--bpw", "4")
GGUF = ("quantize", "./no-model", "out.gguf", "--bpw", "4")
BOTH = ("quantize", "./no-model", "out", "--format", "gguf,exl2", "--bpw", "4")
TYPE = ("quantize", "./no-model", "out.gguf", "--type", "Q8_0")
MEASURE = ("measure", "./no-model", "-o", "m.safetensors")
PLAN = ("plan", __file__)
EVAL = ("eval", "./no-model", __file__)
PERPLEXITY = ("perplexity", __file__, "--kl-divergence-base", "base.kld")
HERE = str(Path(__file__).parent)


def bpwise(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "idle"),
    [
        ((*EXL2, "--no-feedback"), ["--no-feedback"]),
        ((*EXL2, "--llama-cpp", HERE, "--card"), ["--llama-cpp", "--card"]),
        ((*EXL2, "--format", "exl2", "--type", "Q8_0"), ["--type"]),
        ((*EXL2, "--context", "4k"), ["--context"]),
        ((*EXL2, "--cache-bits", "4"), ["--cache-bits"]),
        ((*EXL2, "--column", "text"), ["--column"]),
        ((*EXL2, "-c", "rows.safetensors", "--rows", "8", "-l", "64"), ["--rows", "--row-tokens"]),
        ((*EXL2, "-m", __file__, "--seed", "1", "--damping", "0.1"), ["--seed", "--damping"]),
        ((*GGUF, "--head-bits", "8"), ["--head-bits"]),
        ((*GGUF, "--no-feedback", "--effort", "high"), ["--effort"]),
        ((*TYPE, "--effort", "high"), ["--effort"]),
        ((*GGUF, "--keep-fp16", "lm_head"), ["--keep-fp16"]),
        ((*GGUF, "--shard-size", "100"), ["--shard-size"]),
        ((*GGUF, "--force"), ["--force"]),
        ((*GGUF, "--group-size", "64"), ["--group-size"]),
        ((*GGUF, "--vram", "8GB", "--cache-bits", "8"), ["--cache-bits"]),
        ((*GGUF, "--imatrix", __file__), ["--imatrix"]),
        ((*BOTH, "--imatrix", __file__), ["--imatrix"]),
        ((*BOTH, "--cache-bits", "8"), ["--cache-bits"]),
        ((*GGUF, "-m", __file__, "--no-feedback", "--no-eval", "--device", "cpu"), ["--device"]),
        ((*TYPE, "--base-model", "org/name"), ["--base-model"]),
        ((*GGUF, "--base", __file__, "--llama-cpp", HERE), ["--llama-cpp"]),
        ((*TYPE, "-c", "text.txt"), ["--calibration"]),
        ((*TYPE, "--rows", "8", "--seed", "1"), ["--rows", "--seed"]),
        ((*TYPE, "--override", "*=Q8_0", "--backend", "cpu"), ["--override", "--backend"]),
        ((*EXL2, "--backend", "cpu"), ["--backend"]),
        ((*TYPE, "-m", __file__, "--imatrix", __file__), ["--measurement"]),
        ((*TYPE, "--force-eval-text"), ["--force-eval-text"]),
        ((*TYPE, "--no-eval", "--offload-dir", "files"), ["--offload-dir"]),
        ((*MEASURE, "-c", "rows.safetensors", "--rows", "8"), ["--rows"]),
        ((*MEASURE, "--chat-template"), ["--chat-template"]),
        ((*MEASURE, "--formats", "exl2", "--llama-cpp", HERE), ["--llama-cpp"]),
        ((*MEASURE, "--formats", "gguf", "--group-size", "64"), ["--group-size"]),
        ((*MEASURE, "-c", "text.txt", "--column", "text"), ["--column"]),
        ((*EVAL, "--text", "text.txt", "--column", "text"), ["--column"]),
        ((*PLAN, "--format", "gguf", "-b", "4", "--head-bits", "8"), ["--head-bits"]),
        ((*PLAN, "--html", "page.html", "-o", "plan.json"), ["--output"]),
        ((*EVAL, "--no-cache", "--cache-dir", "cache"), ["--cache-dir"]),
        ((*EVAL, "--base", __file__), ["--base"]),
        ((*EVAL, "--column", "text"), ["--column"]),
        ((*EVAL, "--text", "text.txt", "--seed", "1"), ["--seed"]),
        ((*EVAL, "--num-fewshot", "2", "--limit", "10"), ["--num-fewshot", "--limit"]),
        ((*EVAL, "--needle-samples", "2"), ["--needle-samples"]),
        ((*EVAL, "--engine", "llama.cpp", "--prompt", "Hi", "--dtype", "float16"), ["--prompt", "--dtype"]),
        ((*EVAL, "--engine", "llama.cpp", "--tasks", "mmlu", "--no-cache"), ["--tasks", "--no-cache"]),
        (("dequantize", HERE, "out", "--original", HERE), ["--original"]),
        ((*PERPLEXITY, "--kl-divergence", "-f", "text", "-c", "512"), ["--file", "--ctx-size"]),
        ((*PERPLEXITY, "--engine", "llama.cpp", "--device", "cpu"), ["--device"]),
        (("quantize", "./no-model", "out.GGUF", "--bpw", "4", "--head-bits", "8"), ["--head-bits"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else value[0],
)
def test_refused_with_one_sentence(
    command: tuple[str, ...], idle: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bpwise(*command)
    assert result.exit_code == 2
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"Error: {' and '.join(idle)} ha")
    assert "no effect" in message
    assert result.stderr.startswith(f"Usage: cli {command[0]} ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        (*EXL2, "--no-eval", "--eval-rows", "2", "--eval-text", "text.txt"),
        (*EXL2, "--dry-run", "--seed", "1", "--work-dir", "work", "--eval-rows", "2"),
        (*EXL2, "--vram", "8GB", "--context", "4k"),
        (*EXL2, "-c", "rows.safetensors", "--seed", "1"),
        (*EXL2, "-c", "text.jsonl", "--column", "text"),
        (*EXL2, "-m", __file__, "--device", "cpu"),
        (*GGUF, "--base-model", "org/name"),
        (*PLAN, "--html", "page.html", "--cache-bits", "4"),
        ("quantize", "./no-model", "out", "--format", "gguf", "--bpw", "4,5", "--base-model", "org/name"),
        (*GGUF, "-m", __file__, "--no-eval", "--device", "cpu"),
        (*BOTH, "--head-bits", "8", "--no-feedback", "--effort", "high", "--group-size", "64", "--card"),
        (*BOTH, "-m", __file__, "--no-feedback", "--no-eval", "--device", "cpu"),
        (*GGUF, "--dry-run"),
        (*TYPE, "--imatrix", __file__, "--device", "cpu"),
        (*TYPE, "--card", "--base-model", "org/name"),
        (*TYPE, "-m", __file__),
        (*TYPE, "--work-dir", "work"),
        (*PLAN, "--format", "gguf", "--html", "page.html", "-b", "4", "--head-bits", "8"),
        (*EVAL, "--text", "text.txt", "--seed", "1", "--needle", "1k"),
        (*EVAL, "--tasks", "mmlu", "--limit", "10"),
        (*EVAL, "--engine", "llama.cpp", "--base", __file__, "--lora", HERE),
    ],
    ids=" ".join,
)
def test_taken_where_they_have_one(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is wrong with these commands otherwise, it is not that.
    monkeypatch.chdir(tmp_path)
    assert "no effect" not in bpwise(*command).output


def test_the_table_names_options_that_there_are() -> None:
    tables = [CONFLICTS, *(each.conflicts for each in formats().values())]
    for name, conflicts in (pair for table in tables for pair in table.items()):
        known = {each.name for each in cli.commands[name].params}
        assert {option for conflict in conflicts for option in conflict.options} <= known


def test_an_output_named_as_a_file_is_no_directory() -> None:
    result = bpwise("quantize", "./no-model", "out.GGUF", "--format", "exl2", "--bpw", "4")
    assert result.exit_code == 2
    assert "out.GGUF is the name of a GGUF file" in result.stderr
