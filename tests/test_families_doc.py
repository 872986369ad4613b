"""docs/families.md says what the suite of families has found, and names every model type that EXL2 readers know."""

from bpwise.convert.exl2.readers.table import known_architectures, reader_composite, reader_family

from .families.families import FAMILIES
from .families.models import family_config
from .families.table import DOC, with_table


def test_the_table_is_the_one_that_the_script_makes() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert text == with_table(text)


def test_every_architecture_of_exl2_readers_has_its_row() -> None:
    types = [family_config(name)["model_type"] if family.tried else name for name, family in FAMILIES.items()]
    entries = [kind({"model_type": name}) for name in types for kind in (reader_family, reader_composite)]
    assert {name for entry in entries for name in entry.architectures} == set(known_architectures())
