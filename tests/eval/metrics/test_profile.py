import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.opening import open_any
from bpwise.errors import ConfigError
from bpwise.eval import cache as cache_module
from bpwise.eval.cache import OriginalCache, OriginalState, default_cache_directory, original_key
from bpwise.eval.comparison import Comparison, EvalConfig, compare_models, compare_with
from bpwise.eval.metrics.divergence import TokenStatistics, token_statistics
from bpwise.eval.metrics.profile import Profile, profile_of
from bpwise.eval.original import run_original
from bpwise.eval.report.paired import paired_differences
from bpwise.measure.text.calibration import CalibrationSet

MakeModel = Callable[..., Path]
ORIGINS = ("prose: a.txt", "code: b.py", "prose: c.txt", "code", "prose: d.txt")
VOCABULARY = 30


class Letters:
    """A tokenizer, as far as decoding goes."""

    def decode(self, token_ids: Any) -> str:
        return "".join(f"<{token}>" for token in token_ids)


def rows_of(row_tokens: int = 12) -> CalibrationSet:
    tokens = torch.randint(VOCABULARY, (len(ORIGINS), row_tokens), generator=torch.Generator().manual_seed(5))
    return CalibrationSet(tokens=tokens, origins=ORIGINS, description="random ids", adds_bos=False)


def statistics_of(rows: CalibrationSet, noise: float = 0.3) -> TokenStatistics:
    rng = torch.Generator().manual_seed(1)
    targets = rows.tokens[:, 1:].flatten()
    original = 3 * torch.randn(len(targets), VOCABULARY, generator=rng)
    return token_statistics(original, original + noise * torch.randn(original.shape, generator=rng), targets)


def profile(row_tokens: int = 12) -> tuple[Profile, TokenStatistics, CalibrationSet]:
    rows = rows_of(row_tokens)
    statistics = statistics_of(rows)
    return profile_of(statistics, rows, Letters()), statistics, rows


