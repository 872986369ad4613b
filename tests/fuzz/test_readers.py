"""Every module that reads files has a reader on the list, or a reason why not."""

import ast
from pathlib import Path

import bpwise
import pytest

from .readers import READERS

ROOT = Path(bpwise.__file__).parent

CALLS = {
    *("HfApi", "from_pretrained", "load_dataset", "memmap", "parse_schema", "read_bytes", "read_header", "read_json"),
    *("read_schema", "read_text", "safe_open", "safe_load", "snapshot_download", "unpack", "unpack_from", "urlopen"),
}
"""Functions and methods that read, by their names; ``loads``, ``load`` and ``open`` as below."""

NOT_FUZZED = {
    "checkpoint/files/digests": "a cache of digests; whatever is wrong with it, files are read instead",
    "checkpoint/files/operations": "copies bytes",
    "checkpoint/files/partials": "a list of bpwise's own, of which only names in one directory are believed",
    "convert/dense": "whether an output that is there is its own: compares a digest",
    "convert/gguf/base": "compares a digest",
    "convert/gguf/engine/gate": "a schema's dataclass in the work directory",
    "convert/gguf/engine/library": "answers of a process of bpwise's own",
    "convert/gguf/engine/widened": "a GGUF file that convert/gguf/file/header has read",
    "convert/gguf/engine/worker": "requests of the process that started it",
    "convert/gguf/file/writer": "a GGUF file that convert/gguf/file/header has read",
    "convert/gguf/ggml/rounding": "numbers of its own",
    "convert/gguf/llama_cpp/check": "what the converter wrote, and a tokenizer that was loaded before",
    "convert/gguf/llama_cpp/converter": "the converter itself",
    "convert/gguf/llama_cpp/fetch": "an archive of one SHA-256",
    "convert/gguf/llama_cpp/staging": "a tokenizer that was loaded before",
    "eval/report/html": "files of the package",
    "eval/report/made": "files of Linux",
    "eval/report/report": "whether a report that is replaced is one",
    "eval/tasks/benchmarks": "generation_config.json, which Transformers reads",
    "eval/models": "hashes files",
    "eval/publishing/front": "cards that are pushed, cut as base_card cuts those of others",
    "measure/device": "files of Linux",
    "measure/text/builtin_text": "files of the package and of Python",
    "measure/text/chats": "a file of the package",
    "quantize/measuring": "a schema's dataclass in the work directory",
    "quantize/planning/page": "whether a page that is replaced is one",
    "quantize/recipe": "a small file that YAML's base loader reads as strings; its own tests spoil it",
    "quantize/timing/costs": "files of Linux",
}
"""Modules that read what needs no fuzzing, and why."""


def reads(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        on = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = {each.value for each in node.args if isinstance(each, ast.Constant)}
        library = isinstance(on, ast.Name) and on.id in ("json", "yaml", "torch", "np")
        if name in CALLS or (name in ("load", "loads") and library) or (name == "open" and on and "rb" in modes):
            return True
    return False


def test_every_module_that_reads_is_fuzzed() -> None:
    paths = [path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] in ROOMS]
    found = {str(path.relative_to(ROOT))[:-3] for path in paths if reads(ast.parse(path.read_text(encoding="utf-8")))}
    fuzzed = {module for reader in READERS.values() for module in reader.modules}
    assert found - fuzzed - NOT_FUZZED.keys() == set(), "needs a reader in tests/fuzz/readers.py"
    assert NOT_FUZZED.keys() - found == set()
    assert NOT_FUZZED.keys() & fuzzed == set()
    assert {module for module in fuzzed if not (ROOT / f"{module}.py").exists()} == set()


ROOMS = ("cli", "quantize", "eval", "convert", "measure", "linalg", "checkpoint")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("json.loads(a)", True),
        ("yaml.load(a)", True),
        ("path.open('rb')", True),
        ("path.read_text()", True),
        ("struct.unpack('<I', a)", True),
        ("model.open(a)", False),
        ("path.open('w')", False),
        ("store.load(a)", False),
    ],
)
def test_calls_that_read_are_found(code: str, expected: bool) -> None:
    assert reads(ast.parse(code)) is expected
