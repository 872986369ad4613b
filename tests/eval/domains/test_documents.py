"""Texts of the domains: held out, of the kind that they are said to be, and ready to be run."""

import json
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bpwise.errors import BpwiseWarning, UnreachableTextError
from bpwise.eval.domains import sets
from bpwise.eval.domains.documents import load_domains
from bpwise.eval.domains.sets import DOMAINS, documents_of
from bpwise.measure.text.builtin_text import builtin_texts
from bpwise.measure.text.chats import seed_chats
from bpwise.measure.text.sources import Document, TextPart, TextSource
from transformers import PreTrainedTokenizerFast

TEXTS = [domain for domain in DOMAINS if not domain.chats]
CHATS = [domain for domain in DOMAINS if domain.chats]


@pytest.fixture(scope="module")
def calibrated() -> str:
    return "\n".join(document.text for document in builtin_texts("calibration").documents())


@pytest.mark.parametrize("domain", TEXTS, ids=lambda domain: domain.name)
def test_texts_are_never_calibrated_on(domain: Any, calibrated: str) -> None:
    documents = [
        document for document, _ in zip(documents_of(domain, "built-in")[1], range(domain.documents), strict=False)
    ]
    assert len(documents) == domain.documents
    for document in documents:
        # From the middle, as modules may begin with the same licence.
        middle = len(document.text) // 2
        assert document.text[middle : middle + 120] not in calibrated


def test_chats_are_of_the_domains_alone() -> None:
    seeds = {turn["content"] for chat in seed_chats() for turn in chat["messages"]}
    for domain in CHATS:
        chats = [json.loads(document.text) for document in documents_of(domain, "built-in")[1]]
        said = {turn["content"] for chat in chats for turn in chat["messages"] if turn["content"]}
        assert not said & seeds
        assert all(chat["messages"][-1]["role"] == "assistant" for chat in chats)
        assert all(("tools" in chat) is (domain.name == "tool calls") for chat in chats)
    assert sum(bool(turn.get("tool_calls")) for chat in chats for turn in chat["messages"]) >= len(chats)


def test_calls_are_answered_in_order() -> None:
    for document in documents_of(CHATS[-1], "built-in")[1]:
        chat = json.loads(document.text)
        names = {tool["function"]["name"]: tool["function"]["parameters"] for tool in chat["tools"]}
        waiting: list[str] = []
        for turn in chat["messages"]:
            if turn["role"] == "tool":
                assert turn["tool_call_id"] == waiting.pop(0)
                json.loads(turn["content"])
            assert turn["role"] == "tool" or not waiting
            for call in turn.get("tool_calls", ()):
                form = names[call["function"]["name"]]
                assert set(form["required"]) <= set(call["function"]["arguments"]) <= set(form["properties"])
                waiting.append(call["id"])


def test_non_latin_texts_are_in_many_scripts() -> None:
    (domain,) = (domain for domain in DOMAINS if domain.non_latin)
    scripts = set()
    for document, _ in zip(documents_of(domain, "built-in")[1], range(domain.documents), strict=False):
        names = [unicodedata.name(letter).split()[0] for letter in document.text if letter.isalpha()]
        scripts.add(max(set(names), key=names.count))
    assert {"HANGUL", "DEVANAGARI", "BENGALI", "THAI", "ARABIC", "CJK", "CYRILLIC", "GREEK", "TAMIL"} <= scripts
    assert "LATIN" not in scripts


def test_rows_are_filled_up_where_nothing_counts(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.warns(BpwiseWarning, match="left out") as told:
        domains = load_domains(byte_tokenizer, "built-in", vocab_size=264, context=300)
    assert [domain.name for domain in domains] == ["chat", "prose", "code", "non-Latin"]
    assert [re.split("[:.]", str(each.message))[0] for each in told] == ["domain long documents", "domain tool calls"]
    for domain in domains:
        tokens, counted = domain.rows.tokens, domain.counted
        assert tokens.shape == counted.shape
        assert tokens.shape[1] <= 300
        assert bool(counted.any(dim=1).all())
        assert not bool(counted[:, 0].any())
        assert bool((tokens[:, 0] == byte_tokenizer.bos_token_id).all())
    prose = next(domain for domain in domains if domain.name == "prose")
    first = byte_tokenizer(next(documents_of(TEXTS[0], "built-in")[1]).text)["input_ids"][:300]
    assert prose.rows.tokens[0].tolist() == first
    assert prose.counted[0].tolist() == [False, *[True] * 299]


@pytest.mark.filterwarnings("ignore:domain tool calls. left out")
def test_of_long_documents_only_what_has_a_long_context_counts(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    domains = load_domains(byte_tokenizer, "built-in", vocab_size=264, context=1100)
    (long,) = (domain for domain in domains if domain.name == "long documents")
    assert long.counted.shape == (8, 1100)
    assert long.counted[:, :1024].sum() == 0
    assert bool(long.counted[:, 1024:].all())
    assert "after the first 1024" in long.mask


def of_hub(source: str, *, column: str, render_chat: Any) -> TextSource:
    def documents() -> Iterator[Document]:
        for number in range(100):
            if render_chat is None:
                text = f"{source} {number}: " + "слово " * 50
            else:
                turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": f"{column} {number}!"}]
                text = render_chat(turns, f"row {number}")
            yield Document(f"{source}: row {number}", text)

    return TextSource(source, (TextPart(source, documents),))


def test_data_sets_of_the_hub(byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "read_texts", of_hub)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*left out", BpwiseWarning)
        domains = {each.name: each for each in load_domains(byte_tokenizer, "mix", vocab_size=264, context=300)}
    chat = domains["chat"]
    assert "ultrachat_200k::test_sft (license: MIT): 24 documents" in chat.rows.description
    text = byte_tokenizer.decode(chat.rows.tokens[3][chat.counted[3]].tolist())
    assert text == "messages 3!"
    assert chat.rows.origins[3] == "HuggingFaceH4/ultrachat_200k::test_sft: row 3"
    # One document of each language in turn.
    begins = [origin.rpartition(":")[0][-2:] for origin in domains["non-Latin"].rows.origins[:7]]
    assert begins == ["ja", "ru", "hi", "ko", "th", "el", "ja"]


def test_what_is_out_of_reach_is_told(byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str, **_: Any) -> TextSource:
        raise UnreachableTextError(f"{source}: no network")

    monkeypatch.setattr(sets, "read_texts", unreachable)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = load_domains(byte_tokenizer, "mix", vocab_size=264, context=300)
    lines = [str(each.message) for each in told]
    assert sum("cannot be reached" in line and "Texts of our own take its place" in line for line in lines) == 6
    assert all("evaluation part" in domain.rows.description for domain in found)


def test_files_ship_with_the_package() -> None:
    folder = Path(sets.__file__).parent
    data = (folder.parents[1] / "pyproject.toml").read_text()
    for domain in CHATS:
        assert f'"{domain.files[0]}"' in data
