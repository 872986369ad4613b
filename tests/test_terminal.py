"""What strangers can put before a terminal: names of tensors, marks, metadata. Nothing of it may act there."""

import ast
import errno
import json
import logging
import struct
import threading
from pathlib import Path
from typing import Any

import bpwise
import pytest
import torch
from bpwise.cli import cli, output
from bpwise.cli.output import RunBar, progress_bar
from bpwise.convert.exl2.file.layout import RowGroup
from bpwise.convert.exl2.file.linear import QuantizedLinear
from bpwise.convert.exl2.file.store import linear_tensors
from bpwise.progress import ExpectedPart, RunForecast, TimeLeft
from click.testing import CliRunner, Result
from safetensors.torch import save_file

EVIL = "\x1b[2J\x1b]0;owned\x07a\u202eb\rc\nd\x9b\u2028"
LONG = "y" * 100_000


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    for stream in (result.stdout, result.stderr):
        assert all(line.isprintable() for line in stream.split("\n"))
        assert max(map(len, stream.split("\n"))) <= 2010  # "Error: " included
    return result


def checkpoint(directory: Path, *names: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": f"llama{EVIL}", "tie_word_embeddings": False}))
    tensors = {name: torch.zeros(1) for name in names}
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_names_of_tensors(tmp_path: Path) -> None:
    result = run("inspect", checkpoint(tmp_path / "m", EVIL, LONG, "plain"))
    assert result.exit_code == 0
    lines = result.stdout.rstrip("\n").split("\n")
    assert len(lines) == 1 + 2 + 1 + 3  # the kind, facts, the header, tensors
    assert lines[4].startswith(r"\x1b[2J\x1b]0;owned\x07a\u202eb\rc d\x9b\u2028 ")
    assert any(line.startswith("plain ") for line in lines)
    assert max(map(len, lines[3:])) < 300


def test_names_in_messages(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "m", "a")
    header = json.dumps({EVIL + LONG: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    result = run("inspect", directory)
    assert result.exit_code == 1
    assert "unknown dtype. Got 'F99'" in result.stderr


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "m", "a")
    header = b'{"\\ud83d": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    result = run("inspect", directory)
    assert result.exit_code == 1
    assert "names a tensor in invalid Unicode" in result.stderr


@pytest.fixture
def exl2(tmp_path: Path) -> Path:
    directory = tmp_path / "exl2"
    directory.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": EVIL + LONG}}
    (directory / "config.json").write_text(json.dumps(config))
    linear = QuantizedLinear(
        groups=(RowGroup(4, 32),),
        codes=torch.zeros(32, 32, dtype=torch.uint8),
        scale_codes=torch.zeros(1, 32, dtype=torch.uint8),
        max_scales=torch.ones(1, dtype=torch.float16),
        order=torch.arange(32),
    )
    save_file(linear_tensors(f"model.{EVIL}.weird", linear), directory / "output.safetensors")
    return directory


@pytest.mark.parametrize("text", [EVIL, "# Broken: do not use this model\n\n" + EVIL, LONG, EVIL * 100_000])
def test_marks(exl2: Path, text: str) -> None:
    (exl2 / "BROKEN.md").write_bytes(text.encode() + b"\xff\xfe")
    result = run("verify", exl2)
    assert result.exit_code == 0
    assert "is marked as broken" in result.stderr
    result = run("push", exl2, "org/name", "--dry-run")
    assert result.exit_code == 1
    assert "it is marked as broken" in result.stderr
    assert run("card", exl2).exit_code == 1


def test_an_exl2_model(exl2: Path) -> None:
    result = run("inspect", exl2)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n").split("\n")[-1].startswith(r"model.\x1b[2J")


@pytest.mark.parametrize("terminal", [True, False])
def test_labels_of_progress_bars(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert list(progress_bar([1, 2], EVIL + LONG)) == [1, 2]
    shown = capsys.readouterr().err
    assert r"\x1b[2J" in shown
    assert "\x1b]" not in shown
    assert len(shown) < 3000


def test_a_log_gets_a_line_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr("bpwise.cli.output.time.monotonic", lambda: seconds)
    for _ in progress_bar(range(10), "measure: forward"):
        seconds += 14
    assert capsys.readouterr().err.splitlines() == [
        "measure: forward: 3 of 10, 01:38 left",
        "measure: forward: 6 of 10, 00:56 left",
        "measure: forward: 9 of 10, 00:14 left",
        "measure: forward: 10 in 02:20",
    ]


def test_a_log_gets_its_lines_while_one_item_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    def say(line: str, *, err: bool) -> None:
        print_line(line, err=err)
        told.set()

    print_line = output.say
    monkeypatch.setattr(output, "say", say)
    monkeypatch.setattr(output, "_LINE_SECONDS", 0.01)
    for _ in progress_bar(range(1), "convert"):
        assert told.wait(30)
    lines = capsys.readouterr().err.splitlines()
    assert {*lines[:-1]} == {"convert: 0 of 1"}
    assert lines[-1].startswith("convert: 1 in ")
    for thread in threading.enumerate():
        if thread.name == "bpwise progress":
            thread.join(30)
            assert not thread.is_alive()


def test_a_log_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("click.echo", full)
    assert list(progress_bar([1, 2], "measure")) == [1, 2]
    with pytest.raises(OSError, match="No space"):  # a result that is lost is an error
        output.say("result")


def test_a_log_counts_down_the_whole_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr("bpwise.cli.output.time.monotonic", lambda: seconds)
    monkeypatch.setattr("bpwise.cli.output.TimeLeft", lambda parts: TimeLeft(parts, lambda: seconds))
    bar = RunBar()
    parts = [("measure", "measure: forward", 140.0), ("round", "quantize: round", 60.0)]
    expected = tuple(ExpectedPart(step=step, label=label, seconds=each) for step, label, each in parts)
    bar.expect(RunForecast(parts=expected, memory_bytes=5 << 20, disk_bytes=3 << 20))
    for _ in bar(range(10), "measure: forward"):
        seconds += 14
    for _ in bar(range(2), "quantize: round"):
        seconds += 60  # twice what was expected
    assert capsys.readouterr().err.splitlines() == [
        "expected    3.3 min (measure 2.3 min, round 1.0 min), "
        "at most 5.2 MB of memory and 3.1 MB in the work directory, roughly",
        "[1/2 measure] forward: 3 of 10, 02:38 left of the run",
        "[1/2 measure] forward: 6 of 10, 01:56 left of the run",
        "[1/2 measure] forward: 9 of 10, 01:14 left of the run",
        "[1/2 measure] forward: 10 in 02:20",
        "[2/2 round] round: 1 of 2, 00:59 left of the run",
        "[2/2 round] round: 2 in 02:00",
    ]


def test_a_bar_counts_down_the_whole_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = RunBar()
    bar.expect(RunForecast(parts=(ExpectedPart(step="measure", label="other", seconds=3700.0),)))
    assert list(bar([1, 2], "measure: forward")) == [1, 2]
    shown = capsys.readouterr().err
    assert shown.startswith("expected    61.7 min (measure 61.7 min), roughly\n")
    assert "[1/1 measure] forward:   0%" in shown
    assert "1:01:40 left of the run]" in shown


def test_quiet_commands_show_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunBar()
    with output.logged(logging.WARNING):
        bar.expect(RunForecast(parts=(ExpectedPart(step="measure", label="measure: forward", seconds=1.0),)))
        assert list(bar([1, 2], "measure: forward")) == [1, 2]
        logging.getLogger("bpwise.any").info("begins")
        output.note("note")
        output.say("a warning", err=True)
    assert capsys.readouterr().err == "a warning\n"


def test_what_the_library_logs(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("bpwise.any")
    for level, expected in ((logging.INFO, ["begins"]), (logging.DEBUG, ["begins", r"decides \x1b[2J"])):
        with output.logged(level):
            log.info("begins")
            log.debug("decides %s", EVIL)
        lines = capsys.readouterr().err.splitlines()
        assert [line[:15] for line in lines] == [each[:15] for each in expected]
    log.info("no command runs")
    assert capsys.readouterr().err == ""


def test_commands_print_through_one_function() -> None:
    found: list[Any] = []
    for path in sorted((Path(bpwise.__file__).parent / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in ("echo", "secho", "write", "print_")
            # One writes a file, the other a help text.
            if named and ast.unparse(node) not in ("export.write", "formatter.write"):
                found.append((path.name, node.attr))
    assert found == [("output.py", "echo")]
