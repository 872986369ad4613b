import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.vocabulary import tokens_beyond
from bpwise.errors import BpwiseWarning
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.saved_decoders import save_decoder

MakeModel = Callable[..., Path]


def added(directory: Path, *tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(directory)


def test_a_tokenizer_that_fits_is_not_mentioned(make_model: MakeModel) -> None:
    # 258 tokens, 264 rows: embeddings are often padded.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(make_model("m"))


def test_tokens_that_were_added(make_model: MakeModel) -> None:
    directory = make_model("m", vocab_size=258)
    added(directory, "<|im_start|>", "<|im_end|>")
    with pytest.warns(BpwiseWarning, match=r"Got '<\|im_start\|>' \(258\), '<\|im_end\|>' \(259\)\. .* the 258 rows"):
        checkpoint = open_model(directory)
    # Transformers is the other route.
    vocabulary = AutoTokenizer.from_pretrained(directory).get_vocab()
    assert tokens_beyond(checkpoint) == {id_: token for token, id_ in vocabulary.items() if id_ >= 258}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(checkpoint)  # once for a run


def test_an_embedding_by_a_name_that_is_not_usual(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_decoder(tmp_path, "gpt_neox", vocab_size=258)  # gpt_neox.embed_in.weight
    byte_tokenizer.save_pretrained(tmp_path)
    added(tmp_path, "<x>")
    with pytest.warns(BpwiseWarning, match="the 258 rows of the embedding"):
        assert tokens_beyond(open_model(tmp_path)) == {258: "<x>"}


def test_many_are_counted(make_model: MakeModel) -> None:
    directory = make_model("m", vocab_size=258)
    added(directory, *(f"<{number}>" for number in range(12)))
    with pytest.warns(BpwiseWarning, match=r"'<4>' \(262\) and 7 more\."):
        open_model(directory)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<x>": 264, "<y>": 263}),
        ("vocab.json", {"<x>": 264}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"264": {"content": "<x>"}, "9" * 5000: {"content": "<z>"}}},
        ),
    ],
    ids=["added_tokens", "vocab", "decoder"],
)
def test_other_files(make_model: MakeModel, file: str, content: dict[str, object]) -> None:
    directory = make_model("m")
    (directory / file).write_text(json.dumps(content))
    assert tokens_beyond(Checkpoint.open(directory)) == {264: "<x>"}


def test_a_vocabulary_with_scores(make_model: MakeModel) -> None:
    directory = make_model("m", vocab_size=3)
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("c", -2.0)]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0))).save_pretrained(directory)
    assert tokens_beyond(Checkpoint.open(directory)) == {3: "c"}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model": 3, "added_tokens": {}}', '{"model": {"vocab": [3, []]}, "added_tokens": [{"id": "x"}, 1]}'],
)
def test_damaged_files_say_nothing(make_model: MakeModel, content: str) -> None:
    directory = make_model("m")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (directory / name).write_text(content)
    assert tokens_beyond(Checkpoint.open(directory)) == {}
