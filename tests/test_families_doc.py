"""docs/families.md says what the tables of families say."""

import re
from pathlib import Path

import pytest
from bpwise.checkpoint.model.families import composite_of, family_of
from bpwise.convert.exl2.readers.table import reader_composite, reader_family
from bpwise.errors import UnsupportedModelError

DOC = Path(__file__).parents[1] / "docs" / "families.md"


def known_types() -> list[str]:
    with pytest.raises(UnsupportedModelError) as refused:
        family_of({"model_type": "unheard-of"})
    return str(refused.value).partition("Expected one of ")[2].partition(".")[0].split(", ")


def test_every_family_has_its_row() -> None:
    rows = [line for line in DOC.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = set()
    for name in known_types():
        config = {"model_type": name}
        entry = composite_of(config) or family_of(config)
        known = (reader_composite if composite_of(config) else reader_family)(config)
        readers = ", ".join(f"`{name}`" for name in known.architectures) or "none: `--force`"
        assert entry.note
        expected.add(f"| `{name}` | {readers} | {entry.note} |")
    assert len(expected) > 20
    assert set(rows) == expected
    assert len(rows) == len(expected)


def test_models_with_vision_have_a_table_of_their_own() -> None:
    plain, vision = DOC.read_text(encoding="utf-8").split("## Models with vision")
    named = re.compile(r"^\| `(\w+)`", re.MULTILINE)
    assert [name for name in named.findall(plain) if composite_of({"model_type": name})] == []
    assert [name for name in named.findall(vision) if composite_of({"model_type": name}) is None] == []