class TestProfile:
    @pytest.mark.parametrize(
        ("row_tokens", "buckets"),
        [(2, [(1, 1)]), (9, [(1, 1), (2, 3), (4, 7), (8, 8)]), (8, [(1, 1), (2, 3), (4, 7)])],
        ids=["two-tokens", "one-over", "whole"],
    )
    def test_positions(self, row_tokens: int, buckets: list[tuple[int, int]]) -> None:
        got, statistics, rows = profile(row_tokens)
        assert [(bucket.first, bucket.last) for bucket in got.positions] == buckets
        kl = statistics.kl_nats.double().view(len(rows.tokens), -1).numpy()
        for bucket in got.positions:
            # The prediction in column c has seen c + 1 tokens.
            values = [kl[:, c] for c in range(kl.shape[1]) if bucket.first <= c + 1 <= bucket.last]
            assert bucket.kl_nats.value == pytest.approx(np.mean(values), rel=1e-12)
            spread = np.mean(values, axis=0).std(ddof=1) / math.sqrt(len(kl))
            assert bucket.kl_nats.standard_error == pytest.approx(spread, rel=1e-12)

    def test_perplexity_by_position(self) -> None:
        got, statistics, rows = profile(9)
        first, second = (
            nll.double().view(len(rows.tokens), -1)[:, 3:7].mean().item()
            for nll in (statistics.original_nll_nats, statistics.quantized_nll_nats)
        )
        bucket = got.positions[2]
        assert (bucket.first, bucket.last) == (4, 7)
        assert bucket.original_perplexity.value == pytest.approx(math.exp(first), rel=1e-12)
        assert bucket.perplexity_ratio.value == pytest.approx(math.exp(second - first), rel=1e-12)

    def test_a_token_that_is_impossible_for_the_original(self) -> None:
        rows = rows_of(2)
        logits = torch.zeros(len(rows.tokens), VOCABULARY)
        logits[torch.arange(len(logits)), rows.tokens[:, 1]] = -1e4
        got = profile_of(token_statistics(logits, logits, rows.tokens[:, 1]), rows, None)
        assert got.positions[0].original_perplexity.value > 1e300
        assert got.positions[0].perplexity_ratio.value == 1.0

    @pytest.mark.parametrize("row_tokens", [32769, 40000])
    def test_positions_beyond_32k(self, row_tokens: int) -> None:
        rows = CalibrationSet(
            tokens=torch.zeros(1, row_tokens, dtype=torch.int64), origins=("code",), description="zeros", adds_bos=False
        )
        logits = torch.zeros(row_tokens - 1, 2)
        got = profile_of(token_statistics(logits, logits, rows.tokens[0, 1:]), rows, None)
        assert (got.positions[-1].first, got.positions[-1].last) == (32768, row_tokens - 1)
        assert got.positions[-1].original_perplexity.value == pytest.approx(2.0)

    def test_kinds(self) -> None:
        got, statistics, rows = profile()
        assert [(kind.kind, kind.rows) for kind in got.kinds] == [("prose", 3), ("code", 2)]
        kl = statistics.kl_nats.double().view(len(rows.tokens), -1).numpy()
        change = (statistics.quantized_nll_nats - statistics.original_nll_nats).double().view(len(kl), -1).numpy()
        for kind, members in zip(got.kinds, ([0, 2, 4], [1, 3]), strict=True):
            assert kind.kl_nats.value == pytest.approx(kl[members].mean(), rel=1e-12)
            assert kind.perplexity_ratio.value == pytest.approx(np.exp(change[members].mean()), rel=1e-6)

    def test_histogram(self) -> None:
        rows = rows_of()
        statistics = statistics_of(rows)
        kl = statistics.kl_nats.clone()
        kl[:3] = torch.tensor([-1e-9, 0.0, 1e-14])
        got = profile_of(replace(statistics, kl_nats=kl), rows).histogram
        assert got.edge_nats(0) == pytest.approx(1e-12)
        assert sum(got.counts) == len(kl)
        assert got.counts[0] == 3
        values = kl.double().numpy()
        for index in range(1, len(got.counts)):
            inside = (values >= got.edge_nats(index)) & (values < got.edge_nats(index + 1))
            assert got.counts[index] == inside.sum()
        assert got.counts[-1] > 0

    def test_histogram_of_extremes(self) -> None:
        rows = rows_of()
        statistics = statistics_of(rows)
        for value in (0.0, 1e9):
            got = profile_of(replace(statistics, kl_nats=torch.full_like(statistics.kl_nats, value)), rows).histogram
            assert got.counts == (len(statistics.kl_nats),)

    def test_worst_tokens(self) -> None:
        got, statistics, rows = profile(80)
        order: list[int] = []  # the largest, but at most two of a row
        for each in np.argsort(-statistics.kl_nats.numpy(), kind="stable").tolist():
            order += [each] if [index // 79 for index in order].count(each // 79) < 2 else []
        assert len(got.worst) == len(order) == 10
        for worst, index in zip(got.worst, order, strict=True):
            row, column = divmod(int(index), 79)
            assert (worst.row, worst.position) == (row, column + 1)
            assert worst.kl_nats == pytest.approx(float(statistics.kl_nats[index]))
            before = rows.tokens[row, : column + 1].tolist()[-48:]
            assert list(worst.context_ids) == before
            assert worst.context == "".join(f"<{token}>" for token in before)
            assert worst.original.id == int(rows.tokens[row, column + 1])
            assert worst.original.probability == pytest.approx(math.exp(-float(statistics.original_nll_nats[index])))
            assert [choice.id for choice in worst.quantized_choices] == statistics.quantized_top[index].tolist()
            assert worst.origin == ORIGINS[row]

    def test_worst_tokens_name_the_text_that_they_are_from(self) -> None:
        rows = replace(rows_of(80), later_origins=tuple(((20, f"second {n}"), (50, f"third {n}")) for n in range(5)))
        got = profile_of(statistics_of(rows), rows)
        for worst in got.worst:
            row, at = worst.row, worst.position
            assert worst.origin == (ORIGINS[row] if at < 20 else f"{'second' if at < 50 else 'third'} {row}")
        assert len({worst.origin.split()[0] for worst in got.worst}) > 1

    def test_without_a_tokenizer_there_are_ids(self) -> None:
        rows = rows_of()
        got = profile_of(statistics_of(rows), rows)
        assert got.worst[0].context is None
        assert got.worst[0].original_choices[0].text is None

    def test_row_means(self) -> None:
        got, statistics, rows = profile()
        means = statistics.kl_nats.double().view(len(rows.tokens), -1).numpy().mean(axis=1)
        np.testing.assert_allclose(got.row_means.kl_nats, means, rtol=1e-12)


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"device": "cpu", **changes})


