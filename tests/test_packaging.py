"""What stands around the code: pyproject.toml, the citation, the container, and how texts say to install bpwise."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import bpwise
import pytest
import yaml

from .test_architecture import room_files

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(bpwise.__file__).parent
DEVELOPMENT = {"dev", "demo"}
"""Extras that serve the repository alone."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(found, dict)
    return found


def test_citation(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # The keys that CFF 1.2.0 demands, and those of its optional ones that are used.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation.keys() <= {
        *("cff-version", "message", "title", "authors", "type", "abstract", "version", "license", "keywords"),
    }
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    assert str(citation["version"]) == bpwise.__version__
    assert all(author.keys() == {"name"} for author in citation["authors"])


def test_project_says_what_readme_says(project: dict[str, Any]) -> None:
    assert f"**{project['description']}.**" in (ROOT / "README.md").read_text(encoding="utf-8")
    # PEP 639: where a licence expression stands, a classifier must not.
    assert not any(name.startswith("License ::") for name in project["classifiers"])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, their continuation lines joined."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined]


def test_container_is_built_on_any_base() -> None:
    (name, base), (first, image) = instructions()[:2]
    assert (name, first, image) == ("ARG", "FROM", "${BASE}")
    assert base == "BASE=python:3.12-slim"
    # CUDA differs by arguments alone: those that the comment names are there.
    usage = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nARG ")[0]
    arguments = {value.partition("=")[0] for name, value in instructions() if name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", usage)) == arguments
    assert "BASE=nvidia/cuda" in usage


def test_container_installs_what_users_can_ask_for(project: dict[str, Any]) -> None:
    installs = [value for name, value in instructions() if name == "RUN" and "pip install" in value]
    (extras,) = re.findall(r"'/opt/bpwise/source\[([a-z,]+)\]'", " ".join(installs))
    assert set(extras.split(",")) == project["optional-dependencies"].keys() - DEVELOPMENT
    assert ("COPY", ". /opt/bpwise/source") in instructions()


def test_container_holds_no_secrets_and_runs_as_a_user() -> None:
    found = instructions()
    assert [name for name, _ in found][-3:] == ["USER", "WORKDIR", "ENTRYPOINT"]
    (user,) = (value for name, value in found if name == "USER")
    assert any(value.startswith(f"useradd --create-home {user} ") for name, value in found if name == "RUN")
    assert json.loads(found[-1][1]) == ["/opt/bpwise/venv/bin/bpwise"]
    for name, value in found:
        assert not re.search(r"token|password|secret|api.?key|://[^/ ]*@", value, re.IGNORECASE), f"{name} {value}"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "build", "models", "**/.env*"} <= set(ignored)


TEXTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "Dockerfile", "examples/quickstart.ipynb"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
    *(str(path.relative_to(ROOT)) for path in room_files()),
]


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_installs_a_name_that_is_not_published(name: str, project: dict[str, Any]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"pip install (?:-\S+ )*['\"]?bpwise", text)
    asked = {extra for extras in re.findall(r"'\.\[([a-z,]+)\]'", text) for extra in extras.split(",")}
    asked |= set(re.findall(r"install_command\(['\"](\w+)['\"]\)", text))
    assert asked <= project["optional-dependencies"].keys()


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bpwise", "--version"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == f"bpwise, version {bpwise.__version__}\n"


def test_source_archives_hold_the_package_and_no_part_of_the_tests(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if path.is_file() and path.suffix != ".ipynb":
            shutil.copy(path, tmp_path)
    for folder in ("checkpoint", "cli", "convert", "eval", "linalg", "measure", "quantize"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__), tmp_path / "tests")
    script = "import setuptools.build_meta as backend; backend.build_sdist('made')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    (archive,) = (tmp_path / "made").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "LICENSE", "cli/quantize.py", "quantize/planning/plan.js", "measure/text/chats.jsonl"} <= names
    assert not [name for name in names if name.startswith("tests")]
