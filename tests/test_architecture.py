"""The shape of the package: which room may import which, and what every module says of itself."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bpwise
import pytest

ROOT = Path(bpwise.__file__).parent
ROOMS = ["cli", "quantize", "eval", "convert", "measure", "linalg", "checkpoint"]
"""From the top down: each may import those below it."""

GROUND = {"errors", "progress", "tables", "version"}
"""Below all rooms; only tables imports another of these."""


def room_files() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in ("__init__", *GROUND)]
    for room in ROOMS:
        files += (ROOT / room).rglob("*.py")
    return sorted(files)


def dotted(path: Path) -> tuple[str, ...]:
    """``("measure", "run")`` for ROOT/measure/run.py; a package's ``__init__`` keeps that name."""
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports, wherever in it, as path parts."""
    here = dotted(path)
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == "bpwise"}
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = here[: len(here) - node.level]
                assert len(here) >= node.level, f"{path}: import beyond the package"
            elif module[:1] == ("bpwise",):
                base, module = (), module[1:]
            else:
                continue
            # `from . import x` may name a module or something in the package itself; both lie in the same room.
            names = [alias.name for alias in node.names] if not module else [""]
            found |= {(*base, *module, *filter(None, [name])) for name in names}
    return found


def rank(parts: tuple[str, ...]) -> int:
    """Height of a module's room: 0 for the ground."""
    if parts[0] in GROUND:
        return int(parts[0] == "tables")  # which makes what it is given printable: errors do that
    return len(ROOMS) - ROOMS.index(parts[0]) + 1


def name_of(path: Path) -> str:
    return "/".join(dotted(path))


MODULES = [pytest.param(path, id=name_of(path)) for path in room_files()]
NOT_ROOT = [pytest.param(path, id=name_of(path)) for path in room_files() if dotted(path) != ("__init__",)]
EXPORTING = [pytest.param(path, id=name_of(path)) for path in room_files() if path.stem not in ("__init__", "version")]


@pytest.mark.parametrize("path", NOT_ROOT)
def test_imports_run_downhill(path: Path) -> None:
    here = dotted(path)
    for parts in imported(path):
        where = ".".join(parts)
        assert parts, f"{path}: imports the package itself, which is above everything"
        assert parts[0] in GROUND | set(ROOMS), f"{path}: imports {where}, which no room holds"
        if parts[0] != here[0]:
            assert rank(parts) < rank(here), f"{path}: imports {where}, which is not below it"


INNER = {
    "checkpoint": ["carry", "equalized", "source", "loading", "trace", "model", "files"],
    "measure": [".", "text", "statistics", "model", "layers"],
    "convert": ["export", "exl2", "gguf", "mlx", "numerics", "."],
    "convert/exl2": [".", "rounding", "plan", "file", "readers"],
    "convert/gguf": [".", "export", "engine", "llama_cpp", "plan", "model", "file", "rows", "ggml"],
    "convert/mlx": [".", "mlx_lm", "plan", "file", "grid"],
    "eval": ["publishing", "report", "tasks", "llama_perplexity", "engines", ".", "domains", "metrics"],
    "eval/report": [".", "drawings"],
    "quantize": [".", "planning", "timing", "rounding"],
}
"""Inside the rooms, too: folders from the top down; ``.`` stands for a room's own modules."""

REGISTRY = ("convert", "registry")
"""Names all formats, which import what stands beside it."""


def inner_steps(path: Path) -> Iterator[tuple[str, str, str]]:
    """The folder that holds a module and another that it imports, and where in it each of the two lies."""
    here = dotted(path)
    for parts in imported(path):
        common = 0
        while common < min(len(here), len(parts)) and here[common] == parts[common]:
            common += 1
        folder = ROOT.joinpath(*here[:common])
        if 0 < common < len(here) and folder.is_dir():
            first, second = (
                rest[0] if rest and (folder / rest[0]).is_dir() else "." for rest in (here[common:], parts[common:])
            )
            if first != second:
                yield "/".join(here[:common]), first, second


@pytest.mark.parametrize("path", NOT_ROOT)
def test_imports_run_downhill_inside_the_rooms(path: Path) -> None:
    if dotted(path) == REGISTRY:
        return
    for folder, here, there in inner_steps(path):
        assert INNER[folder].index(here) < INNER[folder].index(there), f"{path}: {folder}/{there} is not below {here}"


