"""The example that quantizes to several bitrates, run as a user runs it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantize.py"


@pytest.fixture
def main() -> click.Command:
    spec = importlib.util.spec_from_file_location("quantize_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_several_bitrates_from_one_measurement(
    main: click.Command, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [str(make_model("m")), str(output), "--bpw", "6.5,4.5", "--rows", "4", "--row-tokens", "64"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    sizes = [float(line.split()[0]) for line in result.stdout.splitlines()]
    damages = [float(line.split()[-2]) for line in result.stdout.splitlines()]
    assert 6.0 < sizes[0] <= 6.5
    assert 4.0 < sizes[1] <= 4.5
    assert damages[0] < damages[1]
    assert (tmp_path / "out.work" / "measure" / "measurement.safetensors").is_file()
    assert (output / "m-6.5bpw-6hb-exl2" / "output.safetensors").is_file()
    assert (output / "m-4.5bpw-6hb-exl2" / "report.md").is_file()
    assert (output / "report.md").is_file()


def test_errors_are_messages(main: click.Command, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "absent"), str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 1
    assert "Error: " in result.stderr
