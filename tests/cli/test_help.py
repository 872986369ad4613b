"""Help: options under headings, examples; completion in shells."""

import re

import pytest
from bpwise.cli import cli
from bpwise.cli.group import HELP
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete
from click.testing import CliRunner


def headings(command: str) -> dict[str, set[str]]:
    """The flags under each heading of a command's help."""
    text = CliRunner().invoke(cli, [command, "--help"], terminal_width=200).output
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z]\w+((,| and) \w+)*:", line):
            found[line[:-1]] = set()
        elif found and re.match(r"  -", line):
            found[list(found)[-1]] |= set(re.findall(r"--[a-z0-9-]+", line.split("  ")[1]))
    return found


def test_quantize_has_its_options_under_headings() -> None:
    found = headings("quantize")
    assert {"--bpw", "--max-size", "--vram", "--context"} <= found["Target"]
    assert {"--type", "--imatrix", "--no-feedback"} <= found["GGUF"]
    assert {"--head-bits", "--keep-fp16"} <= found["EXL2"]
    assert "--override" in found["EXL2, GGUF and MLX"]
    assert {"--calibration", "--rows", "--damping"} <= found["Calibration"]
    assert {"--eval-text", "--no-eval"} <= found["Evaluation"]
    assert {"--device", "--work-dir", "--wait-for-space"} <= found["Machine"]
    assert {"--measurement", "--dry-run", "--help"} <= found["Options"]


def test_eval_has_its_own_rows_under_evaluation() -> None:
    found = headings("eval")
    assert {"--rows", "--row-tokens", "--text"} <= found["Evaluation"]
    assert {"--tasks", "--needle"} <= found["Benchmarks"]


@pytest.mark.parametrize("command", HELP)
def test_sections_name_options_that_there_are(command: str) -> None:
    known = {parameter.name for parameter in cli.commands[command].params}
    assert {name for names in HELP[command].sections.values() for name in names} <= known


@pytest.mark.parametrize("command", ["quantize", "measure", "eval"])
def test_three_examples(command: str) -> None:
    lines = CliRunner().invoke(cli, [command, "--help"], terminal_width=80).output.splitlines()
    assert lines[-4:] == ["Examples:", *(f"  {line}" for line in HELP[command].examples)]


def test_completion() -> None:
    complete = ShellComplete(cli, {}, "bpwise", "_BPWISE_COMPLETE")
    assert [each.value for each in complete.get_completions([], "quan")] == ["quantize"]
    assert "--bpw" in {each.value for each in complete.get_completions(["quantize"], "--b")}
    assert {each.value for each in complete.get_completions(["quantize", "--format"], "")} == {"exl2", "gguf", "mlx"}
    assert [each.type for each in complete.get_completions(["eval", "org/name"], "m")] == ["file"]
    for shell, name in ((BashComplete, "bash"), (ZshComplete, "zsh"), (FishComplete, "fish")):
        assert f"_BPWISE_COMPLETE={name}_complete" in shell(cli, {}, "bpwise", "_BPWISE_COMPLETE").source_template % {
            "complete_var": "_BPWISE_COMPLETE",
            "complete_func": "f",
            "prog_name": "bpwise",
        }
