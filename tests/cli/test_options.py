import re
from pathlib import Path

import pytest
from bpwise.cli import cli
from bpwise.cli.types import LENGTHS, SIZE, TOKENS
from bpwise.convert.options import options_of
from bpwise.convert.registry import formats
from click.testing import CliRunner


def test_numbers_have_their_units() -> None:
    assert [SIZE.convert(text, None, None) for text in ("7", "1.5kB", "2 KiB", "0.25GiB")] == [7, 1500, 2048, 2**28]
    assert [TOKENS.convert(text, None, None) for text in ("32768", "32k")] == [32768, 32768]
    assert LENGTHS.convert("1k,4096", None, None) == (1024, 4096)


@pytest.mark.parametrize("digits", [19, 400, 5000])  # Python itself reads no more than 4300
@pytest.mark.parametrize(
    ("option", "command", "problem"),
    [
        ("--max-size", "quantize", "is not a valid size. Use 5GB, 700MiB or a number of bytes."),
        ("--context", "quantize", "is not a valid number of tokens. Use 32768 or 32k."),
        ("--needle", "eval", "is not a valid list of lengths. Use 1k,4k,16k"),
    ],
)
def test_numbers_of_too_many_digits_are_refused(option: str, command: str, problem: str, digits: int) -> None:
    result = CliRunner().invoke(cli, [command, option, "9" * digits], catch_exceptions=False)
    assert result.exit_code == 2
    assert problem in result.stderr


def test_what_is_no_bitrate_is_refused() -> None:
    result = CliRunner().invoke(cli, ["quantize", "--bpw", "x"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "'x' is not a valid bitrate. Use 4.5, or several as 8.0,6.0,4.5." in result.stderr


DEFAULTS = {
    "--format": "what OUTPUT's name, --type or --size-of implies, else exl2",
    "--head-bits": "6",
    "--override": None,
    "--keep-fp16": None,
    "--effort": "normal",
    "--cache-bits": "16",
    "--group-size": "32",
    "--shard-size": "8192 | 5120",
    "--force": None,
    "--no-feedback": None,
    "--type": None,
    "--imatrix": None,
    "--llama-cpp": "fetched from PyPI",
    "--backend": None,
    "--base": None,
    "--split-max-size": "48GB",
    "--card": None,
}


def test_help_shows_the_defaults_of_formats_options() -> None:
    text = CliRunner().invoke(cli, ["quantize", "--help"], terminal_width=200).output
    # An option goes from its flags to those of the next, which stand two columns from the left.
    options = [" ".join(each.split()) for each in re.split(r"\n  (?=-)", text)]
    declared = [each for form in formats().values() for each in options_of(form.Options, "quantize").values()]
    assert {*(each.flags[-1] for each in declared), "--format"} == set(DEFAULTS)
    for flag, default in DEFAULTS.items():
        (option,) = (each for each in options if re.match(rf"(-\w+, )?{flag} ", each))
        assert re.findall(r"\[default: ([^]]*)\]", option) == ([] if default is None else default.split(" | ")), option


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["out", "-b", "4", "--max-size", "1GB"],
            "give only one of --bpw, --max-size, --vram and --size-of.",
        ),
        (["-b", "4,5"], "several sizes make several models. Name a folder for them: OUTPUT."),
        (["out.gguf", "-b", "4", "--type", "Q8_0"], "Leave out --bpw, --max-size, --vram and --size-of."),
        (["out.gguf", "-b", "4,5"], "several sizes make several models. Name a folder, and add --format gguf."),
        (["out.gguf", "-b", "4", "--format", "exl2"], "out.gguf is the name of a GGUF file"),
        (
            ["out", "--format", "gguf,exl2"],
            "several formats need a size. Give one of --bpw, --max-size, --vram and --size-of.",
        ),
        (["--format", "gguf,exl2", "-b", "4"], "several formats make several models. Name a folder for them"),
        (["out.gguf", "--format", "gguf,exl2", "-b", "4"], "Name a folder, and add --format gguf,exl2."),
        (
            ["out", "--format", "gguf,exl2", "-b", "4", "--override", "x=6"],
            "--override means different things for GGUF",
        ),
        (["out", "--format", "gguf,exl2", "--type", "Q8_0"], "these options determine a single output"),
        (["out", "--size-of", "Q4_K_M", "-b", "4"], "give only one of"),
        (["out", "--size-of", "Q4_K_M", "--format", "gguf,exl2"], "--size-of does not work for EXL2. Use --bpw."),
        (["out", "--size-of", "Q4_K_X"], "'Q4_K_X' is not a valid list of names. Expected one or more of"),
        (["out.gguf", "--size-of", "Q4_K_M,q6_k"], "several sizes make several models. Name a folder"),
        (["out", "--format", "gguf,awq", "-b", "4"], "Expected one or more of exl2, gguf, mlx, separated by commas."),
    ],
)
def test_usage_is_checked_before_a_model_is_looked_for(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(cli, ["quantize", "./no-model", *arguments], catch_exceptions=False)
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize("name", ["out.ggu", "out.guff", "out.ggfu", "OUT.GUF", "dir/out.gguff"])
@pytest.mark.parametrize("options", [(), ("--format", "gguf"), ("--bpw", "4,5"), ("--no-feedback",)], ids=" ".join)
def test_a_slip_in_the_ending_is_asked_about(name: str, options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, ["quantize", "./no-model", name, *options], catch_exceptions=False)
    assert result.exit_code == 2
    assert f"{name} ends in {Path(name).suffix}. Did you mean .gguf?" in result.stderr


@pytest.mark.parametrize("name", ["out.ggml", "out.exl2", "Llama-3.2-1B", "out.g", "a.gguf.old"])
def test_other_endings_mean_nothing(name: str) -> None:
    for options in ((), ("--format", "gguf")):
        result = CliRunner().invoke(cli, ["quantize", "./no-model", name, *options], catch_exceptions=False)
        assert "./no-model" in result.stderr  # which is looked for now


def test_who_chooses_the_format_may_name_an_output_as_they_like() -> None:
    command = ["quantize", "./no-model", "out.ggu", "--format", "exl2"]
    assert "./no-model" in CliRunner().invoke(cli, command, catch_exceptions=False).stderr
