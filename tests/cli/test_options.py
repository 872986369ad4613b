import ast
from pathlib import Path

import bpwise
import pytest
from bpwise.cli import cli
from bpwise.cli.options import LENGTHS, SIZE, TOKENS
from click.testing import CliRunner

FILES = sorted((Path(bpwise.__file__).parent / "cli").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_types_are_those_of_the_oldest_click(path: Path) -> None:
    # click.ParamType is generic from 8.4 on, and pyproject.toml allows 8.1: ``ParamType[int]`` fails there at import.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert not any(isinstance(base, ast.Subscript) for base in node.bases), f"{path}: {node.name}"


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