NEEDING = {"convert/exl2/rounding/kernels": "triton"}
"""Modules that import a package which is not to be had everywhere."""


def test_inner_folders_are_all_in_order() -> None:
    for folder in {path.parent for path in room_files()} - {ROOT}:
        inner = {each.name for each in folder.iterdir() if (each / "__init__.py").exists()}
        assert inner == set(INNER.get("/".join(folder.relative_to(ROOT).parts), ["."])) - {"."}


def test_imports_are_found() -> None:
    # The tests above would pass if they saw nothing.
    found = {name_of(path): imported(path) for path in room_files()}
    assert ("measure", "run") in found["quantize/config"]
    assert ("errors",) in found["convert/exl2/file/store"]
    assert ("convert", "exl2", "file", "linear") in found["convert/exl2/rounding/feedback"]
    assert ("quantize", "run") in found["cli/quantize"]  # inside a function
    assert (
        rank(("cli", "quantize")) > rank(("quantize", "run")) > rank(("eval", "report")) > rank(("convert", "format"))
    )
    assert rank(("convert",)) > rank(("measure",)) > rank(("linalg", "hessian")) > rank(("checkpoint", "files"))
    assert rank(("checkpoint",)) > rank(("errors",)) == 0
    steps = {step for path in room_files() for step in inner_steps(path)}
    assert ("eval", "report", "metrics") in steps
    assert ("convert/exl2", "plan", "file") in steps


MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES, MOST_CLASS_LINES = 12, 350, 60, 200


def test_folders_are_small() -> None:
    for folder in {path.parent for path in room_files()} - {ROOT}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def lines_of(node: ast.AST) -> int:
    """Lines of a function or class, its own docstring aside."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    assert node.end_lineno is not None
    documented = 0
    if ast.get_docstring(node) is not None:
        documented = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return node.end_lineno - node.lineno + 1 - documented


@pytest.mark.parametrize("path", MODULES)
def test_modules_functions_and_classes_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            most = MOST_CLASS_LINES if isinstance(node, ast.ClassDef) else MOST_FUNCTION_LINES
            assert lines_of(node) <= most, node.name


def test_every_package_is_installed() -> None:
    # The packages are listed by hand: a new folder must be in the list, or it is missing after installation.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in ROOT.rglob("__init__.py"):
        parts = path.parent.relative_to(ROOT).parts
        if parts and parts[0] in ROOMS:
            assert f'"{".".join(("bpwise", *parts))}"' in text


def test_no_room_is_forgotten() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", *GROUND}


@pytest.mark.parametrize("path", MODULES)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":")), "the first line is one sentence"


@pytest.mark.parametrize("path", EXPORTING)
def test_exports_exist(path: Path) -> None:
    if name_of(path) in NEEDING:
        pytest.importorskip(NEEDING[name_of(path)])
    module = importlib.import_module(".".join(("bpwise", *dotted(path))))
    assert isinstance(module.__all__, list)
    for name in module.__all__:
        assert hasattr(module, name)
        assert not name.startswith("_")


def test_everything_exported_resolves() -> None:
    assert bpwise.__all__
    for name in bpwise.__all__:
        assert getattr(bpwise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bpwise.nonsense


def test_importing_changes_nothing() -> None:
    # No environment variables, signal handlers or seeds; torch is imported first, so that its own changes do not count.
    code = """
import os, random, signal, torch, transformers
before = dict(os.environ), signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.is_grad_enabled()
state, python_state = torch.random.get_rng_state(), random.getstate()
import bpwise.cli, bpwise.quantize.run, bpwise.quantize.inspect, bpwise.convert.dense, bpwise.eval.report.report
after = dict(os.environ), signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.is_grad_enabled()
assert before == after
assert torch.equal(state, torch.random.get_rng_state()) and python_state == random.getstate()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("room", ["rounding", "measure", "quantize"])
def test_double_precision_only_where_the_device_has_it(room: str) -> None:
    # Tensors of these rooms may be on an MPS device, where `.double()` raises.
    for path in (ROOT / room).rglob("*.py"):
        found = {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
        assert "double" not in found or path.name == "precision.py", path
