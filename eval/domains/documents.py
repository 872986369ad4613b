"""Domains as rows of token ids with a mask, ready to be run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ...errors import BpwiseWarning
from ...measure.text.calibration import CalibrationSet, require_ids_below
from ...measure.text.chat_template import ChatTemplate
from ...measure.text.sources import Document
from ...measure.text.tokenizer import Tokenizer, chat_template, leading_ids
from .masks import MarkedText, MaskedTokens, answers_mask, marked_chat, masked_tokens
from .sets import DOMAINS, DomainSet, chat_of, documents_of

__all__ = ["Domain", "load_domains"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Domain:
    """Documents of a domain.

    Attributes:
        name: As reports call it.
        rows: A row for each document. The shorter ones are filled up behind their end, where nothing counts: no
            prediction sees what follows it.
        counted: Which tokens count, bool, the shape of the rows; at least one of each row, never the first.
        mask: Which they are, in words.
    """

    name: str
    rows: CalibrationSet
    counted: Tensor
    mask: str


def load_domains(
    tokenizer: Tokenizer, source: str | None, *, vocab_size: int, context: int | None
) -> tuple[Domain, ...]:
    """Return the documents of all domains that a model can be measured on.

    Args:
        tokenizer: The model's.
        source: One of ``SOURCES``; None for no domains.
        vocab_size: Rows of the model's token embeddings.
        context: The most tokens that the model has positions for; None if that is not known.

    Raises:
        CalibrationError: The chat template is not valid, or the tokenizer does not fit the model.

    Warns:
        BpwiseWarning: A domain is left out, or a data set cannot be reached.
    """
    if source is None:
        return ()
    with ExitStack() as opened:
        template = opened.enter_context(chat_template(tokenizer)) if tokenizer.chat_template else None
        found = [_load(tokenizer, template, domain, source, vocab_size, context) for domain in DOMAINS]
    return tuple(domain for domain in found if domain is not None)


def _load(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    domain: DomainSet,
    source: str,
    vocab_size: int,
    context: int | None,
) -> Domain | None:
    most = domain.tokens if context is None else min(domain.tokens, context)
    description, documents = documents_of(domain, source)
    masked = _masked(tokenizer, template, domain, documents, most) if most > domain.context_tokens else iter(())
    chosen = list(islice(masked, domain.documents))
    if not chosen:
        needed = f"more than {domain.context_tokens} positions"
        if domain.chats:
            needed = f"a template that takes chats, and answers within {most} tokens"
        warnings.warn(
            f"domain {domain.name}: left out. Got no document for this model. Expected {needed}.",
            BpwiseWarning,
            stacklevel=3,
        )
        return None
    length = max(len(tokens.ids) for _, tokens in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    counted = torch.zeros(len(chosen), length, dtype=torch.bool)
    for row, (_, tokens) in enumerate(chosen):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        counted[row, : len(tokens.counted)] = torch.tensor(tokens.counted)
    require_ids_below(ids, vocab_size, tokenizer, use=f"domain {domain.name}")
    rows = CalibrationSet(
        tokens=ids,
        origins=tuple(origin for origin, _ in chosen),
        description=f"{description}: {len(chosen)} documents of at most {length} tokens, each run alone",
        adds_bos=bool(leading_ids(tokenizer)),
    )
    return Domain(name=domain.name, rows=rows, counted=counted, mask=_mask(domain, template))


def _masked(
    tokenizer: Tokenizer, template: ChatTemplate | None, domain: DomainSet, documents: Iterator[Document], most: int
) -> Iterator[tuple[str, MaskedTokens]]:
    for document in documents:
        if domain.chats:
            marked = marked_chat(template, chat_of(document), document.origin)
        else:
            marked = MarkedText(document.text, ((0, len(document.text)),))
        tokens = None if marked is None else masked_tokens(tokenizer, marked, most)
        if tokens is None or (domain.context_tokens and len(tokens.ids) < most):
            continue
        seen = domain.context_tokens
        tokens = MaskedTokens(tokens.ids, (*(False,) * seen, *tokens.counted[seen:]))
        if any(tokens.counted):
            yield document.origin, tokens


def _mask(domain: DomainSet, template: ChatTemplate | None) -> str:
    if domain.chats:
        return answers_mask(template, tools=domain.name == "tool calls")
    if domain.context_tokens:
        return f"all tokens after the first {domain.context_tokens} of a document"
    return "all tokens but the first of a document"
