"""Calibration rows of several sources: what an option means, and what the rows are."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.errors import BpwiseWarning, CalibrationError, ConfigError, UnreachableTextError
from bpwise.eval.config import EvalConfig
from bpwise.measure import calibrated
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.mixture import MIX, Share, rows_of, shares_of, spread_places
from bpwise.quantize.config import QuantizeConfig


def shares(*weights: float) -> tuple[Share, ...]:
    return tuple(Share(f"source-{index}", weight) for index, weight in enumerate(weights))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {"built-in": 1}),
        ("self", {"self": 1}),
        ("self=2,built-in", {"self": 2, "built-in": 1}),
        ("allenai/c4:en:train=0.5,a b.txt=3", {"allenai/c4:en:train": 0.5, "a b.txt": 3}),
    ],
)
def test_sources_have_shares(text: str | None, expected: dict[str, float]) -> None:
    assert {share.source: share.share for share in shares_of(text)} == expected


def test_a_path_that_exists_is_one_source(tmp_path: Path) -> None:
    for name in ("a,b.txt", "c=2"):
        (tmp_path / name).write_text("text")
        assert shares_of(str(tmp_path / name)) == (Share(str(tmp_path / name), 1.0),)
    both = shares_of(f"{tmp_path / 'c=2'},self=2")
    assert both == (Share(str(tmp_path / "c=2"), 1.0), Share("self", 2.0))


def test_names_are_names_whatever_the_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {name: shares_of(name) for name in ("mix", "self", "built-in")}
    for name, shares_before in before.items():
        (tmp_path / name).mkdir()
        assert shares_of(name) == shares_before
        assert shares_of(f"./{name}") == (Share(f"./{name}", 1.0),)


def test_a_source_that_is_named_twice_is_one() -> None:
    assert shares_of("self, built-in,self=0.5") == (Share("self", 1.5), Share("built-in", 1.0))


@pytest.mark.parametrize("text", ["mix", "self", "a.txt,b.txt", "built-in,self"])
def test_only_one_text_is_evaluated_on(text: str) -> None:
    with pytest.raises(ConfigError, match="not usable to evaluate on"):
        EvalConfig(text=text)
    QuantizeConfig(evaluate=EvalConfig(text="built-in"))  # its halves share nothing


def test_a_saved_set_stands_alone() -> None:
    with pytest.raises(ConfigError, match="Name the set alone"):
        CalibrationConfig(source="rows.safetensors,self")


@pytest.mark.parametrize("text", ["", ",", "self,", "self=0", "=2", "self,,built-in", "self=.5", "self=1e3", "self=-1"])
def test_sources_without_name_or_share_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Expected SOURCE or SOURCE=SHARE"):
        CalibrationConfig(source=text)


def test_a_mix_has_a_license_for_every_set() -> None:
    found = shares_of(f"{MIX}=3,self=1")
    assert [share.source for share in found if not share.license] == ["self"]
    assert sum(share.share for share in found) == pytest.approx(4)
    assert {"allenai/c4:en", "wikimedia/wikipedia:20231101.zh"} <= {share.source for share in found}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "built-in"),
        (f"{MIX}=3,self", f"{MIX}=3,self=1"),
        ("/of/somebody/words.txt", "words.txt"),
        ("/of/somebody/words.txt=0.5,built-in", "words.txt=0.5,built-in=1"),
    ],
)
def test_what_is_told_of_sources_can_be_read_again(source: str | None, told: str) -> None:
    options = CalibrationConfig(source=source).options
    assert options.source == told
    assert [each.license for each in shares_of(options.source)] == [each.license for each in shares_of(source)]


@pytest.mark.parametrize(
    ("weights", "rows", "expected"),
    [
        ((1, 1), 4, [2, 2]),
        ((3, 1), 32, [24, 8]),
        ((2, 1), 16, [11, 5]),
        ((98, 1, 1), 8, [6, 1, 1]),
        ((1, 3), 1, [0, 1]),
    ],
)
def test_rows_are_shared_out(weights: tuple[float, ...], rows: int, expected: list[int]) -> None:
    assert rows_of(shares(*weights), rows) == expected


def test_rows_of_a_source_are_spread_over_all() -> None:
    counts = [5, 10, 1]
    places = spread_places(counts)
    assert Counter(source for source, _ in places) == {0: 5, 1: 10, 2: 1}
    for source, count in enumerate(counts):
        assert [row for of, row in places if of == source] == list(range(count))
        for end in range(17):  # of the first rows a source has its part, to a row
            part = Fraction(end * count, 16)
            assert abs(sum(of == source for of, _ in places[:end]) - part) <= 1


def test_rows_come_from_every_source(make_model: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, range(4000))))
    checkpoint = Checkpoint.open(make_model("model", vocab_size=264))
    config = CalibrationConfig(source=f"{text}=2,built-in,self", rows=8, row_tokens=20)
    rows = calibration_rows(checkpoint, config, device="cpu")
    alone = calibration_rows(checkpoint, CalibrationConfig(source=str(text), rows=4, row_tokens=20), device="cpu")
    ours = [row for row, origin in zip(rows.tokens, rows.origins, strict=True) if origin.startswith("numbers.txt")]
    assert [row.tolist() for row in ours] == alone.tokens.tolist()
    assert Counter(origin.split(": ")[0] for origin in rows.origins)["written by the model"] == 2
    for part in (alone.description, "Python", "written by the model itself"):
        assert part in rows.description
    assert rows.adds_bos
    rows.save(tmp_path / "rows.safetensors")
    calibration_rows(checkpoint, config, given=CalibrationSet.load(tmp_path / "rows.safetensors"))  # its own tokenizer


def test_a_column_is_that_of_the_texts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = (json.dumps({"words": f"one two three {number}"}) for number in range(400))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    checkpoint = Checkpoint.open(make_model("model", vocab_size=264))
    config = CalibrationConfig(source=f"built-in,self,{tmp_path / 'rows.jsonl'}", column="words", rows=6, row_tokens=16)
    made = calibration_rows(checkpoint, config, device="cpu")
    assert Counter("rows.jsonl" in origin for origin in made.origins) == {True: 2, False: 4}
    for source in ("self", "built-in", "built-in,self"):
        with pytest.raises(ConfigError, match="need a text"):
            CalibrationConfig(source=source, column="words")


@pytest.mark.parametrize("reached", ["wikimedia", "nothing"])
def test_text_takes_the_place_of_sets_that_cannot_be_reached(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, reached: str
) -> None:
    build = calibrated.build_calibration

    def offline(tokenizer: Any, config: CalibrationConfig, **options: Any) -> CalibrationSet:
        if config.source == "built-in":
            return build(tokenizer, config, **options)
        assert config.column == ("words" if config.source == "words.jsonl" else None)
        if config.source != "words.jsonl" and not str(config.source).startswith(reached):
            raise UnreachableTextError("no network")
        number = hash(config.source) % 200
        return CalibrationSet(
            tokens=torch.full((config.rows, config.tokens_each), number),
            origins=(str(config.source),) * config.rows,
            description=str(config.source),
            adds_bos=True,
        )

    monkeypatch.setattr(calibrated, "build_calibration", offline)
    checkpoint = Checkpoint.open(make_model("model", vocab_size=264))
    config = CalibrationConfig(source=f"{MIX}=3,built-in,words.jsonl", column="words", rows=40, row_tokens=64)
    with pytest.warns(BpwiseWarning, match=r"cannot be reached. Got 'no network'") as told:
        rows = calibration_rows(checkpoint, config)
    missing = [share for share in shares_of(MIX) if not share.source.startswith(reached)]
    assert len(told) == len(missing)
    assert len(rows.tokens) == 40
    made = zip(rows.tokens.tolist(), rows.origins, strict=True)
    own = [row for row, origin in made if "wikimedia" not in origin and origin != "words.jsonl"]
    assert len({tuple(row) for row in own}) == len(own) >= 10  # none is taken twice
    assert ("wikimedia/wikipedia:20231101.en (license: CC BY-SA 3.0 and GFDL)" in rows.description) == (
        reached == "wikimedia"
    )
    assert "allenai" not in rows.description
    assert "bpwise's own texts" in rows.description
    with warnings.catch_warnings(), pytest.raises(CalibrationError, match="no network"):
        warnings.simplefilter("error")
        calibration_rows(checkpoint, CalibrationConfig(source="allenai/c4:en", rows=8, row_tokens=16))
