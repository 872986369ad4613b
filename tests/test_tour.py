"""The commands of docs/tour.md, `make demo` among them, are run one after the other, as they stand.

A tiny model stands in for SmolLM2. Its context is 64 tokens, so all text is that short.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpwise
import pytest
from bpwise.cli import cli
from bpwise.convert.opening import verify_model
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from .tiny_models import randomize

ROOT = Path(bpwise.__file__).parent

Run = Callable[[str], str]


@pytest.fixture
def run(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line, the first one in an empty directory, and returns what it prints."""

    def save(output: Path, *_: object, off_grid_seed: int | None, **_named: object) -> None:
        # What the script of the demo calls, without the download. K types need rows of 256 weights.
        assert off_grid_seed is not None
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
        config = AutoConfig.from_pretrained(converted["llama3"].directory, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model, 0)
        model.save_pretrained(output)
        shutil.copy(converted["llama3"].directory / "tokenizer.model", output)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("from_gguf.save_checkpoint", save)

    def run(line: str) -> str:
        program, *words = shlex.split(line)
        if program == "make":
            return "".join(map(run, recipe(*words)))
        if program in (".", "echo", "rm"):
            return ""
        if program == "cat":
            return Path(words[0]).read_text(encoding="utf-8")
        if program == "cd":
            monkeypatch.chdir(words[0])
            return ""
        if program == "mkdir":
            Path(words[-1]).mkdir(parents=True)
            return ""
        command = runpy.run_path(str(ROOT / words.pop(0)))["main"] if program == "python" else cli
        result = CliRunner().invoke(command, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result.output

    return run


def recipe(target: str) -> list[str]:
    """Return what make would run of a target, beyond setting up the virtual environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--always-make", target]
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return said.partition("touch .venv/installed\n")[2].replace(".venv/bin/", "").splitlines()


def recorded() -> list[tuple[str, list[str]]]:
    """Return the tour's commands, each with the lines that it printed."""
    steps: list[tuple[str, list[str]]] = []
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```console\n(.*?)^```", tour, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line.removeprefix("$ "), []))
            else:
                steps[-1][1].append(line)
    return steps


# What a tiny model changes: numbers and units, types, which model is better, and by how much.
VERDICT = "indistinguishable in use|close to the original|noticeably different from the original|badly damaged|damaged"
MASKS = (
    (r"\b\d+ (I?Q\d\w*|MXFP4|F16|F32)(, (?=\d))?", ""),
    (r"\d[\d.]*(e-?\d+)?", "N"),
    (r"N (bytes|[kMG]B)", "N B"),
    (VERDICT, "VERDICT"),
    (r"Closest to the original: \S+\.|Smallest that is good enough: \S+\.", "BEST."),
    (r" \S+ is larger than \S+, and worse\.", ""),
    (r"[\w./-]+\.gguf", "FILE"),
    (r"\s+", " "),
)


def masked(line: str) -> str:
    """Return a line of what a command prints as it is for any model."""
    for pattern, mask in MASKS:
        line = re.sub(pattern, mask, line)
    return line.strip()


@pytest.mark.parametrize(
    ("line", "other", "same"),
    [
        ("size 93.5 MB, 34.8% of it", "size  9.1 kB, 134% of it", True),
        ("types: 148 IQ4_NL, 5 Q5_1, 77.5 MB", "types: 3 F32, 1.2 kB", True),
        ("7.99  134.5 MB  0.0018  plan-8.json", "7.90  1.2 kB  1e-05  plan-8.json", True),
        ("a.gguf: damaged. 3 of 100.", "b/c.gguf: close to the original. 9 of 100.", True),
        ("output x", "outputs x", False),
        ("20 linears measured", "20 tensors measured", False),
    ],
)
def test_masks(line: str, other: str, same: bool) -> None:
    assert (masked(line) == masked(other)) is same


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_tour(run: Run) -> None:
    printed = ""
    for line, shown in recorded():
        printed = run(line)
        echoed = recipe(line.removeprefix("make ")) if line.startswith("make ") else []
        lines = map(masked, [*echoed, *printed.splitlines()])
        for each in shown:
            expected = masked(each.replace(".venv/bin/", ""))
            assert each == "..." or expected in lines, f"{line}\n{expected}\n{printed}"

    # `make demo` made both formats from one measurement.
    for name in ("SmolLM2-135M-4.5bpw.gguf", "SmolLM2-135M-8.0bpw-8hb-exl2"):
        assert verify_model(Path("demo", name)).compared

    # One command made four sizes in both formats, each with a card, and a report over all.
    repository = Path("repository")
    base, rates = "SmolLM2-135M-Instruct-off-grid", ["4.0", "5.0", "6.0", "8.0"]
    files, folders = sorted(repository.glob("*.gguf")), sorted(repository.glob("*-exl2"))
    assert [re.findall(f"^{base}-(...)bpw-", path.name) for path in files] == [[rate] for rate in rates]
    assert [path.name for path in folders] == [f"{base}-{rate}bpw-6hb-exl2" for rate in rates]
    page = (repository / "report.html").read_text(encoding="utf-8")
    for path in (*files, *folders):
        card = path / "README.md" if path.is_dir() else path.with_suffix(".README.md")
        assert card.read_text(encoding="utf-8").startswith("---\n")
        assert verify_model(path).compared
        assert path.name in page

    # The last command says where they would go: all files into one repository with a front page.
    assert len(re.findall(r"^  README\.md  \S+ kB, the front page$", printed, re.MULTILINE)) == 1
    repositories = set(re.findall(r"https://huggingface\.co/(\S+):", printed))
    assert repositories == {f"MYNAME/{base}-GGUF", *(f"MYNAME/{path.name}" for path in folders)}
    assert Path("plans.html").is_file()
