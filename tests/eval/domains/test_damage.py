"""Damage by domain, end to end, against models that Transformers runs on every document alone."""

import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bpwise.cli import cli
from bpwise.errors import BpwiseWarning, CalibrationError, ConfigError
from bpwise.eval import comparison as comparison_module
from bpwise.eval.cache import OriginalCache
from bpwise.eval.comparison import Comparison, EvalConfig, evaluate_each
from bpwise.eval.domains import documents, sets
from bpwise.eval.domains.damage import DomainDamage
from bpwise.eval.domains.documents import Domain, load_domains
from bpwise.eval.metrics.bootstrap import Bootstrapped
from bpwise.eval.metrics.estimate import Interval
from bpwise.eval.metrics.overlap import CalibrationSpans
from bpwise.eval.report.markdown import summary_lines
from bpwise.eval.report.verdict import domains_sentence
from bpwise.measure.text.tokenizer import load_tokenizer
from click.testing import CliRunner
from markupsafe import escape
from transformers import AutoModelForCausalLM

from ...conftest import MakeModel

ROOM = {"max_position_embeddings": 640}
NAMES = ["chat", "prose", "code", "non-Latin", "tool calls"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four documents of each domain, of bytes; the models have no room for long ones."""
    monkeypatch.setattr(documents, "DOMAINS", tuple(replace(each, documents=4, tokens=600) for each in sets.DOMAINS))
    monkeypatch.setattr("bpwise.eval.metrics.bootstrap.RESAMPLES", 100)
    warnings.filterwarnings("ignore", "domain long documents: left out", BpwiseWarning)


def config(domains: str | None = "built-in") -> EvalConfig:
    return EvalConfig(rows=2, row_tokens=40, device="cpu", domains=domains)


def domains_of(directory: Path) -> tuple[Domain, ...]:
    return load_domains(load_tokenizer(directory), "built-in", vocab_size=264, context=ROOM["max_position_embeddings"])


def check(got: Comparison, original: Path, quantized: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64) for each in (original, quantized)]
    for domain, damage in zip(domains_of(original), got.domains, strict=True):
        kl, same = [], []
        for tokens, counted in zip(domain.rows.tokens, domain.counted, strict=True):
            end = int(counted.nonzero().max()) + 1  # nothing behind it
            with torch.no_grad():
                log_p, log_q = (model(tokens[None, :end]).logits[0, :-1].log_softmax(-1) for model in models)
            wanted = counted[1:end]
            kl += (log_p.exp() * (log_p - log_q)).sum(-1)[wanted].tolist()
            same += (log_p.argmax(-1) == log_q.argmax(-1))[wanted].tolist()
        assert (damage.domain, damage.documents, damage.tokens) == (domain.name, 4, len(kl))
        # Two layers in float32, as in the comparison's own test.
        assert damage.kl_nats.value == pytest.approx(np.mean(kl), rel=1e-4)
        assert damage.kl_p99_nats.value == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
        assert damage.top1_agreement.value == pytest.approx(np.mean(same))
        assert damage.kl_nats.interval is not None
        assert damage.kl_nats.interval.low < damage.kl_nats.value < damage.kl_nats.interval.high


def test_agrees_with_transformers(make_model: MakeModel, tmp_path: Path) -> None:
    original, quantized = make_model("original", **ROOM), make_model("quantized", noise=0.02, **ROOM)
    cache = OriginalCache(tmp_path / "cache")
    stages: list[list[str]] = []
    for _ in range(2):
        seen: list[str] = []

        def record(items: object, stage: str, seen: list[str] = seen) -> object:
            seen.append(stage)
            return items

        (got,) = evaluate_each(original, [quantized], config(), record, cache=cache)  # type: ignore[arg-type]
        check(got, original, quantized)
        stages.append(seen)
    # All domains in one pass over each model, and none over an original that was kept.
    assert [each.count("evaluate: original model") for each in stages] == [1, 0]
    assert [each.count("evaluate: quantized model") for each in stages] == [1, 1]
    (without,) = evaluate_each(original, [quantized], config(None))
    assert without.domains == ()
    assert without.summary == got.summary


def test_calibration_text_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    original, quantized = make_model("original", **ROOM), make_model("quantized", noise=0.02, **ROOM)
    code = domains_of(original)[2]
    monkeypatch.setattr(comparison_module, "stored_spans", lambda _: CalibrationSpans.of(code.rows, row_tokens=20))
    with pytest.raises(CalibrationError, match="are in the calibration text"):
        next(evaluate_each(original, [quantized], config()))
    (got,) = evaluate_each(original, [quantized], replace(config(), allow_calibration_text=True))
    assert [each.text.startswith("NOT HELD OUT") for each in got.domains] == [name == "code" for name in NAMES]


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match=r"domains: not usable\. Got 'wiki'"):
        config("wiki")


def test_command(make_model: MakeModel, tmp_path: Path) -> None:
    original, quantized, other = (
        make_model(name, noise=n, **ROOM) for name, n in (("o", 0.0), ("q", 0.02), ("r", 0.05))
    )
    out = tmp_path / "out"
    command = ["eval", *map(str, (original, quantized, other)), "-r", "2", "-l", "40", "--domains", "-o", str(out)]
    ran = CliRunner().invoke(cli, [*command, "--no-cache", "--device", "cpu"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    content = json.loads((out / "report.json").read_text())
    with (out / "report.domains.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [(each["model"], each["domain"]) for each in records] == [(m, name) for m in "qr" for name in NAMES]
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert '<h2 id="domains">By domain</h2>' in page
    for record, damage in zip(records, [d for each in content["comparisons"] for d in each["domains"]], strict=True):
        assert float(record["kl_nats"]) == damage["kl_nats"]["value"]
        assert float(record["kl_nats_low"]) == damage["kl_nats"]["interval"]["low"]
        ends = damage["kl_nats"]["interval"]
        shown = f"{damage['kl_nats']['value']:.3g} ({ends['low']:.3g} to {ends['high']:.3g})"
        assert shown in text and shown in ran.output
        assert damage["mask"] in text and escape(damage["mask"]) in page
    for verdict, each in zip(content["verdicts"], content["comparisons"], strict=True):
        worst = max(each["domains"], key=lambda damage: damage["kl_nats"]["value"])
        assert f"Most was lost on {worst['domain']}: {worst['kl_nats']['value']:.3g} nats per token" in verdict
    again = CliRunner().invoke(cli, [*command[:-3], "-o", str(out), "--no-cache", "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert not (out / "report.domains.csv").exists()


def with_kl(comparison: Comparison, **numbers: tuple[float, float, float]) -> Comparison:
    rest = {"documents": 4, "tokens": 9, "text": "", "text_fingerprint": "", "mask": ""}
    other = Bootstrapped(0.5, None)
    domains = tuple(
        DomainDamage(
            domain=name,
            kl_nats=Bootstrapped(value, Interval(low, high)),
            kl_p99_nats=other,
            top1_agreement=other,
            **rest,  # type: ignore[arg-type]
        )
        for name, (low, value, high) in numbers.items()
    )
    return replace(comparison, domains=domains)


def test_domains_whose_intervals_meet_are_not_told_apart(comparison: Comparison) -> None:
    alone = with_kl(comparison, chat=(0, 0.1, 0.2), prose=(0.1, 0.15, 0.29), code=(0.3, 0.4, 0.5))
    assert domains_sentence(alone) == "Most was lost on code: 0.4 nats per token (0.3 to 0.5)."
    tied = with_kl(
        comparison, chat=(0, 0.1, 0.31), prose=(0.1, 0.15, 0.29), code=(0.3, 0.4, 0.5), tools=(0.2, 0.35, 0.5)
    )
    assert domains_sentence(tied) == (
        "Most was lost on code: 0.4 nats per token (0.3 to 0.5), within error of chat and tools."
    )
    assert summary_lines(tied)[-1] == domains_sentence(tied)
    assert domains_sentence(comparison) == ""
