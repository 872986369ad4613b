import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.errors import CalibrationError
from bpwise.measure.text.tokenizer import (
    LoadedTokenizer,
    end_ids,
    leading_ids,
    load_tokenizer,
    ordinary_ids,
    token_fingerprint,
)
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def directory(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    byte_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_panic_of_the_library_is_a_sentence(directory: Path) -> None:
    # The text begins with a token that is not in the table of special tokens.
    edit(directory / "tokenizer.json", lambda tokenizer: tokenizer["post_processor"].update(special_tokens={}))
    with pytest.raises(BaseException, match="no entry found") as panic:
        AutoTokenizer.from_pretrained(directory)("a")
    assert not isinstance(panic.value, Exception)
    with pytest.raises(CalibrationError, match=f"^{directory}: its tokenizer fails"):
        load_tokenizer(directory)


@pytest.mark.parametrize("value", ['"x"', "{}", "[1]"])
def test_settings_of_the_wrong_type(directory: Path, value: str) -> None:
    edit(directory / "tokenizer_config.json", lambda config: config.update(model_max_length=json.loads(value)))
    with pytest.raises(CalibrationError, match=f"^{directory}: its tokenizer"):
        load_tokenizer(directory)


def test_long_reasons_are_cut(directory: Path) -> None:
    edit(directory / "tokenizer.json", lambda tokenizer: tokenizer.update(version="x" * 5000))
    with pytest.raises(CalibrationError, match="cannot be loaded") as refused:
        load_tokenizer(directory)
    assert len(str(refused.value)) < 600


class Failing:
    """Raises whatever it is asked for."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error

    def __len__(self) -> int:
        raise self._error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    "use",
    [
        leading_ids,
        len,
        lambda tokenizer: ordinary_ids(tokenizer, 10),
        lambda tokenizer: tokenizer("x"),
        lambda tokenizer: tokenizer.decode([1]),
        lambda tokenizer: tokenizer.convert_ids_to_tokens([1]),
        lambda tokenizer: tokenizer.eos_token_id,
        lambda tokenizer: tokenizer.added_tokens_decoder,
        lambda tokenizer: tokenizer.special_tokens_map,
    ],
)
def test_every_use_is_explained(use: Callable[[Any], object], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=rf"^{tmp_path}: its tokenizer fails \(first line second\)\."):
        use(LoadedTokenizer(tmp_path, Failing(RuntimeError("first line\nsecond"))))
    with pytest.raises(KeyboardInterrupt):
        use(LoadedTokenizer(tmp_path, Failing(KeyboardInterrupt())))


def test_an_id_that_is_no_number(tmp_path: Path) -> None:
    class Odd:
        eos_token_id = (1, 2)

    with pytest.raises(CalibrationError, match=r"its tokenizer fails \(eos_token_id is \(1, 2\)\)"):
        _ = LoadedTokenizer(tmp_path, Odd()).eos_token_id


@pytest.mark.parametrize("named", [[{"a": 1}, 2, [3], True, -4, None], 2])
def test_ends_that_are_no_ids_are_left_out(
    named: object, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    tokenizer = load_tokenizer(tmp_path)
    assert end_ids(tmp_path, tokenizer) == {2, tokenizer.eos_token_id}


def test_decoding_gives_valid_text(tmp_path: Path) -> None:
    class Halves:
        def decode(self, ids: object) -> str:
            return "a\ud83d"

    assert LoadedTokenizer(tmp_path, Halves()).decode([1]) == "a\ufffd"


class TestFingerprint:
    def tokenizer(self, *tokens: str) -> PreTrainedTokenizerFast:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))

    def test_only_the_ids_in_the_rows_matter(self) -> None:
        rows = torch.tensor([[0, 1, 1], [1, 0, 1]])
        small = token_fingerprint(self.tokenizer("a", "b"), rows)
        assert small == token_fingerprint(self.tokenizer("a", "b", "c"), rows)
        assert small != token_fingerprint(self.tokenizer("a", "c", "b"), rows)
        assert small != token_fingerprint(self.tokenizer("a", "b", "c"), torch.tensor([[0, 1, 2]]))

    def test_ids_that_the_tokenizer_does_not_have(self) -> None:
        rows = torch.tensor([[0, 7]])
        assert token_fingerprint(self.tokenizer("a"), rows) != token_fingerprint(self.tokenizer(*"abcdefgh"), rows)


def test_phi_3_whose_rope_type_is_su(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    # Transformers 5 does not take such a config, which Phi-3's first files of long contexts have.
    byte_tokenizer.save_pretrained(tmp_path)
    factors = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
    config = {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": {"type": "su", **factors}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))("text")["input_ids"]
    assert load_tokenizer(tmp_path)("text")["input_ids"] == expected
