"""The shape of the package: which room may import which, and what every module says of itself."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import bpwise
import pytest

ROOT = Path(bpwise.__file__).parent
ROOMS = ["cli", "quantize", "eval", "convert", "measure", "linalg", "checkpoint"]
"""From the top down: each may import those below it."""

GROUND = {"errors", "progress", "tables", "version"}
"""Below all rooms; these import each other never."""


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
        return 0
    return len(ROOMS) - ROOMS.index(parts[0])


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


def test_imports_are_found() -> None:
    # The test above would pass if it saw nothing.
    found = {name_of(path): imported(path) for path in room_files()}
    assert ("measure", "run") in found["quantize/options"]
    assert ("errors",) in found["convert/exl2/store"]
    assert ("convert", "exl2", "linear") in found["rounding/feedback"]
    assert ("quantize", "pipeline") in found["cli/quantize"]  # inside a function
    assert rank(("cli", "quantize")) > rank(("quantize", "plan")) > rank(("eval", "report")) > rank(("measure", "run"))
    assert rank(("measure",)) > rank(("rounding", "grid")) > rank(("convert", "files")) > rank(("errors",)) == 0


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
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *GROUND}


@pytest.mark.parametrize("path", MODULES)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":")), "the first line is one sentence"


@pytest.mark.parametrize("path", EXPORTING)
def test_exports_exist(path: Path) -> None:
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


BEFORE = [
    "",
    "import bpwise.quantize.pipeline, bpwise.measure.run",
    "import bpwise.convert.exl2.plan.plan, bpwise.measure.measurement",
    "from bpwise.measure.text.calibration import CalibrationConfig",
    "from bpwise import measure_model, quantize",
    "import bpwise.eval.comparison, bpwise.cli",
    "from bpwise import *",
]


def test_stages_can_be_called_whatever_was_imported() -> None:
    # Importing a submodule binds its package's name, which must not hide the function of that name.
    code = f"""
import sys
import torch, transformers  # once for all rounds
for before in {BEFORE!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "bpwise"]:
        del sys.modules[name]
    exec(before, {{}})
    import bpwise
    for name in ("quantize", "measure_model", "plan", "verify", "evaluate", "inspect", "dequantize"):
        assert callable(getattr(bpwise, name)), (before, name)
    for function in (bpwise.quantize, bpwise.measure_model):
        try:
            function()
        except TypeError as error:
            assert "missing" in str(error), (before, error)  # it was called, without its arguments
        else:
            raise SystemExit(f"{{before}}: was not called")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_changes_nothing() -> None:
    # No environment variables, signal handlers or seeds; torch is imported first, so that its own changes do not count.
    code = """
import os, random, signal, torch, transformers
before = dict(os.environ), signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.is_grad_enabled()
state, python_state = torch.random.get_rng_state(), random.getstate()
import bpwise.cli, bpwise.quantize.pipeline, bpwise.quantize.inspect, bpwise.convert.dense, bpwise.eval.report.report
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
