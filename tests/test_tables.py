"""Tables as others read them: Markdown's cells, Python's own parsers of CSV and HTML."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest
from bpwise.tables import NotedCell, Table, bytes_text, cell

NAMES = {
    "escape": "\x1b[31mred\x9b",
    "surrogate": "model-\ud83d",
    "bidi": "a\u202eb\u2066c",
    "lines": "a\n| b | c |\u2028d",
    "pipe": "a | b",
    "escaped-pipe": "a\\\\| b \\| c",
    "html": "<script>alert(1)</script>&lt;",
    "attribute": "\" onclick='x' data-x=\"",
    "image": "![x](https://example.com/tracker.png) [y](javascript:z)",
    "long": "x" * 100_000,
    "ends-in-backslash": "C:\\models\\",
}

NOTED = Table.of(("model", "size"), [("a", NotedCell("10 MB", "5 bits", 10e6)), ("b", NotedCell("9 MB", key=9e6))])


def cells_of(row: str) -> list[str]:
    """What GitHub's Markdown takes for the cells of a row: a backslash takes any sign after it along."""
    return ["".join(parts) for parts in re.findall(r"((?:\\.|[^|\\])+)\|", row.removeprefix("|"))]


class Read(HTMLParser):
    """Gathers tags with their attributes, and the text of every cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and data != "\n":
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
class TestAnyName:
    def test_markdown(self, name: str) -> None:
        made = Table.of(("name", "size"), [(name, "1")]).to_markdown()
        lines = made.split("\n")
        assert len(lines) == len(made.splitlines()) == 3
        assert len(cells_of(lines[2])) == 2
        assert cells_of(lines[2])[1].strip() == "1"
        assert made.replace("\n", "").isprintable()
        assert "<" not in made
        assert re.search(r"(?<!\\)\[", made) is None
        assert len(made) < 30_000
        made.encode()

    def test_html(self, name: str) -> None:
        made = Table.of((name, "size"), [(NotedCell(name, name), "1")]).to_html("sortable", id="x")
        read = Read(made)
        assert {tag for tag, _ in read.tags} == {"table", "thead", "tbody", "tr", "th", "td", "button", "span", "small"}
        assert {key for _, attributes in read.tags for key in attributes} <= {
            "id",
            "class",
            "type",
            "data-key",
            "data-label",
        }
        shown = " ".join(name.split())
        if shown.isprintable() and len(shown) < 1000:
            assert read.cells == [shown, "size", shown + shown, "1"]
        assert made.replace("\n", "").isprintable()
        assert len(made) < 100_000

    def test_terminal(self, name: str) -> None:
        lines = Table.of(("name", "size"), [(name, "1")]).to_lines()
        assert len(lines) == 2
        assert lines[0].index("size") == lines[1].rindex("1")
        assert all(line.isprintable() and len(line) < 250 for line in lines)

    def test_csv(self, name: str) -> None:
        made = Table.of(("name", "size"), [(name, "1")]).to_csv()
        assert list(csv.reader(io.StringIO(made, newline=""))) == [["name", "size"], [name, "1"]]


def test_plain_names_stay() -> None:
    for name in (
        "model.layers.0.self_attn.q_proj",
        "Llama-3.2-1B",
        "1.0 ± 0.5",
        "ünï 你好",
        "`license` cannot be read",
    ):
        assert cell(name) == name


def test_notes() -> None:
    assert NOTED.to_markdown().splitlines()[2:] == ["| a | 10 MB (5 bits) |", "| b | 9 MB |"]
    assert NOTED.to_lines() == ["model  size", "a      10 MB (5 bits)", "b      9 MB"]
    assert NOTED.to_csv() == "model,size\r\na,10 MB\r\nb,9 MB\r\n"
    assert Read(NOTED.to_html()).cells == ["model", "size", "a", "10 MB5 bits", "b", "9 MB"]
    assert len(Read(NOTED.to_html()).all("small")) == 1


def test_sorting() -> None:
    assert [each.get("data-key") for each in Read(NOTED.to_html()).all("td")] == [None] * 4
    read = Read(NOTED.to_html("sortable", id="models"))
    assert [each["data-key"] for each in read.all("td")] == ["a", "10000000.0", "b", "9000000.0"]
    assert len(read.all("button")) == 2
    assert read.all("table") == [{"id": "models", "class": "sortable"}]


def test_chips_and_facts() -> None:
    read = Read(Table.of_facts([("a", "1"), ("b", "2")]).to_html("facts"))
    assert read.cells == ["a", "1", "b", "2"]
    assert not read.all("thead")
    colored = Table.of(("", ""), [(NotedCell("a", color="red"), "1")]).to_html()
    assert {"width": "1", "height": "1", "fill": "red"} in Read(colored).all("rect")


def test_transposed() -> None:
    turned = NOTED.transposed()
    assert turned.header == ("model", "a", "b")
    assert turned.rows == (("size", *(row[1] for row in NOTED.rows)),)
    assert Table.of(("x", "y"), [(NotedCell("a", "note"), "1")]).transposed().header == ("x", "a")


def test_records() -> None:
    table = Table.of_records([{"model": "a", "kl": 0.1}, {"model": "b", "kl": -1e-05, "bits": None, "more": 0}])
    first, second = csv.DictReader(io.StringIO(table.to_csv(), newline=""))
    assert first == {"model": "a", "kl": "0.1", "bits": "", "more": ""}
    assert second == {"model": "b", "kl": "-1e-05", "bits": "", "more": "0"}


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-x", "@SUM(1)"])
def test_no_formulas(text: str) -> None:
    assert next(csv.reader(io.StringIO(Table.of((), [(text,)]).to_csv().split("\r\n")[1]))) == [f"'{text}"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (999_900, "999.9 kB")),
        *((999_960, "1.0 MB"), (85_940_000, "85.9 MB")),
        *((999_900_000, "999.9 MB"), (1_000_000_000, "1.00 GB"), (4_583_000_000, "4.58 GB")),
    ],
)
def test_sizes_in_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text
