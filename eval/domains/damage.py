"""Damage by domain: averages over the tokens that count, with intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...measure.model.stream import StreamedModel
from ...progress import Progress
from ..metrics.bootstrap import Bootstrapped, bootstrapped_mean, bootstrapped_quantile
from ..metrics.passes import paired_statistics
from .documents import Domain

__all__ = ["DomainDamage", "damage_by_domain"]

_TAIL = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDamage:
    """Damage on one domain, over the tokens that count.

    Attributes:
        domain: Its name.
        documents: Number of documents.
        tokens: Tokens that count.
        kl_nats: Mean KL divergence per token.
        kl_p99_nats: 99th percentile of the tokens' KL divergences.
        top1_agreement: Share of equal most likely tokens, 0 to 1.
        text: What the documents are.
        text_fingerprint: Identifies the token ids.
        mask: Which tokens count, in words.
    """

    domain: str
    documents: int
    tokens: int
    kl_nats: Bootstrapped
    kl_p99_nats: Bootstrapped
    top1_agreement: Bootstrapped
    text: str
    text_fingerprint: str
    mask: str


def damage_by_domain(
    domains: Sequence[Domain],
    original: StreamedModel,
    quantized: StreamedModel,
    original_hidden: Sequence[Tensor],
    quantized_hidden: Sequence[Tensor],
    progress: Progress,
) -> tuple[DomainDamage, ...]:
    """Compare what two models predict in every domain.

    Args:
        domains: The documents.
        original: The original.
        quantized: The quantized model, on the same device.
        original_hidden: Of each domain what ``last_hidden_of_all`` made of the original.
        quantized_hidden: The same of the quantized model.
        progress: Wraps the documents of each domain.

    Raises:
        NumericalError: NaN or infinity in logits; the message names the model.
    """
    found = []
    for domain, before, after in zip(domains, original_hidden, quantized_hidden, strict=True):
        statistics = paired_statistics(
            original, quantized, before, after, domain.rows.tokens, progress, counted=domain.counted
        )
        lengths = domain.counted.sum(dim=1).tolist()
        found.append(
            DomainDamage(
                domain=domain.name,
                documents=len(lengths),
                tokens=sum(lengths),
                kl_nats=bootstrapped_mean(statistics.kl_nats, lengths),
                kl_p99_nats=bootstrapped_quantile(statistics.kl_nats, lengths, _TAIL),
                top1_agreement=bootstrapped_mean(statistics.same_top1, lengths),
                text=domain.rows.description,
                text_fingerprint=domain.rows.fingerprint,
                mask=domain.mask,
            )
        )
    return tuple(found)
