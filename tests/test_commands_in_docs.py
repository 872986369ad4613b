"""README and docs hold: commands are taken as they stand, every option is named, links lead somewhere."""

import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path

import bpwise
import click
import pytest
from bpwise.checkpoint.source import original
from bpwise.cli import cli
from bpwise.cli.group import HELP
from bpwise.cli.types import Place
from bpwise.convert.exl2 import card as exl2_card
from bpwise.convert.gguf import card as gguf_card
from bpwise.quantize import config, recipe
from click.testing import CliRunner

from .families.families import FAMILIES
from .families.models import family_config
from .families.table import exl2_mark

ROOT = Path(bpwise.__file__).parent
README, COMMANDS = ROOT / "README.md", ROOT / "docs" / "commands.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (?:\$ )?(bpwise .+)$", re.MULTILINE)
INLINE = re.compile(r"`(bpwise [a-z]+ [^`]+)`")
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


class Reached(Exception):
    """A command line was taken: the command has begun to work."""


def commands_of(text: str) -> Iterator[str]:
    """Every command line of bpwise's on a page, with its options; those that are cut short by ``...`` are left out."""
    lines = [line.removeprefix("$ ") for block in BLOCK.findall(text) for line in block.splitlines()]
    lines += INDENTED.findall(text)
    lines += [" ".join(found.split()) for found in INLINE.findall(BLOCK.sub("", text)) if len(found.split()) > 3]
    for line in lines:
        if line.startswith("bpwise ") and "..." not in line and line.split()[1] != "COMMAND":
            yield line


TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
TEXTS |= {"EXL2 card": exl2_card.loading("NAME"), "GGUF card": gguf_card.loading("NAME.gguf")}
TEXTS |= {f"help of {name}": "".join(f"    {line}\n" for line in each.examples) for name, each in HELP.items()}
LINES = [pytest.param(line, id=f"{name}: {line}") for name, text in TEXTS.items() for line in commands_of(text)]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands check their command line and then stop; files need not exist."""

    def stop(*_args: object, **_named: object) -> None:
        raise Reached

    monkeypatch.setattr(Place, "convert", lambda _self, value, _param, _context: Path(value))
    monkeypatch.setattr(original, "open_model", stop)
    monkeypatch.setattr(config, "original_for", stop)
    monkeypatch.setattr(recipe, "read_recipe", lambda _path: {})
    for name, command in cli.commands.items():
        if name != "quantize":  # checks more before it opens the model
            monkeypatch.setattr(command, "callback", stop)


@pytest.mark.parametrize("line", LINES)
def test_command_is_taken(line: str, stopped: None) -> None:
    words = shlex.split(line, comments=True)
    result = CliRunner().invoke(cli, words[1:])
    assert isinstance(result.exception, Reached), result.output


def test_commands_are_found(stopped: None) -> None:
    least = {"README.md": 12, "commands.md": 20, "EXL2 card": 2, "GGUF card": 2}
    assert all(len(list(commands_of(TEXTS[name]))) >= count for name, count in least.items())
    # What is wrong is seen: an option that is not there, a value that is none, an option without effect.
    for wrong in ("--bits 4", "--bpw four", "--bpw 4 --context 32k"):
        assert CliRunner().invoke(cli, ["quantize", "MODEL", "OUT", *wrong.split()]).exit_code == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    """What links to a page's headings are called, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(command: click.Command) -> set[str]:
    return {flag for each in command.params if isinstance(each, click.Option) for flag in each.opts}


ALL_OPTIONS = set().union(*(options_of(command) for command in cli.commands.values()))


@pytest.mark.parametrize("page", [README, COMMANDS], ids=lambda page: page.name)
def test_flags_in_the_text_are_options(page: Path) -> None:
    inline = re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text(encoding="utf-8")))
    assert {flag for code in inline for flag in FLAG.findall(f" {code}")} <= ALL_OPTIONS | {"--help"}


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_has_its_place(name: str) -> None:
    # In the command's section, or in one that commands share.
    text = COMMANDS.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^#{2,3} |\Z)", text, re.DOTALL | re.MULTILINE))
    shared = ("Calibration text", "The machine", "Models on the Hub", "Output for programs")
    place = "".join(sections[each] for each in (f"bpwise {name}", *shared))
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert set(option.opts) & set(FLAG.findall(place)), f"{name} {option.opts}"


def test_picture_of_the_plan_page_is_what_its_command_takes() -> None:
    ((size, name),) = re.findall(r"--window-size=(\d+,\d+) --screenshot=(\S+)", TEXTS["reports.md"])
    header = (ROOT / name).read_bytes()[:24]  # signature, length and name of the first chunk, width, height
    assert header[12:16] == b"IHDR"
    assert struct.unpack(">2I", header[16:]) == tuple(map(int, size.split(",")))


def test_numbers_in_readme_are_those_of_the_page_behind_them() -> None:
    pairs = re.findall(r"([0-9.]+) → \*\*([0-9.]+)\*\*", README.read_text(encoding="utf-8"))
    lines = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8").splitlines()
    assert len(pairs) == 16
    for theirs, ours in pairs:
        assert any(f"| {theirs} ± " in line and f"| **{ours} ± " in line for line in lines), (theirs, ours)


def test_models_in_readme_are_those_that_were_tried() -> None:
    # Each in its column: EXL2 by what readers know, as in docs/families.md.
    (table,) = re.findall(r"^\| by \|.*?\n\n", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line]
    shown = [{name for row in rows for name in names(row[column])} for column in (1, 2)]
    expected: list[set[str]] = [set(), set()]
    for name, family in FAMILIES.items():
        config = family_config(name) if family.tried else {"model_type": name}
        exl2 = exl2_mark(config)
        mark = "" if family.tried else " ¹"
        mark += " ²" if exl2 == "`--force`" else ""
        expected[exl2 != "yes"] |= names(family.releases + mark)
    assert shown == expected


def names(cell: str) -> set[str]:
    return {name.strip() for name in cell.split(";") if name.strip()}
