import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from bpwise.errors import CalibrationError, ConfigError
from bpwise.measure.text import builtin_text
from bpwise.measure.text.builtin_text import builtin_texts
from bpwise.measure.text.sources import Document, read_texts

ROWS = [{"title": "one", "text": "First text."}, {"title": "two", "text": "Second text."}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    return path


def texts(*args, **kwargs) -> list[str]:
    return [document.text for document in read_texts(*args, **kwargs).documents()]


def render(turns, where) -> str:
    return "|".join(f"{turn['role']}={turn['content']}" for turn in turns)


row_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\n\nzweite Zeile\n".encode())  # with a byte order mark
    source = read_texts(path)
    assert source.description == "a.txt"
    assert list(source.documents()) == [Document("a.txt", "Grüße\n\nzweite Zeile\n")]


@row_formats
def test_rows_of_the_default_column(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    documents = list(read_texts(str(path)).documents())
    assert [document.text for document in documents] == ["First text.", "Second text."]
    assert [document.kind for document in documents] == [path.name] * 2
    first = "line 1" if suffix == ".jsonl" else "row 0"
    assert documents[0].origin == f"{path.name}: {first}"


@row_formats
def test_named_column(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    assert texts(path, column="title") == ["one", "two"]


def test_content_is_the_second_default_column(tmp_path: Path) -> None:
    assert texts(write_rows(tmp_path / "rows.jsonl", [{"content": "c", "x": 1}])) == ["c"]


@row_formats
def test_unknown_column_lists_the_columns(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    with pytest.raises(CalibrationError, match=r"no column 'body', the columns are 'title', 'text'"):
        texts(path, column="body")


@row_formats
def test_no_default_column_lists_the_columns(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"body": "b"}])
    with pytest.raises(CalibrationError, match=r"'text' or 'content', the columns are 'body'"):
        texts(path)


@row_formats
def test_chat_turns_are_rendered(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": "not this", "messages": CHAT}])
    assert texts(path, render_chat=render) == ["user=Hi|assistant=Hello"]
    assert texts(path, render_chat=render, column="text") == ["not this"]


def test_chat_turns_that_are_nested_too_deeply(tmp_path: Path) -> None:
    def render(turns, where) -> str:
        return render(turns, where)

    path = write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 1: the turns are nested too deeply"):
        texts(path, render_chat=render)


def test_chat_turns_without_a_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match="turn the chat template on"):
        texts(path)
    with pytest.raises(CalibrationError, match=r"holds chat turns.*Turn the chat template on"):
        texts(path, column="messages")


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": 3}])
    with pytest.raises(
        CalibrationError, match=r"rows.jsonl: line 1, column 'text': not usable. Got int. Expected text"
    ):
        texts(path)


def test_blank_and_missing_rows_are_kept_as_empty_documents(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", [{"text": "a"}, {"text": None}, {"text": ""}])
    assert texts(path) == ["a", "", ""]


def test_glob_characters_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "odd [1] *"
    folder.mkdir()
    assert texts(write_rows(folder / "rows.parquet", ROWS)) == ["First text.", "Second text."]


def test_directory_is_sorted_recursive_and_skips_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    for name in ("b.txt", "a/z.txt", ".hidden/h.txt", "notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}", encoding="utf-8")
    write_rows(root / "c.jsonl", ROWS)
    source = read_texts(root)
    assert [part.name for part in source.parts] == ["a/z.txt", "b.txt", "c.jsonl"]
    assert source.description == "corpus (3 text files)"
    assert texts(root) == ["text of a/z.txt", "text of b.txt", "First text.", "Second text."]


def test_directory_without_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no text files.*\.txt, \.jsonl, \.parquet, \.arrow"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", ["nothing.txt", "./nothing", "a/b/c", "/nothing/here", "~/x"], ids=lambda name: name)
def test_missing_path(name: str) -> None:
    with pytest.raises(CalibrationError, match="no such file or directory"):
        read_texts(name)


def test_a_path_object_is_never_a_hub_data_set() -> None:
    with pytest.raises(CalibrationError, match=r"no such file or directory\. Check the path"):
        read_texts(Path("owner/name"))


def test_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CalibrationError, match=r"'\.csv'. Expected one of \.txt, \.jsonl, \.parquet, \.arrow"):
        read_texts(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": ', "line 3: invalid JSON"), ('["a"]', "line 3: not usable. Got a JSON list")],
    ids=["cut-off", "no-object"],
)
def test_bad_json_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(CalibrationError, match=f"a.jsonl, {message}"):
        texts(path)


def test_a_number_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": ' + "1" * 5000 + "}")
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 1: invalid JSON"):
        texts(path)