def compared(make_model: MakeModel, noises: tuple[float, ...], tokens: int = 20) -> list[Comparison]:
    run = run_original(open_any(make_model("original")), rows_of(tokens), config())
    return [compare_with(run, open_any(make_model(f"noise-{noise}", noise=noise))) for noise in noises]


class TestPaired:
    def test_against_formulas(self, make_model: MakeModel) -> None:
        first, second = compared(make_model, (0.01, 0.02))
        (got,) = paired_differences([first, second])
        assert (got.first, got.second) == ("noise-0.01", "noise-0.02")
        a, b = (np.array(each.profile.row_means.kl_nats) for each in (first, second))
        error = (b - a).std(ddof=1) / math.sqrt(5)
        assert got.kl_nats.value == pytest.approx(second.summary.kl_nats.value - first.summary.kl_nats.value)
        assert got.kl_nats.standard_error == pytest.approx(error)
        assert got.kl_interval is not None
        # Student's t for 4 degrees of freedom, from tables.
        assert got.kl_interval.high == pytest.approx((b - a).mean() + 2.7764451 * error, rel=1e-6)
        ratio = second.summary.quantized_perplexity.value / first.summary.quantized_perplexity.value
        assert got.perplexity_ratio.value == pytest.approx(ratio, rel=1e-9)
        assert got.perplexity_interval is not None
        assert got.perplexity_interval.low < ratio < got.perplexity_interval.high
        assert got.top1_agreement.value == pytest.approx(
            second.summary.top1_agreement.value - first.summary.top1_agreement.value
        )

    def test_all_pairs(self, make_model: MakeModel) -> None:
        comparisons = compared(make_model, (0.01, 0.02, 0.03))
        pairs = [(each.first[6:], each.second[6:]) for each in paired_differences(comparisons)]
        assert pairs == [("0.01", "0.02"), ("0.01", "0.03"), ("0.02", "0.03")]

    def test_refuses_another_text(self, make_model: MakeModel) -> None:
        first, second = compared(make_model, (0.01, 0.02))
        with pytest.raises(ConfigError, match="another text fingerprint than noise"):
            paired_differences([first, replace(second, text_fingerprint="else")])
        with pytest.raises(ConfigError, match="no comparisons"):
            paired_differences([])


def state_of(hidden: torch.Tensor) -> OriginalState:
    return OriginalState(
        hidden=hidden, trace=torch.ones(2, 1, 2, 3), floor_nats=1e-9, bfloat16_nats=1e-5, floor_tokens=3
    )


