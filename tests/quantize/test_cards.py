"""The card that a run writes, and that `bpwise card` writes again."""

import json
import shutil
from pathlib import Path

import pytest
from bpwise.convert.exl2.card import exl2_name
from bpwise.convert.names import convention_name
from bpwise.eval.publishing.mark import mark_broken
from huggingface_hub import ModelCard

from .runs import TEXT, bpwise

OPTIONS = ("--bpw", "4.5", *TEXT, "--eval-rows", "2")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("m") / "Tiny-1B"
    shutil.copytree(tiny_model, directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\nDie Karte.\n")
    return directory


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    result = bpwise("quantize", model, out, *OPTIONS, "--eval-row-tokens", 32, "--base-model", "org/Tiny-1B")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_what_a_run_writes(finished: Path) -> None:
    card = ModelCard.load(finished / "README.md")
    assert card.data.base_model == "org/Tiny-1B"
    assert (card.data.license, card.data.language) == ("apache-2.0", ["de"])
    assert card.text.strip().startswith("# Tiny-1B-4.5bpw-6hb-exl2\n")
    assert card.text.strip().endswith("Die Karte.")
    summary = json.loads((finished / "report.json").read_text())["comparison"]["summary"]
    rows = {line.split(" | ")[0].strip("| "): line for line in card.text.splitlines() if line.startswith("| ")}
    assert f"{summary['kl_nats']['value']:.4g}" in rows["mean KL divergence, nats per token"]
    assert f"{summary['quantized_perplexity']['value']:.4g}" in rows["perplexity"]
    assert "bits per weight" in rows["decoder"]
    assert "6 bits" in rows["output head"]
    assert "8 of 32 tokens" in rows["calibration rows"]
    assert "Python" in rows["calibration"]


def test_written_again(out: Path, model: Path) -> None:
    before = (out / "README.md").read_text()
    (out / "README.md").unlink()
    result = bpwise("card", out, "--original", model, "--base-model", "org/Tiny-1B")
    assert result.exit_code == 0
    assert (out / "README.md").read_text() == before


def test_a_chat_model_shows_its_prompt_format(out: Path, model: Path) -> None:
    (out / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    assert bpwise("card", out, "--original", model).exit_code == 0
    text = ModelCard.load(out / "README.md").text
    assert "## Prompt format\n\n```text\n<system> {system_prompt}\n<user> {prompt}\n" in text
    (out / "chat_template.jinja").write_text("{% for m in messages %}")
    assert bpwise("card", out, "--original", model).exit_code == 0
    text = ModelCard.load(out / "README.md").text
    assert "Prompt format" not in text
    assert "## How to load it" in text


def test_with_nothing_at_hand(out: Path) -> None:
    for path in out.glob("report.*"):
        path.unlink()
    (out / "bpwise.json").unlink()
    result = bpwise("card", out)
    assert result.exit_code == 0
    assert "licence" in result.stderr
    card = ModelCard.load(out / "README.md")
    assert card.data.license is None
    assert "Not measured" in card.text
    assert "The original's card was not at hand" in card.text


@pytest.mark.parametrize("report", ["{", "{}", '{"comparison": {"summary": {}}}', '{"comparison": {"summary": 3}}'])
def test_a_damaged_report(out: Path, report: str) -> None:
    (out / "report.json").write_text(report)
    result = bpwise("card", out)
    assert result.exit_code == 1
    assert "report" in result.stderr


@pytest.mark.parametrize("changes", [{"adapters": 3}, {"adapters": [{"sha256": "x"}]}])
def test_a_damaged_manifest(out: Path, changes: dict[str, object]) -> None:
    manifest = json.loads((out / "bpwise.json").read_text())
    del manifest["sha256"]
    manifest["provenance"]["changes"] = changes
    (out / "bpwise.json").write_text(json.dumps(manifest))
    result = bpwise("card", out)
    assert result.exit_code == 1
    assert "bpwise.json: provenance.changes." in result.stderr


def test_a_broken_model_gets_none(out: Path) -> None:
    mark_broken(out, "It is.")
    result = bpwise("card", out)
    assert result.exit_code == 1
    assert "marked as broken" in result.stderr


def test_refusals(out: Path, model: Path, tmp_path: Path) -> None:
    assert "Expected a Hub id" in bpwise("card", out, "--base-model", "https://x/y").stderr
    assert "not a quantized model" in bpwise("card", model).stderr
    assert "Expected a Hub id" in bpwise("quantize", model, tmp_path / "o", *OPTIONS, "--base-model", "../x").stderr


def test_names() -> None:
    assert exl2_name("meta-llama/Llama-3.2-1B", 8, 8) == "Llama-3.2-1B-8.0bpw-8hb-exl2"
    assert exl2_name("x", 3, None) == "x-3.0bpw-exl2"
    assert convention_name("Llama-3.2-1B", 4.25) == "Llama-3.2-1B-4.25bpw"
