from typing import Any

import pytest
import torch
from bpwise.eval.comparison import Comparison
from bpwise.eval.metrics.divergence import Summary, TokenStatistics, token_statistics
from bpwise.eval.metrics.estimate import Estimate
from bpwise.eval.metrics.profile import profile_of
from bpwise.eval.models import ModelSummary
from bpwise.measure.text.calibration import CalibrationSet

VOCABULARY = 30


class Letters:
    """A tokenizer, as far as decoding goes; some of its tokens mean something to HTML."""

    _TOKENS = ("<script>alert(1)</script>", "&amp;", "\n", "\u202e", " word", '"')

    def decode(self, token_ids: Any) -> str:
        return "".join(self._TOKENS[token] if token < len(self._TOKENS) else f"w{token}" for token in token_ids)


def random_rows() -> CalibrationSet:
    tokens = torch.randint(VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(5))
    origins = ("prose: a.txt", "code: b.py", "prose: <b>c</b>", "code")
    return CalibrationSet(tokens=tokens, origins=origins, description="random ids", adds_bos=False)


def random_statistics(rows: CalibrationSet) -> TokenStatistics:
    rng = torch.Generator().manual_seed(1)
    targets = rows.tokens[:, 1:].flatten()
    original = 3 * torch.randn(len(targets), VOCABULARY, generator=rng)
    return token_statistics(original, original + 0.3 * torch.randn(original.shape, generator=rng), targets)


@pytest.fixture
def comparison() -> Comparison:
    rows = random_rows()
    return Comparison(
        original=ModelSummary(name="llama", fingerprint="f0", stored_bytes=16_000_000, bits_per_parameter=16.0),
        quantized=ModelSummary(name="llama-4bpw", fingerprint="f1", stored_bytes=4_100_000, bits_per_parameter=4.1),
        summary=Summary(
            original_perplexity=Estimate(10.0, 0.5),
            quantized_perplexity=Estimate(10.25, 0.52),
            perplexity_ratio=Estimate(1.025, 0.0031),
            perplexity_difference=Estimate(0.25, 0.031),
            kl_nats=Estimate(0.01234, 0.00045),
            kl_median_nats=0.007,
            kl_p90_nats=0.03,
            kl_p99_nats=0.1,
            kl_p999_nats=0.4,
            kl_max_nats=1.25,
            top1_agreement=Estimate(0.9344, 0.0021),
            top5_agreement=Estimate(0.9512, 0.0019),
            probability_change=Estimate(-0.00123, 0.00031),
            probability_change_rms=Estimate(0.0345, 0.0011),
        ),
        profile=profile_of(random_statistics(rows), rows, Letters()),
        floor_nats=2.5e-9,
        floor_tokens=512,
        text="some text: 4 rows",
        text_fingerprint="f2",
        rows=4,
        row_tokens=256,
        stride=256,
        adds_bos=True,
        dtype="float32",
        device="cpu",
        seconds=12.34,
    )
