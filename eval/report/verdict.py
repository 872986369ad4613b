"""What a comparison means, in words."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison import Comparison
from ..metrics.estimate import Estimate
from ..metrics.numbers import estimate, nats, percent

__all__ = ["LEVELS", "headline", "sentence", "verdict", "verdict_sentence"]

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

_WORST = "badly damaged"

_FEW_ROWS = 8
"""With fewer rows the standard error itself is not known to a factor of 1.5."""


def verdict(comparison: Comparison) -> str:
    """Return what the mean KL divergence means in use, without the number."""
    if comparison.within_floor:
        return "the same as the original as far as can be measured"
    kl_nats = comparison.summary.kl_nats.value
    return next((words for limit, words in LEVELS if kl_nats <= limit), _WORST)


def verdict_sentence(comparison: Comparison) -> str:
    """Return the verdict with the numbers behind it."""
    summary = comparison.summary
    numbers = (
        f"{nats(summary.kl_nats.value)} nats/token, "
        f"top-1 agreement {percent(Estimate(summary.top1_agreement.value, None))}"
    )
    doubt = "" if comparison.rows >= _FEW_ROWS else f" (judged on {_counted(comparison.rows)} of text only)"
    return f"{numbers}: {verdict(comparison)}{doubt}."


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on all models: of one what it is, of several the closest and the smallest good one.

    Args:
        comparisons: At least one; all with the same original on the same text.
    """
    if len(comparisons) == 1:
        return verdict_sentence(comparisons[0])
    closest = min(comparisons, key=lambda each: each.summary.kl_nats.value)
    sentences = [f"Closest to the original: {closest.quantized.name}. {verdict_sentence(closest)}"]
    smallest = min(
        (each for each in comparisons if each.quantized.stored_bytes and each.summary.kl_nats.value <= LEVELS[0][0]),
        key=lambda each: each.quantized.stored_bytes or 0,
        default=None,
    )
    if smallest is not None and smallest is not closest:
        sentences.append(f"Smallest that is {LEVELS[0][1]}: {smallest.quantized.name}. {verdict_sentence(smallest)}")
    return " ".join(sentences)


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
    return "1 row" if rows == 1 else f"{rows} rows"
