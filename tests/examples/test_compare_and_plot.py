"""The example that plots reports, run as a user runs it."""

import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner, Result

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_and_plot.py"


@pytest.fixture
def main() -> click.Command:
    spec = importlib.util.spec_from_file_location("compare_and_plot", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(main: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def report(path: Path, name: str, size: int, kl: float, text: str = "t") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison = {
        "original": {"fingerprint": "o"},
        "quantized": {"name": name, "stored_bytes": size},
        "summary": {"kl_nats": {"value": kl, "standard_error": None if size == 3 else kl / 10}},
        "text_fingerprint": text,
        "engine": "Transformers",
    }
    path.write_text(json.dumps({"comparison": comparison}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report(tmp_path / "out" / "a-8.0bpw" / "report.json", "a-8.0bpw", 8_000_000, 0.001)
    report(tmp_path / "out" / "a-4.0bpw" / "report.json", "a-4.0bpw", 4_000_000, 0.05)
    report(tmp_path / "out" / "a-4.5bpw.report.json", "a-4.5bpw.gguf", 4_500_000, 0.03)
    (tmp_path / "out" / "report.json").write_text(json.dumps({"bpwise_series": 1, "outputs": []}))
    return tmp_path / "out"


def test_table_and_plot(main: click.Command, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot = tmp_path / "plot.svg"
    result = run(main, folder, "-o", plot)
    assert result.exit_code == 0, result.output
    names = [line.split()[-1] for line in result.stdout.splitlines() if "nats/token" in line]
    assert names == ["a-4.0bpw", "a-4.5bpw.gguf", "a-8.0bpw"]
    text = plot.read_text()
    ElementTree.fromstring(text)
    for name in names:
        assert name in text  # as a comment beside the outlines of its letters


def test_nothing_found(main: click.Command, tmp_path: Path) -> None:
    result = run(main, tmp_path)
    assert result.exit_code == 1
    assert "no report" in result.stderr


def test_different_texts_are_not_compared(main: click.Command, folder: Path) -> None:
    report(folder / "b" / "report.json", "b", 5, 0.1, text="other")
    result = run(main, folder)
    assert result.exit_code == 1
    assert "different" in result.stderr
