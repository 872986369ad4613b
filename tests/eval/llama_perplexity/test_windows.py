"""The text that is run: its bytes, its tokens, its windows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.errors import CalibrationError
from bpwise.eval.llama_perplexity import windows
from bpwise.eval.llama_perplexity.windows import cut_windows, model_input, read_text
from bpwise.measure.text.sources import Document, TextPart, TextSource
from bpwise.measure.text.tokenizer import LoadedTokenizer
from transformers import PreTrainedTokenizerFast

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n"]
"""As the Hub has them; what stands in the file is the next."""
FILE = " \n = Robert Boulter = \n \n Robert Boulter is an English actor . \n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows of a data set on the Hub."""
    rows = list(ROWS)

    def documents() -> Iterator[Document]:
        return (Document(f"wikitext: row {number}", row) for number, row in enumerate(rows))

    def read(source: str, **_: Any) -> TextSource:
        assert source == WIKITEXT
        return TextSource(source, (TextPart("wikitext", documents),))

    monkeypatch.setattr(windows, "read_texts", read)
    return rows


def test_rows_of_the_hub_are_the_lines_of_the_file(hub: list[str], tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_bytes(FILE.encode())
    assert read_text(WIKITEXT) == read_text(tmp_path / "wiki.test.raw") == FILE[:-1]


def test_rows_that_are_no_lines_are_refused(hub: list[str]) -> None:
    hub.append("no newline")
    with pytest.raises(CalibrationError, match=r"wikitext: row 4: not a line of a file\."):
        read_text(WIKITEXT)


@pytest.mark.parametrize(("data", "said"), [(b"\xff", "UTF-8"), (None, "cannot be read")], ids=["bytes", "missing"])
def test_files_that_are_no_text(data: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "text.raw"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CalibrationError, match=said):
        read_text(str(path))


def test_windows(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"ab<eos>\r\ncd\n\n")
    tokenizer = LoadedTokenizer(tmp_path, byte_tokenizer)
    rows = cut_windows(tokenizer, tmp_path / "text", window_tokens=4)
    # BOS; every byte, those of a special token's name too; the last newline and what fills no window are left out.
    ids = [256, *byte_tokenizer.convert_tokens_to_ids(list("ab<eos>čĊcd"))]
    assert rows.tokens.tolist() == [ids[0:4], ids[4:8], ids[8:12]]
    assert cut_windows(tokenizer, tmp_path / "text", window_tokens=4, most=1).tokens.tolist() == [ids[:4]]
    with pytest.raises(CalibrationError, match=r"Got 13 tokens\. Expected at least 14, two windows"):
        cut_windows(tokenizer, tmp_path / "text", window_tokens=7)


def test_every_window_begins_with_bos_if_the_text_does() -> None:
    tokens = torch.tensor([[9, 1], [2, 3]])
    assert model_input(tokens, 9).tolist() == [[9, 1], [9, 3]]
    assert model_input(tokens, 8).tolist() == model_input(tokens, None).tolist() == tokens.tolist()
    assert tokens.tolist() == [[9, 1], [2, 3]]
