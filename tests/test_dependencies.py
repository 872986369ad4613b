"""The form of the dependencies in pyproject.toml, and where their licences are listed."""

import importlib.metadata
import re

import pytest

pytest.importorskip("tomllib", reason="reads pyproject.toml, as Python can from 3.11 on")

from packaging.requirements import Requirement
from packaging.version import Version

from .dependencies import ROOT, declared, lowest_constraints

DECLARED = declared()


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda each: each.name)
def test_has_a_lower_and_an_upper_bound(requirement: Requirement) -> None:
    bounds = {each.operator: Version(each.version) for each in requirement.specifier}
    assert bounds.keys() in (
        {
            "==",
        },
        {">=", "<"},
    )
    if "<" in bounds:
        assert bounds[">="] < bounds["<"]
        assert len(bounds["<"].release) == 1, "a major version: smaller ones do not break what is used"
    assert requirement.url is None


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda each: each.name)
def test_bounds_hold_what_is_installed(requirement: Requirement) -> None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert requirement.specifier.contains(version)


def test_bounds_of_one_package_are_the_same_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for each in DECLARED:
        found.setdefault(each.name, set()).add(str(each.specifier))
    assert {name: bounds for name, bounds in found.items() if len(bounds) > 1} == {}


def test_constraints_are_within_the_bounds() -> None:
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    assert pins.keys() - {each.name for each in DECLARED} == set()
    for each in DECLARED:
        assert each.name not in pins or each.specifier.contains(pins[each.name]), each
    assert f"torch=={pins['torch']}" in lowest_constraints()


def test_licences_are_listed() -> None:
    table = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^\| \[([\w.-]+)\]", table)
    assert sorted(listed) == sorted({*(each.name for each in DECLARED), "tokenizers"})