@pytest.mark.parametrize("name", ["a" * 5000 + ".txt", "a\0.txt"], ids=["long", "nul"])
def test_no_path_at_all(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"no such file|not a path"):
        read_texts(name)


@pytest.mark.skipif("sys.platform != 'linux'", reason="other systems take no such name")
@pytest.mark.parametrize("as_directory", [False, True])
def test_a_name_that_is_not_unicode(tmp_path: Path, as_directory: bool) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("Text.")
    source = read_texts(tmp_path if as_directory else path)
    assert [document.origin for document in source.documents()] == ["caf\ufffd.txt"]
    source.description.encode()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_not_utf8(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8 text"):
        texts(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_table(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"hello, I am no table")
    with pytest.raises(CalibrationError, match=f"a{suffix}: cannot be read as {suffix[1:]} data"):
        texts(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
    with pytest.raises(CalibrationError, match=f"a{suffix}: holds no text"):
        texts(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("error", [TypeError("cannot cast"), KeyError("x"), AttributeError("y")], ids=repr)
def test_whatever_the_library_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"a\.parquet: cannot be read as parquet data"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="reading it as the Hub data set"):
        texts("owner/name")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"], ids=["empty", "blank"])
def test_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match="holds no text"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:cfg", ("owner/name", "cfg", "train")),
        ("owner/name:cfg:test", ("owner/name", "cfg", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple) -> None:
    calls = []

    def load_dataset(name, config=None, *, split, streaming):
        assert streaming
        assert datasets.are_progress_bars_disabled()
        calls.append((name, config, split))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = datasets.are_progress_bars_disabled()
    opened = read_texts(source)
    documents = list(opened.documents())
    assert calls == [expected]
    assert datasets.are_progress_bars_disabled() == before
    label = ":".join(filter(None, expected))
    assert opened.description == f"Hub data set {label}"
    assert documents[1] == Document(f"{label}: row 1", "Second text.")


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"owner/name: no such file.*Couldn't reach.*Check the name"):
        read_texts("owner/name")


def test_hub_connection_lost_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict]:
        yield ROWS[0]
        raise datasets.exceptions.DatasetGenerationError("stream ended")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    with pytest.raises(CalibrationError, match="stream ended"):
        texts("owner/name")


def test_importing_does_not_load_datasets() -> None:
    code = "import sys, bpwise.measure.text.sources; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OWN = Path(builtin_text.__file__).with_name("own")
OWN_KINDS = ["essays", "fiction", "languages-east", "languages-west", "programs", "reference", "web"]


@pytest.fixture(scope="module")
def builtin() -> list[list[Document]]:
    """All documents of the calibration and of the evaluation part; takes seconds to read."""
    return [list(builtin_texts(use).documents()) for use in ("calibration", "evaluation")]


class TestBuiltin:
    def test_the_two_parts_share_no_document(self, builtin: list[list[Document]]) -> None:
        origins = [{document.origin for document in documents} for documents in builtin]
        assert len(origins[0]) > 100
        assert len(origins[1]) > 100
        # Without "docs" and "code": a file's docstrings and its code must be on the same side, too.
        names = [
            {origin.removeprefix("python docs").removeprefix("python code") for origin in part} for part in origins
        ]
        assert not names[0] & names[1]

    def test_the_two_parts_share_no_paragraph_of_the_help_topics(self, builtin: list[list[Document]]) -> None:
        paragraphs = [
            {
                " ".join(paragraph.split())
                for document in documents
                if document.origin.startswith("python docs: topics/")
                for paragraph in document.text.split("\n\n")
            }
            for documents in builtin
        ]
        assert all(paragraphs)
        assert not {text for text in paragraphs[0] & paragraphs[1] if len(text) >= 80}

    @pytest.mark.parametrize("use", ["calibration", "evaluation"])
    def test_holds_enough_of_every_kind(self, builtin: list[list[Document]], use: builtin_text.TextUse) -> None:
        source = builtin_texts(use)
        names = [part.name for part in source.parts]
        assert names == [*OWN_KINDS, "python docs", "python code"]
        for part in source.parts:
            documents = builtin[use == "evaluation"]
            # 32 rows of 1024 tokens, as many of each kind, at 4 bytes per token.
            written = sum(len(document.text.encode()) for document in documents if document.kind == part.name)
            assert written > 32 * 1024 * 4 / len(names), part.name
        assert source.description.startswith(f"bpwise's own texts of {len(OWN_KINDS)} kinds, Python 3.")
        assert source.description.endswith(f"documentation and sources, {use} part")

    def test_own_documents_are_all_there_once(self, builtin: list[list[Document]]) -> None:
        for path in OWN.glob("*.txt"):
            whole = path.read_text(encoding="utf-8").strip().split("\n%%%%\n")
            found = [each.text.strip() for documents in builtin for each in documents if each.kind == path.stem]
            assert sorted(found) == sorted(text.strip() for text in whole)
            assert len(set(found)) == len(found) > 20

    def test_own_documents_are_of_many_languages(self) -> None:
        text = "".join(path.read_text(encoding="utf-8") for path in OWN.glob("*.txt"))
        scripts = {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}
        expected = {"LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI", "THAI", "HEBREW"}
        assert expected <= scripts

    def test_order_is_fixed_by_its_number(self) -> None:
        def names(order: int) -> list[str]:
            return [document.origin for document in builtin_texts("calibration", order=order).parts[-1].documents()]

        assert names(0) == names(0)
        assert names(0) != names(1)
        assert sorted(names(0)) == sorted(names(1))

    def test_code_passages_are_all_of_each_file_once(self) -> None:
        found: dict[str, set[str]] = {}
        for document in builtin_texts("calibration").parts[-1].documents():
            passages = found.setdefault(document.origin, set())
            assert document.text not in passages
            passages.add(document.text)
        origin, passages = max(found.items(), key=lambda item: len(item[1]))
        source = Path(builtin_text.sysconfig.get_paths()["stdlib"], origin.removeprefix("python code: "))
        assert len(passages) > 3
        # Only cuts (a blank line each) and a too short remainder are missing.
        length = len(source.read_text(encoding="utf-8"))
        assert length - 2 * len(passages) - 200 <= sum(map(len, passages)) <= length

    def test_starts_without_parsing_everything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []
        monkeypatch.setattr(builtin_text, "_source", lambda path: read.append(path) or "x = 1\n" * 100)
        documents = iter(builtin_texts("calibration").parts[-1].documents())
        next(documents)
        assert len(read) == 1

    def test_skips_tests_tables_and_installed_packages(self, builtin: list[list[Document]]) -> None:
        origins = [document.origin for documents in builtin for document in documents]
        for name in ("site-packages", "/test", "idlelib", "encodings", "_sysconfigdata", "keyword.py"):
            assert not [origin for origin in origins if name in origin and "topics" not in origin], name
        assert "python code: argparse.py" in origins

    def test_python_without_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(builtin_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        monkeypatch.setattr(builtin_text, "_topics", dict)
        source = builtin_texts("calibration")
        assert [part.name for part in source.parts] == OWN_KINDS
        assert "Python" not in source.description

    def test_unreadable_and_broken_files_are_left_out(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        names = [f"module{number}.py" for number in range(20)]
        for name in names:
            (tmp_path / name).write_bytes(b"# \xff\n" * 200)
        broken = next(name for name in names if builtin_text._use_of(name) == "calibration")
        (tmp_path / broken).write_text("def (:\n" * 100)
        monkeypatch.setattr(builtin_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        monkeypatch.setattr(builtin_text, "_topics", dict)
        origins = [document.origin for document in builtin_texts("calibration").documents()]
        assert [origin for origin in origins if origin.startswith("python")] == [f"python code: {broken}"]

    def test_unknown_use(self) -> None:
        with pytest.raises(ConfigError, match=r"Got 'test'. Expected one of \('calibration', 'evaluation'\)"):
            builtin_texts("test")
