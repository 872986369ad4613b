"""Cells of tables with names from outside, as another program's Markdown would see them."""

import re

import pytest
from bpwise.tables import cell, table

NAMES = {
    "escape": "\x1b[31mred\x9b",
    "surrogate": "model-\ud83d",
    "bidi": "a\u202eb\u2066c",
    "lines": "a\n| b | c |\u2028d",
    "pipe": "a | b",
    "escaped-pipe": "a\\\\| b \\| c",
    "html": "<script>alert(1)</script>&lt;",
    "image": "![x](https://example.com/tracker.png) [y](javascript:z)",
    "long": "x" * 100_000,
    "ends-in-backslash": "C:\\models\\",
}


def cells_of(row: str) -> list[str]:
    """What GitHub's Markdown takes for the cells of a row: a backslash takes any sign after it along."""
    return ["".join(parts) for parts in re.findall(r"((?:\\.|[^|\\])+)\|", row.removeprefix("|"))]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_breaks_nothing(name: str) -> None:
    made = table(("name", "size"), [(name, "1")])
    lines = made.split("\n")
    assert len(lines) == len(made.splitlines()) == 3
    assert len(cells_of(lines[2])) == 2
    assert cells_of(lines[2])[1].strip() == "1"
    assert made.replace("\n", "").isprintable()
    assert "<" not in made
    assert re.search(r"(?<!\\)\[", made) is None
    assert len(made) < 30_000
    made.encode()


def test_plain_names_stay() -> None:
    for name in (
        "model.layers.0.self_attn.q_proj",
        "Llama-3.2-1B",
        "1.0 ± 0.5",
        "ünï 你好",
        "`license` cannot be read",
    ):
        assert cell(name) == name
