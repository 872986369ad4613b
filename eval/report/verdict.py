"""What a comparison means, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...tables import Table, bytes_text, listed
from ..comparison import Comparison
from ..metrics.estimate import Estimate, confidence_interval
from ..metrics.numbers import estimate, nats, percent
from .paired import kl_difference

__all__ = [
    "GOOD_ENOUGH_NATS",
    "KNOWN_NOTE",
    "LEVELS",
    "Judged",
    "beaten_by",
    "domains_sentence",
    "headline",
    "known_like",
    "known_table",
    "meanings_table",
    "same_tokens",
    "sentence",
    "size_words",
    "verdict",
    "verdict_sentence",
    "words_for",
]

LEVELS = (
    # Llama 3 8B as llama.cpp's Q8_0 loses 0.0014 nats per token, EXL2 at 8.0 bpw 0.001. Nobody has told either from the
    # original in use, and its 16-bit file, whose logits are merely stored in 16 bits, measures 0.0006.
    (0.002, "indistinguishable in use"),
    # The same model in Q6_K: 0.0055; in Q5_K_M: 0.011.
    (0.012, "very close to the original"),
    # In Q4_K_M: 0.031, which is what most people run.
    (0.04, "close to the original"),
    # EXL2 at 4.0 bpw: 0.054. Beyond 0.1 nats about one most likely token in ten is another.
    (0.12, "noticeably different from the original"),
    # Beyond it small models write other answers than the original to most questions.
    (0.5, "damaged"),
)
"""Mean KL divergences in nats per token up to which words hold, smallest first."""

GOOD_ENOUGH_NATS = 0.04
"""Largest mean KL divergence of a model that is recommended for its size: that of what most people run."""

_WORST = "badly damaged"

_KNOWN = (
    ("F16", "14.97", 0.000551, "0.787 %", ""),
    ("Q8_0", "7.96", 0.001355, "1.198 %", "97.7 %"),
    ("Q6_K", "6.14", 0.005452, "2.295 %", "96.0 %"),
    ("Q5_K_M", "5.33", 0.010762, "3.160 %", ""),
    ("Q4_K_M", "4.58", 0.031273, "5.519 %", "91.9 %"),
    ("Q3_K_M", "3.74", 0.101913, "10.203 %", ""),
    ("Q2_K", "2.96", 0.445132, "21.421 %", "71.1 %"),
    ("IQ1_M", "2.01", 1.393084, "38.287 %", ""),
)
"""Llama 3 8B in llama.cpp's types: size in GiB, KL divergence in nats per token, RMS of Δp, same top token. From
tools/perplexity/README.md of llama.cpp (its revision f364eb6f), as rounded there."""

KNOWN_NOTE = (
    "Llama 3 8B on the test text of WikiText-2, measured by llama.cpp's authors (tools/perplexity/README.md in its "
    "sources); IQ1_M with an importance matrix, the others without. Row F16 is the effect of storing the "
    "original's logits in 16 bits. The same type gives other numbers on other texts and models: small models lose more."
)

_MEANINGS = (
    ("KL divergence", "How far the model's predictions are from the original's, averaged over all tokens; 0: equal. "
     "The best single number: it reflects every change of a prediction, even if the most likely token stays the same."),
    ("top-1 agreement", "How often both models agree on the most likely next token."),
    ("perplexity", "How surprised a model is by the text. Noisy: a worse model can score lower by chance."),
    ("Δp", "How much the probability of the true next token changes (root mean square)."),
    ("size", "Of all weight files, and in bits per parameter of the original."),
)  # fmt: skip

_FEW_ROWS = 8
"""With fewer rows the standard error itself is not known to a factor of 1.5."""


class Judged:
    """What may have been compared with its original, ``comparison``: what that says of it."""

    __slots__ = ()

    comparison: Comparison | None

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the original, nats per token; None if it was not evaluated."""
        return None if self.comparison is None else self.comparison.kl

    @property
    def verdict(self) -> str | None:
        """What that means in use, in words; None if it was not evaluated."""
        return None if self.comparison is None else verdict(self.comparison)


def verdict(comparison: Comparison) -> str:
    """Return what the mean KL divergence means in use, without the number."""
    if comparison.within_floor:
        return "the same as the original as far as can be measured"
    return words_for(comparison.summary.kl_nats.value)


def words_for(kl_nats: float) -> str:
    """Return what a mean KL divergence in nats per token means in use."""
    return next((words for limit, words in LEVELS if kl_nats <= limit), _WORST)


def verdict_sentence(comparison: Comparison) -> str:
    """Return the verdict with the size, and with what is the same."""
    words, size = verdict(comparison), size_words(comparison)
    shown = f"{size}: {words}" if size else f"{words[0].upper()}{words[1:]}"
    doubt = "" if comparison.rows >= _FEW_ROWS else f" (based on only {_counted(comparison.rows)} of text)"
    domains = domains_sentence(comparison)
    return f"{shown}{doubt}. {same_tokens(comparison.summary.top1_agreement.value)}.{' ' if domains else ''}{domains}"


