import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.files.safetensors_file import save_tensors
from bpwise.errors import CalibrationError, ConfigError, ShapeError
from bpwise.measure.text import rows as rows_module
from bpwise.measure.text.calibration import (
    CalibrationConfig,
    CalibrationSet,
    build_calibration,
    require_ids_below,
)
from bpwise.measure.text.context import require_tokens
from bpwise.measure.text.rows import read_pool
from bpwise.measure.text.sources import Document, TextPart, TextSource
from bpwise.measure.text.tokenizer import leading_ids, load_tokenizer, ordinary_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, RESERVED = 256, 257, 258
VOCAB_SIZE = 264  # padded, as embeddings often are
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
)


def byte_tokenizer(*, adds_bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255 in the order of the byte-level alphabet), then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<reserved>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"bos_token": "<bos>", **({"eos_token": "<eos>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def text_ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def build(source=None, *, tokenizer=None, part="calibration", vocab_size=VOCAB_SIZE, **config) -> CalibrationSet:
    settings = CalibrationConfig(source=None if source is None else str(source), **config)
    return build_calibration(tokenizer or byte_tokenizer(), settings, vocab_size=vocab_size, part=part)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A text in which every place is different."""
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"{number:05d}" for number in range(2000)))
    return path


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rows": 0}, "rows: not usable. Got 0"),
            ({"row_tokens": 1}, "row_tokens: not usable. Got 1"),
            ({"seed": -1}, "seed: not usable. .* from 0"),
            ({"column": "text"}, "need a text"),
            ({"chat_template": True}, "need a text"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_rejects(self, settings: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            CalibrationConfig(**settings)


class TestBuiltin:
    def test_same_seed_same_rows(self) -> None:
        first, second = build(rows=8, row_tokens=64, seed=3), build(rows=8, row_tokens=64, seed=3)
        assert torch.equal(first.tokens, second.tokens)
        assert first.origins == second.origins
        assert first.fingerprint == second.fingerprint
        other = build(rows=8, row_tokens=64, seed=4)
        assert other.fingerprint != first.fingerprint

    def test_global_generator_is_left_alone(self) -> None:
        state = torch.random.get_rng_state()
        build(rows=8, row_tokens=16)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_shape_kinds_and_description(self) -> None:
        calibration = build(rows=16, row_tokens=32, seed=5)
        assert calibration.tokens.shape == (16, 32)
        assert calibration.tokens.dtype == torch.int64
        kinds = calibration.rows_per_kind
        assert {"essays", "languages-east", "programs", "python docs", "python code"} < kinds.keys()
        assert kinds["random token ids"] == 1
        assert len(kinds) == 10
        assert max(kinds.values()) <= 3
        for words in ("calibration part", "15 rows", "seed 5", "1 rows of random", "of 32 tokens", "BOS"):
            assert words in calibration.description

    @pytest.mark.parametrize(("rows", "n_random"), [(7, 0), (8, 1), (32, 2)])
    def test_number_of_random_rows(self, rows: int, n_random: int) -> None:
        origins = build(rows=rows, row_tokens=16).origins
        assert [origin == "random token ids" for origin in origins] == [False] * (rows - n_random) + [True] * n_random

    def test_random_rows_reach_ordinary_tokens_only(self) -> None:
        tokens = build(rows=8, row_tokens=4096).tokens
        drawn = set(tokens[-1, 1:].tolist())
        # 4095 draws from 256: a given id is missing with probability exp(-16).
        assert drawn == set(range(256))

    def test_random_rows_respect_a_smaller_vocabulary(self) -> None:
        tokenizer = byte_tokenizer(adds_bos=False, eos=False)
        assert ordinary_ids(tokenizer, 100) == list(range(100))
        assert ordinary_ids(tokenizer, 10**6) == list(range(256))

    def test_evaluation_has_no_random_rows_and_other_documents(self) -> None:
        calibration, evaluation = (build(rows=16, row_tokens=64, part=p) for p in ("calibration", "evaluation"))
        assert "random token ids" not in evaluation.rows_per_kind
        assert not set(calibration.origins) & set(evaluation.origins)
        assert "evaluation part" in evaluation.description


class TestBos:
    def test_rows_begin_with_bos_once(self, numbered: Path) -> None:
        for calibration in (build(rows=8, row_tokens=16), build(numbered, rows=4, row_tokens=16)):
            assert calibration.adds_bos
            assert "beginning with BOS" in calibration.description
            assert (calibration.tokens[:, 0] == BOS).all()
            assert (calibration.tokens[:, 1:] != BOS).all()

    def test_no_bos_if_the_tokenizer_adds_none(self, numbered: Path) -> None:
        calibration = build(numbered, tokenizer=byte_tokenizer(adds_bos=False), rows=4, row_tokens=16)
        assert not calibration.adds_bos
        assert "without BOS" in calibration.description
        assert (calibration.tokens != BOS).all()

    def test_no_bos_token_at_all(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(adds_bos=False).backend_tokenizer)
        assert tokenizer.bos_token_id is None
        assert leading_ids(tokenizer) == []


class TestUserText:
    def test_rows_are_windows_of_the_text_that_do_not_overlap(self, numbered: Path) -> None:
        text = text_ids(numbered.read_text())
        calibration = build(numbered, rows=10, row_tokens=61, seed=1)
        starts = []
        for row in calibration.tokens[:, 1:].tolist():
            found = [start for start in range(len(text)) if text[start : start + 60] == row]
            assert len(found) == 1
            starts += found
        assert all(later - earlier >= 60 for earlier, later in pairwise(starts))
        assert calibration.origins == ("numbers.txt",) * 10
        assert build(numbered, rows=10, row_tokens=61, seed=2).fingerprint != calibration.fingerprint

    def test_evaluation_rows_are_consecutive_from_the_start(self, numbered: Path) -> None:
        evaluation = build(numbered, rows=10, row_tokens=61, part="evaluation")
        text = text_ids(numbered.read_text())
        assert evaluation.tokens[:, 1:].flatten().tolist() == text[:600]
        assert evaluation.origins[3] == "numbers.txt: window 3"
        assert "consecutive from its start" in evaluation.description
        assert torch.equal(evaluation.tokens, build(numbered, rows=10, row_tokens=61, part="evaluation", seed=9).tokens)

    def test_evaluation_documents_are_joined_by_blank_lines(self, tmp_path: Path) -> None:
        lines = ["alpha", "", "gamma"]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
        evaluation = build(path, rows=1, row_tokens=15, part="evaluation")
        assert evaluation.tokens[0, 1:].tolist() == text_ids("\n\n".join(lines))

    def test_evaluation_goes_on_into_the_next_file(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(name * 10)
        evaluation = build(tmp_path, rows=2, row_tokens=12, part="evaluation")
        assert evaluation.tokens[:, 1:].flatten().tolist() == text_ids("a" * 10 + "\n\n" + "b" * 10)
        # The second window begins with the blank line that belongs to b.txt.
        assert evaluation.origins == ("a.txt: window 0", "b.txt: window 1")
        assert [evaluation.origin_of(0, at) for at in (0, 10, 11)] == ["a.txt: window 0"] * 2 + ["b.txt"]
        assert evaluation.origin_of(1, 11) == "b.txt: window 1"

    @pytest.mark.parametrize("eos", [True, False], ids=["eos", "newline"])
    def test_calibration_documents_are_separated(self, tmp_path: Path, eos: bool) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in ("ab", " ", "cd")))
        calibration = build(path, tokenizer=byte_tokenizer(eos=eos), rows=1, row_tokens=7)
        separator = [EOS] if eos else text_ids("\n")
        assert calibration.tokens[0].tolist() == [
            BOS,
            *text_ids("ab"),
            *separator,
            *text_ids("cd"),
            *separator,
        ]

    def test_every_file_is_represented(self, tmp_path: Path) -> None:
        for name, size in (("a", 100_000), ("b", 1000), ("c", 1000)):
            (tmp_path / f"{name}.txt").write_text(name * size)
        counts = build(tmp_path, rows=12, row_tokens=51).rows_per_kind
        assert counts.keys() == {"a.txt", "b.txt", "c.txt"}
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_small_files_are_made_up_for(self, tmp_path: Path) -> None:
        (tmp_path / "large.txt").write_text("x" * 1000)
        (tmp_path / "small.txt").write_text("y" * 30)
        calibration = build(tmp_path, rows=10, row_tokens=101)
        assert calibration.tokens.shape == (10, 101)

    def test_many_small_files_are_joined(self, tmp_path: Path) -> None:
        for number in range(100):
            (tmp_path / f"{number:03d}.txt").write_text(f"{number:03d}" * 10)
        assert len(set(build(tmp_path, rows=4, row_tokens=100).origins)) == 4

    @pytest.mark.parametrize("part", ["calibration", "evaluation"])
    def test_too_little_text(self, tmp_path: Path, part: str) -> None:
        (tmp_path / "a.txt").write_text("x" * 98)
        message = r"a\.txt: too little text. Got 9[89] tokens. Expected at least 120 for 2 rows of 61\. Lower rows"
        with pytest.raises(CalibrationError, match=message):
            build(tmp_path / "a.txt", rows=2, row_tokens=61, part=part)

    def test_exactly_enough_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x" * 119)  # and EOS
        assert build(tmp_path / "a.txt", rows=2, row_tokens=61).tokens[1, -1] == EOS

    def test_ids_outside_the_model(self, numbered: Path) -> None:
        message = r"Got token id 256. Expected ids below the vocabulary size 200. The text has the token '<bos>'"
        with pytest.raises(CalibrationError, match=message):
            build(numbered, rows=1, row_tokens=8, vocab_size=200)

    @pytest.mark.parametrize("part", ["calibration", "evaluation"])
    def test_half_a_surrogate_pair_is_replaced(self, tmp_path: Path, part: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "ab\\ud83d"}')  # cut in the middle of an emoji
        rows = build(path, rows=1, row_tokens=6, part=part)
        assert rows.tokens[0, 1:].tolist() == text_ids("ab\ufffd")


class TestChat:
    def turns_file(self, tmp_path: Path, role: str = "user") -> Path:
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"messages": [{"role": role, "content": "hi"}]}))
        return path

    def test_rendered_with_one_bos_and_one_eos(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        path = self.turns_file(tmp_path)
        calibration = build(path, tokenizer=tokenizer, rows=1, row_tokens=10, chat_template=True)
        assert calibration.tokens[0].tolist() == [BOS, *text_ids("[user]hi"), EOS]

    def test_eos_and_a_newline_end_a_text_already(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE + "{{ '\n' }}"
        path = self.turns_file(tmp_path)
        path.write_text(f"{path.read_text()}\n{path.read_text()}")
        calibration = build(path, tokenizer=tokenizer, rows=1, row_tokens=21, chat_template=True)
        assert calibration.tokens[0].tolist() == [BOS, *2 * [*text_ids("[user]hi"), EOS, *text_ids("\n")]]

    def test_bos_stays_where_the_tokenizer_adds_none(self, tmp_path: Path) -> None:
        # In such models the same token may begin every turn.
        tokenizer = byte_tokenizer(adds_bos=False)
        tokenizer.chat_template = CHAT_TEMPLATE
        path = self.turns_file(tmp_path)
        calibration = build(path, tokenizer=tokenizer, rows=1, row_tokens=10, chat_template=True)
        assert calibration.tokens[0, 0] == BOS

    def test_shapes_of_sharegpt(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"conversations": [{"from": "human", "value": "hi\ud83d"}]}))
        calibration = build(path, tokenizer=tokenizer, rows=1, row_tokens=13, chat_template=True)
        assert calibration.tokens[0].tolist() == [BOS, *text_ids("[user]hi\ufffd"), EOS]

    def test_a_refused_turn_names_its_line(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        path = self.turns_file(tmp_path)
        path.write_text(f"{path.read_text()}\n{self.turns_file(tmp_path, 'critic').read_text()}")
        with pytest.raises(CalibrationError, match=r"^chat\.jsonl: line 2: the chat template refuses .*unknown role"):
            build(path, tokenizer=tokenizer, rows=1, row_tokens=40, chat_template=True)

    def test_no_template(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="has no chat template"):
            build(self.turns_file(tmp_path), chat_template=True)


class TestPool:
    def source(self, *texts: str) -> TextSource:
        return TextSource("s", (TextPart("p", lambda: (Document(f"p: {i}", t) for i, t in enumerate(texts))),))

    @pytest.mark.parametrize("in_order", [True, False])
    def test_reads_no_more_than_needed(self, in_order: bool) -> None:
        read = []

        def documents():
            for number in range(10**9):
                read.append(number)
                yield Document(f"p: {number}", "x" * 1000)

        source = TextSource("endless", (TextPart("p", documents),))
        pool = read_pool(source, byte_tokenizer(), rows=2, body_tokens=100, in_order=in_order)
        assert 200 <= len(pool.tokens) <= 800
        assert len(read) < 30

    def test_long_documents_are_tokenized_in_pieces_without_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rows_module, "_MIN_CHUNK_CHARACTERS", 50)
        monkeypatch.setattr(rows_module, "_MAX_CHUNK_CHARACTERS", 50)
        text = "\n".join(str(number) * (number % 30) for number in range(100))
        for in_order, end in ((True, []), (False, [EOS])):
            pool = read_pool(self.source(text), byte_tokenizer(), rows=1, body_tokens=10**6, in_order=in_order)
            assert pool.tokens == text_ids(text) + end
            assert pool.starts == [0]

    def test_origin_at_document_borders(self) -> None:
        pool = read_pool(self.source("abc", "de"), byte_tokenizer(), rows=1, body_tokens=7, in_order=False)
        assert [pool.origin_at(position) for position in range(7)] == ["p: 0"] * 4 + ["p: 1"] * 3
        assert [pool.later_origins(first, 4, lead=1) for first in (0, 1, 3, 4)] == [
            (),
            ((4, "p: 1"),),
            ((2, "p: 1"),),
            (),
        ]


class TestSet:
    def test_round_trip(self, tmp_path: Path) -> None:
        calibration = build(rows=8, row_tokens=16)
        calibration.save(tmp_path / "c.safetensors")
        loaded = CalibrationSet.load(tmp_path / "c.safetensors")
        assert torch.equal(loaded.tokens, calibration.tokens)
        for name in ("origins", "description", "adds_bos", "fingerprint", "vocabulary"):
            assert getattr(loaded, name) == getattr(calibration, name)

    def test_fingerprint_depends_on_tokens_shape_and_origins(self) -> None:
        def make(tokens: torch.Tensor, *origins: str) -> str:
            return CalibrationSet(tokens=tokens, origins=origins, description="", adds_bos=False).fingerprint

        tokens = torch.arange(4)
        prints = {
            make(tokens.view(1, 4), "a"),
            make(tokens.view(1, 4), "b"),
            make(tokens.view(2, 2), "a", "b"),
            make(tokens.flip(0).view(1, 4), "a"),
        }
        assert len(prints) == 4
        assert all(len(value) == 32 and int(value, 16) >= 0 for value in prints)

    @pytest.mark.parametrize(
        ("tokens", "error"),
        [
            (torch.zeros(4, dtype=torch.int64), ShapeError),
            (torch.zeros(2, 4, dtype=torch.int64), ShapeError),
            (torch.zeros(1, 4, dtype=torch.int32), CalibrationError),
            (torch.zeros(1, 0, dtype=torch.int64), CalibrationError),
            (torch.full((1, 4), -1), CalibrationError),
        ],
        ids=["vector", "more-rows-than-origins", "int32", "empty", "negative"],
    )
    def test_rejects(self, tokens: torch.Tensor, error: type) -> None:
        with pytest.raises(error, match="calibration set"):
            CalibrationSet(tokens=tokens, origins=("a",), description="", adds_bos=False)

    def metadata(self, **changes: str) -> dict[str, str]:
        return {
            "format": "bpwise-calibration",
            "version": "1",
            "origins": '["a"]',
            "description": "",
            "adds_bos": "false",
            **changes,
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"version": "2"},
                "Got format bpwise-calibration version 2. Expected bpwise-calibration version 1",
            ),
            ({"format": "pt"}, "not a calibration set"),
            ({"origins": "["}, "damaged"),
            ({"origins": "[]"}, "damaged"),
            ({"origins": "[" * 10000}, "damaged"),
            ({"adds_bos": "[" * 10000}, "damaged"),
            ({"origins": '["\\ud800"]'}, "damaged"),
            ({"description": "\ud800"}, "damaged"),
            ({"fingerprint": "0" * 32}, "the contents were changed"),
        ],
        ids=[
            "version",
            "format",
            "json",
            "origins",
            "deep-origins",
            "deep-adds-bos",
            "surrogate-origin",
            "surrogate-description",
            "fingerprint",
        ],
    )
    def test_load_rejects_metadata(self, tmp_path: Path, changes: dict, message: str) -> None:
        path = tmp_path / "c.safetensors"
        save_tensors(path, {"tokens": torch.zeros(1, 4, dtype=torch.int64)}, self.metadata(**changes))
        with pytest.raises(CalibrationError, match=message):
            CalibrationSet.load(path)

    def test_load_rejects_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "c.safetensors"
        with pytest.raises(CalibrationError, match=r"c\.safetensors"):
            CalibrationSet.load(path)
        path.write_bytes(b"junk")
        with pytest.raises(CalibrationError, match=r"c\.safetensors"):
            CalibrationSet.load(path)
        save_tensors(path, {"tokens": torch.zeros(1, 4, dtype=torch.int64)}, None)
        with pytest.raises(CalibrationError, match="not a calibration set"):
            CalibrationSet.load(path)
        save_tensors(path, {"x": torch.zeros(1)}, self.metadata())
        with pytest.raises(CalibrationError, match="damaged"):
            CalibrationSet.load(path)


class TestVocabulary:
    def test_ids_beyond_it(self) -> None:
        rows = torch.tensor([[1, 300]])
        require_ids_below(rows, 301)
        with pytest.raises(CalibrationError, match=r"calibration text: .* Got token id 300. .* vocabulary size 300\."):
            require_ids_below(rows, 300)

    def test_ids_that_mean_something_else(self) -> None:
        rows = build(rows=2, row_tokens=64)
        require_tokens(rows, byte_tokenizer())
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
        other = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
        with pytest.raises(CalibrationError, match="made with another tokenizer"):
            require_tokens(rows, PreTrainedTokenizerFast(tokenizer_object=other))

    def test_sets_of_earlier_versions_do_not_say(self) -> None:
        rows = replace(build(rows=2, row_tokens=64), vocabulary=None)
        require_tokens(rows, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


class TestLoadTokenizer:
    def test_round_trip(self, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer("ab")["input_ids"] == [BOS, *text_ids("ab")]
        assert ordinary_ids(tokenizer, VOCAB_SIZE) == list(range(256))

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="no such directory"):
            load_tokenizer(tmp_path / "none")

    @pytest.mark.parametrize("damaged", [False, True], ids=["no-files", "damaged"])
    def test_bad_files(self, tmp_path: Path, damaged: bool) -> None:
        if damaged:
            byte_tokenizer().save_pretrained(tmp_path)
            (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
        with pytest.raises(CalibrationError, match="its tokenizer cannot be loaded"):
            load_tokenizer(tmp_path)
