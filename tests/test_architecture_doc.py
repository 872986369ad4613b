"""The pages for those who change the code say what is true: pictures, names, and the format that is walked through."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import bpwise
import pytest
from bpwise.convert.conversion import Conversion
from bpwise.convert.format import Format
from bpwise.convert.model import QuantizedModel
from bpwise.convert.options import FormatOptions
from bpwise.convert.plan import Plan
from bpwise.convert.rounding import Rounder

from . import toy_format
from .test_architecture import GROUND, INNER, ROOMS, ROOT, dotted, imported, room_files

DOCS = Path(bpwise.__file__).parent / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
PICTURES = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
ARROW = re.compile(r"^ *(\w+) -(?:\.-|-)>(?:\|([^|]+)\|)? (\w+)$", re.MULTILINE)
NODE = re.compile(r'^ *(\w+)\["(.+)"\]$', re.MULTILINE)
DOTTED = re.compile(rf"(?<![\w./])(?:{'|'.join([*ROOMS, *GROUND])})(?:\.\w+)+(?![\w/])")


def room_of(parts: tuple[str, ...]) -> str:
    return "ground" if parts[0] in GROUND else parts[0]


def imports_between_rooms() -> set[tuple[str, str]]:
    files = [path for path in room_files() if dotted(path) != ("__init__",)]
    pairs = {(room_of(dotted(path)), room_of(parts)) for path in files for parts in imported(path)}
    return {(above, below) for above, below in pairs if above != below}


def resolved(name: str) -> Any:
    """What a dotted name within the package stands for; fails where there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["bpwise", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such module")


def test_arrows_between_rooms_are_imports() -> None:
    arrows = {(above, below) for above, _, below in ARROW.findall(PICTURES[0])}
    assert arrows <= imports_between_rooms()
    assert {name for name, _ in NODE.findall(PICTURES[0])} == {*ROOMS, "ground"}


def test_imports_between_rooms_follow_from_the_arrows() -> None:
    below: dict[str, set[str]] = {room: set() for room in [*ROOMS, "ground"]}
    for first, _, second in ARROW.findall(PICTURES[0]):
        below[first].add(second)
    for room in reversed(ROOMS):  # from the bottom up: what lies below is complete
        below[room] |= {lower for each in tuple(below[room]) for lower in below[each]}
    assert {(above, each) for above in below for each in below[above]} >= imports_between_rooms()


def test_folders_are_listed_in_order() -> None:
    rows = dict(re.findall(r"^\| `(\S+)/` \| (.+?) \|", PAGE, re.MULTILINE))
    listed = {room: re.findall(r"`(\S+)`", folders) for room, folders in rows.items()}
    assert {room: folders for room, folders in listed.items() if len(folders) > 1} == INNER


def test_what_is_handed_on_is_made_and_taken() -> None:
    nodes = {name: resolved(target) for name, target in NODE.findall(PICTURES[1])}
    arrows = ARROW.findall(PICTURES[1])
    assert len(arrows) > 10
    for maker, thing, taker in arrows:
        if not thing[0].isupper():
            continue  # a file
        made = nodes[maker].__name__ if inspect.isclass(nodes[maker]) else returned(nodes[maker])
        assert re.search(rf"\b{thing}\b", made), f"{maker} does not make {thing}"
        assert re.search(rf"\b{thing}\b", taken(nodes[taker])), f"{taker} does not take {thing}"


def returned(function: Any) -> str:
    return str(inspect.signature(function).return_annotation)


def taken(function: Any) -> str:
    return " ".join(str(each.annotation) for each in inspect.signature(function).parameters.values())


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_named_things_exist(page: Path) -> None:
    for name in DOTTED.findall(page.read_text(encoding="utf-8")):
        if not name.endswith(".py"):
            resolved(name)


def test_names_are_found() -> None:
    # The test above would pass if it saw nothing.
    assert len(set(DOTTED.findall(PAGE))) > 20


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = [*ROOMS, "tests", "benchmarks", "examples", "docs"]
    for name in re.findall(rf"`((?:{'|'.join(folders)})/[a-z0-9_/]*(?:\.\w+)?)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


TOY_PAGE = (DOCS / "adding-a-format.md").read_text(encoding="utf-8")
PIECES = re.findall(r"```python\n(.*?)```", TOY_PAGE, re.DOTALL)


def test_pieces_of_the_toy_format_are_its_whole_code() -> None:
    source = Path(toy_format.__file__).read_text(encoding="utf-8")
    for piece in PIECES:
        assert piece in source, piece
    # One after another they are the file, but for empty lines between them.
    assert "".join(PIECES).replace("\n", "") == source.replace("\n", "")


PROTOCOL = [Format, FormatOptions, Conversion, Plan, Rounder, QuantizedModel]


@pytest.mark.parametrize("part", PROTOCOL, ids=lambda part: part.__name__)
def test_every_part_of_the_protocol_is_explained(part: type) -> None:
    assert f"`{part.__module__.removeprefix('bpwise.')}.{part.__name__}`" in TOY_PAGE
    for name in {*vars(part), *inspect.get_annotations(part)}:
        assert name.startswith("_") or f"`{name}`" in TOY_PAGE, name
