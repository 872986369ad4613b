"""The command with models that attend: against Transformers' own forward; and what it refuses."""

import hashlib
from pathlib import Path

import pytest
import torch
from bpwise.cli import cli
from bpwise.eval.llama_perplexity.model import PerplexityModel
from bpwise.eval.llama_perplexity.run import compare_with_base, measure_perplexity, windows_for
from bpwise.eval.metrics import overlap
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...conftest import SaveModel
from .conftest import Pair

WINDOW_TOKENS = 48


@pytest.fixture(scope="module")
def models(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("attending")
    return save_model(folder / "original"), save_model(folder / "other", seed=1)


def log_probabilities(directory: Path, tokens: Tensor) -> Tensor:
    """Of the second half of every window but its last token, as Transformers has them, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits[:, WINDOW_TOKENS // 2 : -1].double().log_softmax(dim=-1)


def test_numbers_are_those_of_transformers(models: tuple[Path, Path], pair: Pair, tmp_path: Path) -> None:
    original, other = (PerplexityModel.open(each, device="cpu") for each in models)
    rows = windows_for(original, pair.text, window_tokens=WINDOW_TOKENS, most=4)
    nll = measure_perplexity(original, rows, tmp_path / "base.kld")
    tokens = rows.tokens.clone()
    tokens[:, 0] = 256  # BOS
    first, second = (log_probabilities(each, tokens) for each in models)
    targets = rows.tokens[:, WINDOW_TOKENS // 2 + 1 :, None]
    expected = -first.gather(2, targets).flatten()
    assert torch.allclose(nll.double(), expected, atol=1e-4)  # float32 on another way
    found = compare_with_base(other, tmp_path / "base.kld")
    # What 16 bits keep of the base: steps of 16 / 65535 at most.
    assert torch.allclose(found.base_nll_nats.double(), expected, atol=3e-4)
    assert torch.allclose(found.nll_nats.double(), -second.gather(2, targets).flatten(), atol=1e-4)
    kl = (first.exp() * (first - second)).sum(dim=2).flatten()
    assert torch.allclose(found.kl_nats, kl, atol=1e-3)
    assert torch.equal(found.same_top, (first.argmax(2) == second.argmax(2)).flatten())
    change = (second.exp() - first.exp()).gather(2, targets).flatten()
    assert torch.allclose(found.probability_change.double(), change, atol=3e-4)


def test_text_that_was_calibrated_on_is_named(
    models: tuple[Path, Path], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PerplexityModel.open(models[0], device="cpu")
    rows = windows_for(model, pair.text, window_tokens=WINDOW_TOKENS)
    digest = hashlib.sha256(pair.text.read_bytes()).hexdigest()[:16]
    assert rows.description == f"10 windows of 48 tokens of {pair.text} (SHA-256 {digest})"
    spans = overlap.CalibrationSpans.of(rows)
    monkeypatch.setattr("bpwise.eval.llama_perplexity.run.stored_spans", lambda _: spans)
    again = windows_for(model, pair.text, window_tokens=WINDOW_TOKENS)
    assert again.description.startswith("NOT HELD OUT")


def refused(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["perplexity", *map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr.splitlines()[-1]


def test_what_is_refused(models: tuple[Path, Path], pair: Pair, tmp_path: Path) -> None:
    original, base, notes = models[0], tmp_path / "base.kld", tmp_path / "notes"
    notes.write_text("mine")
    for arguments, code, said in (
        (("--kl-divergence",), 2, "--kl-divergence needs --kl-divergence-base."),
        ((), 2, "no text."),
        (("--kl-divergence", "--kl-divergence-base", base, "--chunks", 2), 2, "--chunks has no effect with --kl-div"),
        (("-f", pair.text, "--llama-cpp", tmp_path), 2, "--llama-cpp has no effect without --engine llama.cpp"),
        (("-f", pair.text, "-c", 129), 1, "original: has positions for 128 tokens. Got windows of 129."),
        (("-f", notes, "-c", 64), 1, "notes: too little text. Got 5 tokens. Expected at least 128"),
        (("-f", pair.text, "-c", 64, "--kl-divergence-base", notes), 1, "notes: in the way. Got another file."),
        (("-f", pair.text, "--engine", "llama.cpp"), 1, "not a model that llama.cpp runs."),
        (("--kl-divergence", "--kl-divergence-base", base), 1, "base.kld: cannot be read"),
    ):
        found, message = refused(original, *arguments)
        assert found == code, message
        assert said in message, message
    exact = PerplexityModel.open(pair.original, device="cpu")
    measure_perplexity(exact, windows_for(exact, pair.text, window_tokens=64), base)
    _, message = refused(original, "--kl-divergence", "--kl-divergence-base", base)
    assert "not of this model. Got a vocabulary of 265 tokens. Expected 264" in message
    assert notes.read_text() == "mine"
