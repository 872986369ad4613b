import ast
from pathlib import Path

import bpwise
import pytest

FILES = sorted((Path(bpwise.__file__).parent / "cli").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_types_are_those_of_the_oldest_click(path: Path) -> None:
    # click.ParamType is generic from 8.4 on, and pyproject.toml allows 8.1: ``ParamType[int]`` fails there at import.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert not any(isinstance(base, ast.Subscript) for base in node.bases), f"{path}: {node.name}"
