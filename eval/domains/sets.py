"""Texts of every domain: our own, which work offline and are never calibrated on, and data sets of the Hub."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...errors import BpwiseWarning, UnreachableTextError, reason
from ...measure.text.builtin_text import builtin_texts
from ...measure.text.mixture import BUILT_IN, MIX
from ...measure.text.sources import Document, read_texts

__all__ = ["DOMAINS", "SOURCES", "DomainSet", "HubSet", "chat_of", "documents_of"]

SOURCES = (BUILT_IN, MIX)
"""Where texts may come from, as ``--calibration`` calls it: bpwise's own, or data sets of the Hub."""

_LONG_CHARACTERS = 20_000
"""Of a long document: some 5000 tokens."""

_WIKIPEDIA = "CC BY-SA 3.0 and GFDL"


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set of the Hub.

    Attributes:
        source: ``name[:config][:split]``.
        column: The column of texts or of chat turns.
        license: Its licence.
    """

    source: str
    column: str
    license: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSet:
    """What a domain is measured on.

    Attributes:
        name: The domain, as reports call it.
        built_in: What our own texts are.
        files: File of chats beside this module, or kinds of the built-in text.
        hub: Data sets, one document of each in turn.
        documents: Documents that are taken at most.
        tokens: Tokens after which each is cut.
        context_tokens: Tokens that a document begins with and that do not count.
        chats: Whether documents are chats, of which only answers count.
        non_latin: Whether documents are taken only if most of their letters are not Latin.
    """

    name: str
    built_in: str
    files: tuple[str, ...]
    hub: tuple[HubSet, ...]
    documents: int = 24
    tokens: int = 384
    context_tokens: int = 0
    chats: bool = False
    non_latin: bool = False


DOMAINS = (
    DomainSet(
        name="chat",
        built_in="chats of our own in several languages",
        files=("chats.jsonl",),
        hub=(HubSet("HuggingFaceH4/ultrachat_200k::test_sft", "messages", "MIT"),),
        chats=True,
    ),
    DomainSet(
        name="prose",
        built_in="essays, fiction, web pages and reference works of our own",
        files=("essays", "fiction", "web", "reference"),
        hub=(HubSet("abisee/cnn_dailymail:3.0.0:test", "article", "Apache 2.0"),),
    ),
    DomainSet(
        name="code",
        built_in="programs of our own in many languages",
        files=("programs",),
        hub=(HubSet("google-research-datasets/mbpp:full:test", "code", "CC BY 4.0"),),
    ),
    DomainSet(
        name="non-Latin",
        built_in="texts of our own in a dozen scripts",
        files=("languages-east", "languages-west"),
        hub=tuple(
            HubSet(f"wikimedia/wikipedia:20231101.{language}", "text", _WIKIPEDIA)
            for language in ("ja", "ru", "hi", "ko", "th", "el")  # not those of the mixture for calibration
        ),
        non_latin=True,
    ),
    DomainSet(
        name="long documents",
        built_in="documentation and sources of Python",
        files=("python docs", "python code"),
        hub=(HubSet("emozilla/pg19::test", "text", "Apache 2.0"),),
        documents=8,
        tokens=2048,
        context_tokens=1024,
    ),
    DomainSet(
        name="tool calls",
        built_in="chats of our own with calls of functions",
        files=("tools.jsonl",),
        hub=(HubSet("NousResearch/hermes-function-calling-v1:func_calling", "conversations", "Apache 2.0"),),
        chats=True,
    ),
)
"""All domains. Of the built-in text only the part is read that is never calibrated on; our chats are read nowhere else.
Data sets of the Hub are streamed, and none is of the mixture that ``--calibration mix`` takes."""


def documents_of(domain: DomainSet, source: str) -> tuple[str, Iterator[Document]]:
    """Return a description of a domain's texts, and the texts in order, more than are needed.

    Args:
        domain: The domain.
        source: One of ``SOURCES``.

    Returns:
        Of chats the text of a document is what ``chat_of`` reads.

    Warns:
        BpwiseWarning: A data set cannot be reached; our own texts take its place.
    """
    if source == MIX:
        try:
            streams = [_of_hub(each, domain.documents, chats=domain.chats) for each in domain.hub]
        except UnreachableTextError as error:
            warnings.warn(
                f"domain {domain.name}: a data set cannot be reached. Got {reason(error.__cause__ or error)!r}. "
                f"Expected {', '.join(each.source for each in domain.hub)}. Texts of our own take its place.",
                BpwiseWarning,
                stacklevel=2,
            )
        else:
            named = ", ".join(each.source for each in domain.hub)
            return f"{named} (license: {domain.hub[0].license})", _in_turn(streams)
    return f"{domain.built_in}, evaluation part", _built_in(domain)


def chat_of(document: Document) -> dict[str, Any]:
    """Return a chat of ``documents_of``: its ``messages`` and perhaps ``tools``."""
    chat: dict[str, Any] = json.loads(document.text)
    return chat


def _of_hub(each: HubSet, most: int, *, chats: bool) -> list[Document]:
    # So much is read at once that what is out of reach is known.
    render = (lambda turns, _: json.dumps({"messages": turns}, default=str)) if chats else None
    source = read_texts(each.source, column=each.column, render_chat=render)
    return [document for document, _ in zip(source.documents(), range(2 * most), strict=False)]


def _built_in(domain: DomainSet) -> Iterator[Document]:
    if domain.chats:
        (name,) = domain.files
        lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
        return (Document(f"{name}: {number}", line) for number, line in enumerate(lines, start=1))
    texts = builtin_texts("evaluation", passage_characters=_LONG_CHARACTERS)
    parts = [part.documents() for part in texts.parts if part.name in domain.files]
    documents = _in_turn(parts)
    return filter(_is_non_latin, documents) if domain.non_latin else documents


def _in_turn(streams: Iterable[Iterable[Document]]) -> Iterator[Document]:
    return (document for turn in zip_longest(*streams) for document in turn if document is not None)


def _is_non_latin(document: Document) -> bool:
    letters = [unicodedata.name(letter, "") for letter in document.text if letter.isalpha()]
    return 2 * sum(name.startswith("LATIN") for name in letters) < len(letters)