def domains_sentence(comparison: Comparison) -> str:
    """Return which domain lost most, and which cannot be told from it; empty if domains were not measured.

    Domains whose 95 % intervals meet cannot be told apart.
    """
    if not comparison.domains:
        return ""
    worst = max(comparison.domains, key=lambda each: each.kl_nats.value)
    ends = worst.kl_nats.interval
    shown = f"Most was lost on {worst.domain}: {nats(worst.kl_nats.value)} nats per token"
    if ends is None:
        return f"{shown}."
    near = [
        each.domain
        for each in comparison.domains
        if each is not worst and each.kl_nats.interval and each.kl_nats.interval.high >= ends.low
    ]
    doubt = f", within error of {listed(near)}" if near else ""
    return f"{shown} ({ends.low:.3g} to {ends.high:.3g}){doubt}."


def size_words(comparison: Comparison) -> str:
    """Return the size, and the share of the original's that it is; empty if it is not known."""
    size, whole = comparison.quantized.stored_bytes, comparison.original.stored_bytes
    if not size:
        return ""
    return f"{bytes_text(size)}, {100 * size / whole:.0f} % of the original" if whole else bytes_text(size)


def same_tokens(share: float) -> str:
    """Return how many of the next tokens are the same, 0 to 1 of all, as a sentence without its full stop."""
    if share == 1:
        return "All next tokens are the same"
    for of in (100, 1000):
        if round(of * share) < of:
            return f"{round(of * share)} of {of} next tokens are the same"
    return "Nearly all next tokens are the same"


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on all models: of one what it is; of several the smallest that is good enough, and the rest.

    Args:
        comparisons: At least one; all with the same original on the same text.
    """
    if len(comparisons) == 1:
        return verdict_sentence(comparisons[0])
    sized = [each for each in comparisons if each.quantized.stored_bytes]
    good = [each for each in sized if each.summary.kl_nats.value <= GOOD_ENOUGH_NATS]
    smallest = min(good, key=lambda each: each.quantized.stored_bytes or 0, default=None)
    closest = min(comparisons, key=lambda each: each.summary.kl_nats.value)
    sentences = []
    if smallest is not None:
        sentences.append(f"Smallest that is good enough: {smallest.quantized.name}. {verdict_sentence(smallest)}")
    if closest is not smallest:
        sentences.append(f"Closest to the original: {closest.quantized.name}. {verdict_sentence(closest)}")
    for each, better in zip(comparisons, beaten_by(comparisons), strict=True):
        if better is not None:
            sentences.append(f"{each.quantized.name} is larger than {better.quantized.name}, and worse.")
    return " ".join(sentences)


def beaten_by(comparisons: Sequence[Comparison]) -> list[Comparison | None]:
    """Return for each model one that is smaller and closer to the original, the closest; None where there is none.

    Closer is a model whose paired difference is below zero with its whole confidence interval.
    """

    def beats(other: Comparison, each: Comparison) -> bool:
        size, room = other.quantized.stored_bytes, each.quantized.stored_bytes
        if not size or not room or size >= room:
            return False
        difference = kl_difference(other, each)
        interval = confidence_interval(difference, each.rows)
        return (difference.value if interval is None else interval.low) > 0

    return [
        min(
            (other for other in comparisons if beats(other, each)),
            key=lambda other: other.summary.kl_nats.value,
            default=None,
        )
        for each in comparisons
    ]


def sentence(comparison: Comparison) -> str:
    """Return the result on one model as a sentence."""
    summary = comparison.summary
    change = summary.perplexity_ratio
    relative = estimate(change.scaled(100 * (change.value - 1), 100), 2, "+")
    return (
        f"Over {comparison.predicted_tokens} tokens of evaluation text the quantized model's predictions are "
        f"{nats(summary.kl_nats.value)} nats per token away from the original's (mean KL divergence), "
        f"{percent(Estimate(summary.top1_agreement.value, None))} of its most likely next tokens are the same, "
        f"and its perplexity is {summary.quantized_perplexity.value:.3f} instead of "
        f"{summary.original_perplexity.value:.3f} ({relative} %)."
    )


def _counted(rows: int) -> str:
    return "1 sequence" if rows == 1 else f"{rows} sequences"


def known_like(kl_nats: float) -> str:
    """Return which of llama.cpp's types does about as much to Llama 3 8B; empty beyond them all.

    Args:
        kl_nats: Mean KL divergence, nats per token.
    """
    least, most = _KNOWN[0][2], _KNOWN[-1][2]
    if not least / 2 <= kl_nats <= 2 * most:
        return ""
    return min(_KNOWN, key=lambda known: abs(math.log(known[2] / kl_nats)))[0]


def meanings_table() -> Table:
    """Return what each measure is."""
    return Table.of_facts(_MEANINGS)


def known_table() -> Table:
    """Return the numbers of llama.cpp's own types, and what a report calls them."""
    head = ("file", "KL, nats/token", "same top token", "Δp, RMS", "size", "here called")
    rows = [
        (name, f"{kl:.4f}", same or "not published", rms, f"{size} GiB", words_for(kl))
        for name, size, kl, rms, same in _KNOWN
    ]
    return Table.of(head, rows)