class TestCache:
    def test_second_run_does_not_run_the_original(self, make_model: MakeModel, tmp_path: Path) -> None:
        # The model is saved once: its files' times are part of the key.
        original, quantized = open_any(make_model("original")), open_any(make_model("quantized", noise=0.02))
        cache = OriginalCache(tmp_path / "cache")
        plain = compare_models(original, quantized, rows_of(), config())
        stages: list[list[str]] = []
        for _ in range(2):
            seen: list[str] = []

            def record(items: Any, stage: str, seen: list[str] = seen) -> Any:
                seen.append(stage)
                return items

            run = run_original(original, rows_of(), config(), record, cache=cache)
            assert replace(compare_with(run, quantized), seconds=0) == replace(plain, seconds=0)
            stages.append(seen)
        passes = ["", " in float64", " in bfloat16"]
        assert stages == [[*(f"evaluate: original model{each}" for each in passes), "evaluate: logits"], []]

    def test_key(self, make_model: MakeModel) -> None:
        path = make_model("original")
        tokens = rows_of().tokens
        changed = tokens.clone()
        changed[-1, -1] = 1 - changed[-1, -1].clamp(max=1)

        def key(tokens: torch.Tensor = tokens, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
            return original_key(open_any(path), [tokens], dtype=dtype, device=device)

        before = key()
        others = [key(changed), key(tokens.view(-1, 6)), key(dtype=torch.bfloat16), key(device="cuda")]
        weights = path / "model.safetensors"
        weights.touch()
        assert key() == before
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert len({before, *others, key()}) == 6

    @pytest.mark.parametrize("damage", ["cut", "flipped", "floor", "beyond-floats", "nonsense"])
    def test_damage_is_absence(self, tmp_path: Path, damage: str) -> None:
        cache = OriginalCache(tmp_path)
        state = state_of(torch.randn(2, 3, 4).bfloat16())
        cache.save("key", state)
        got = cache.load("key")
        assert got is not None
        assert torch.equal(got.hidden, state.hidden)
        assert torch.equal(got.trace, state.trace)
        assert (got.floor_nats, got.bfloat16_nats, got.floor_tokens) == (1e-9, 1e-5, 3)
        assert got.hidden.dtype == torch.bfloat16
        assert cache.load("other") is None
        (path,) = tmp_path.iterdir()
        content = bytearray(path.read_bytes())
        if damage == "cut":
            content = content[:-1]
        elif damage == "flipped":
            content[-3] ^= 1
        elif damage == "floor":
            content = content.replace((1e-9).hex().encode(), (2e-9).hex().encode().ljust(len((1e-9).hex())))
        elif damage == "beyond-floats":
            content = content.replace((1e-9).hex().encode(), b"0x1p99999".ljust(len((1e-9).hex())))
        else:
            content = bytearray(b"x")
        path.write_bytes(content)
        assert cache.load("key") is None
        cache.save("key", state)
        assert cache.load("key") is not None

    def test_another_key_is_not_believed(self, tmp_path: Path) -> None:
        cache = OriginalCache(tmp_path)
        cache.save("key", state_of(torch.zeros(1, 2, 3)))
        (path,) = tmp_path.iterdir()
        path.rename(path.with_name(path.name.replace("key", "other")))
        assert cache.load("other") is None

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        cache = OriginalCache(tmp_path / "file")
        with pytest.warns(UserWarning, match="not kept for the next time"):
            cache.save("key", state_of(torch.zeros(1, 2, 3)))
        assert cache.load("key") is None

    def test_one_that_may_only_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        cache = OriginalCache(tmp_path)
        cache.save("key", state_of(torch.zeros(1, 2, 3)))
        monkeypatch.setattr(os, "utime", read_only)
        assert cache.load("key") is not None

    def test_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(ConfigError, match="--cache-dir or --no-cache"):
            default_cache_directory()

    def test_what_a_killed_run_left_goes(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        (tmp_path / f".old.original.safetensors.partial-{ended.pid}-00ff00ff").write_text("half")
        OriginalCache(tmp_path).save("key", state_of(torch.zeros(1, 2, 3)))
        assert [path.name for path in tmp_path.iterdir()] == ["key.original.safetensors"]

    def test_oldest_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = OriginalCache(tmp_path)
        state = state_of(torch.zeros(1, 100, 10))
        for number, key in enumerate(("a", "b", "c")):
            cache.save(key, state)
            (path,) = tmp_path.glob(f"{key}.*")
            os.utime(path, ns=(number, number))
        assert cache.load("a") is not None  # used just now, so b is the oldest
        monkeypatch.setattr(cache_module, "_LIMIT_BYTES", 3 * 4500)
        cache.save("d", state)
        assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "c", "d"]
