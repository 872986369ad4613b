"""Model cards, read by the Hub's own client; and the original's card, which may be anything."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from bpwise.convert.exl2 import card as exl2
from bpwise.convert.gguf import card as gguf
from bpwise.convert.model import CardFacts
from bpwise.convert.names import pasteable, size_text
from bpwise.errors import CheckpointError
from bpwise.eval.publishing.base_card import BaseCard, parse_base_card, read_base_card
from bpwise.eval.publishing.card import Card, CardResult, render_card
from huggingface_hub import ModelCard

BASE = """---
license: llama3.2
license_name: Llama 3.2 Community
language:
- en
- no
pipeline_tag: text-generation
tags: [conversational, safetensors]
base_model: someone/else
extra_gated_prompt: "<script>"
---

# The base

Its own words, with a rule:

---

and the end.
"""


@pytest.fixture
def card() -> Card:
    return Card(
        facts=CardFacts(
            name="Llama-3.2-1B-8.0bpw-8hb-exl2",
            kind="an EXL2 model",
            library="exllamav2",
            made=(("format", "EXL2"), ("calibration", "a | b")),
            limits=(),
            loading=exl2.loading("Llama-3.2-1B-8.0bpw-8hb-exl2"),
        ),
        format="exl2",
        base_name="meta-llama/Llama-3.2-1B",
        base_model="meta-llama/Llama-3.2-1B",
        measured=(("perplexity", "10.0 ± 0.5", "10.1 ± 0.5"),),
        measured_note="Over 7 tokens.",
        results=(CardResult("perplexity", "perplexity", 10.1, "a: text"),),
        base=parse_base_card(BASE),
    )


def test_the_hub_reads_it(card: Card) -> None:
    data = ModelCard(render_card(card)).data
    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert data["base_model_relation"] == "quantized"
    assert data.library_name == "exllamav2"
    assert data.license == "llama3.2"
    assert data.license_name == "Llama 3.2 Community"
    assert data.language == ["en", "no"]
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["exl2", "quantized", "bpwise", "conversational"]
    assert "extra_gated_prompt" not in data.to_dict()
    assert data["quantized_by"] == "bpwise"
    (result,) = data.eval_results or []
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 10.1, "a: text")
    assert data.model_name == "Llama-3.2-1B-8.0bpw-8hb-exl2"


def test_what_people_read(card: Card) -> None:
    text = ModelCard(render_card(card)).text
    assert text.strip().startswith("# Llama-3.2-1B-8.0bpw-8hb-exl2\n")
    for part in (
        "[meta-llama/Llama-3.2-1B](https://huggingface.co/meta-llama/Llama-3.2-1B)",
        "| calibration | a \\| b |",
        "| perplexity | 10.0 ± 0.5 | 10.1 ± 0.5 |",
        'ExLlamaV2Config("Llama-3.2-1B-8.0bpw-8hb-exl2")',
        "model_name: Llama-3.2-1B-8.0bpw-8hb-exl2",
        "bpwise dequantize Llama-3.2-1B-8.0bpw-8hb-exl2 ",
        "llama.cpp",
        "Its own words, with a rule:\n\n---\n\nand the end.",
    ):
        assert part in text
    assert text.index("What it cost") < text.index("How to load it") < text.index("# The base")


def test_a_gguf_file(card: Card) -> None:
    facts = replace(card.facts, name="x", loading=gguf.loading(pasteable("x y;rm.gguf")))
    made = render_card(replace(card, facts=facts, format="gguf", measured=()))
    assert ModelCard(made).data.tags[0] == "gguf"
    assert "llama-cli --model x-y-rm.gguf " in made
    assert "Not measured" in made


@pytest.mark.parametrize("chat", [True, False])
def test_commands_for_a_gguf_file(chat: bool) -> None:
    text = gguf.loading("L-4.5bpw-Q4_K_S.gguf", label="Q4_K_S", chat=chat)
    for command in (
        "ollama run hf.co/USER/REPO:Q4_K_S",
        "llama-server -hf USER/REPO:Q4_K_S",
        "lms get https://huggingface.co/USER/REPO",
        'hf download USER/REPO --include "L-4.5bpw-Q4_K_S.gguf" --local-dir .',
    ):
        assert command in text.splitlines()
    assert ("/v1/chat/completions" in text) is chat
    unlabelled = gguf.loading("odd.gguf")
    assert "ollama run hf.co/USER/REPO:odd.gguf" in unlabelled.splitlines()
    assert "llama-server -hf USER/REPO -hff odd.gguf" in unlabelled.splitlines()
    parts = gguf.loading("L-Q4_K_M-00001-of-00002.gguf", label="Q4_K_M")
    assert '--include "L-Q4_K_M-*.gguf"' in parts


def test_an_original_that_is_not_on_the_hub(card: Card) -> None:
    local = replace(card, base_model=None, base_name="my <b>model</b>", base=BaseCard(notes=("No card.",)))
    made = render_card(local)
    data = ModelCard(made).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "language"} & data.keys()
    assert "<b>" not in made
    assert "> **Note.** No card." in made


@pytest.mark.parametrize(
    ("front", "note"),
    [
        ("license: [mit\n", "is not valid YAML"),
        ("- a\n- b\n", "is not a mapping"),
        ("a: " + "x" * 70000 + "\n", "is too long"),
        ("a: " + "[" * 900 + "\n", "is not valid YAML"),
        ("a: " + "[" * 20000 + "\n", "has too many brackets"),
        ("license: {a: b}\n", "`license` cannot be read"),
        ("license: " + "m" * 501 + "\n", "`license` cannot be read"),
        ("license: mit\nlanguage: [en, {a: b}]\n", "`language` cannot be read"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("license: mit\ttab: : x\n", "is not valid YAML"),
    ],
    ids=["open", "list", "long", "deep", "brackets", "mapping", "long-value", "nested", "unhashable", "colon"],
)
def test_damaged_front_matter_is_left_out_visibly(card: Card, front: str, note: str) -> None:
    base = parse_base_card(f"---\n{front}---\nBody.")
    assert note in " ".join(base.notes)
    made = render_card(replace(card, base=base))
    assert note in made
    assert ModelCard(made).data.tags[0] == "exl2"
    assert made.endswith("Body.\n")


def test_no_end_of_the_front_matter() -> None:
    base = parse_base_card("---\nlicense: mit\n")
    assert "has no end" in base.notes[0]
    assert base.values == {}


def test_nothing_is_constructed_or_multiplied() -> None:
    # Python objects, merges that double with every line, a loop.
    lines = ["a0: &a0 {x: y}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: v}}" for n in range(1, 60))]
    start = time.monotonic()
    base = parse_base_card("---\n" + "\n".join([*lines, "license: mit"]) + "\n---\n")
    assert time.monotonic() - start < 5
    assert base.values == {"license": "mit"}
    base = parse_base_card("---\nlicense: mit\ntags: &t [*t]\n---\n")  # a list in itself
    assert "tags" not in base.lists
    assert base.notes
    base = parse_base_card("---\nlicense: !!python/object/apply:os.system ['touch x']\n---\n")
    assert base.values.get("license") in (None, "touch x")
    assert not Path("x").exists()


@pytest.mark.parametrize("value", ["no", "0123", "1.0", "null", "2024-01-01", "a: b", "# x", "'", "- x"])
def test_strings_stay_strings(card: Card, value: str) -> None:
    made = render_card(replace(card, base=BaseCard(values={"license": value})))
    assert ModelCard(made).data.license == value
    plain = yaml.safe_dump({"license": value})
    assert parse_base_card(f"---\n{plain}---\n").values == {"license": value}


@pytest.mark.parametrize(
    "text", ["", "No front matter.", "---\n---\nBody.", "\ufeff---\r\nlicense: mit\r\n---\r\nBody.\r\n"]
)
def test_odd_but_fine(text: str) -> None:
    base = parse_base_card(text)
    assert base.notes == ()
    assert "---" not in base.body


def test_large_cards_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"x" * (1 << 20) + b"y")
    assert "larger than 1 MiB" in read_base_card(tmp_path).notes[0]
    (tmp_path / "README.md").write_bytes(b"a\xff\x00\x1b[31mb" + b"c" * 300000)
    base = read_base_card(tmp_path)
    assert base.body.startswith("a\ufffd[31mb")
    assert len(base.body) == 1 << 18
    assert "is cut" in base.notes[0]


def test_no_card(tmp_path: Path) -> None:
    assert "no card" in read_base_card(tmp_path).notes[0]


def test_a_link_that_leads_outside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="leads outside"):
        read_base_card(tmp_path / "model")


@pytest.mark.parametrize(("bpw", "text"), [(8, "8.0bpw"), (4.5, "4.5bpw"), (4.25, "4.25bpw"), ("2GB", "2GB")])
def test_sizes(bpw: float | str, text: str) -> None:
    assert size_text(bpw) == text
