"""The bounds of dependencies in pyproject.toml: the lowest versions as constraints for pip, and what is newer on PyPI.

``python -m tests.dependencies lowest`` prints constraints, ``... newest`` the bounds that the newest versions break.
"""

import json
import subprocess
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def declared() -> list[Requirement]:
    """All requirements of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *(text for extra in extras for text in extra))]


def lowest(requirement: Requirement) -> Version:
    """The version that a requirement begins at."""
    (found,) = (Version(each.version) for each in requirement.specifier if each.operator in (">=", "=="))
    return found


def lowest_constraints() -> list[str]:
    """The lowest allowed version of every dependency; torch, whose builds are pinned, as it is pinned."""
    (torch,) = (
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("torch==")
    )
    return sorted({torch, *(f"{each.name}=={lowest(each)}" for each in declared() if each.name != "torch")})


def beyond_bounds() -> list[str]:
    """The newest versions, by one run of pip that installs nothing, which the bounds do not allow."""
    bounds = {each.name.replace("_", "-").lower(): each for each in declared()}
    free = sorted({name for name, each in bounds.items() if name != "torch" and ">=" in str(each.specifier)})
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    run = subprocess.run([*command, "--report", "-", *free], check=True, capture_output=True, text=True)
    found = [each["metadata"] for each in json.loads(run.stdout)["install"]]
    newest = {each["name"].replace("_", "-").lower(): each["version"] for each in found}
    return [
        f"{bounds[name]}: {newest[name]} is out" for name in free if not bounds[name].specifier.contains(newest[name])
    ]


if __name__ == "__main__":
    lines = lowest_constraints() if sys.argv[1] == "lowest" else beyond_bounds()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.exit(sys.argv[1] == "newest" and bool(lines))
