"""llama.cpp's converter on models with the tests' byte-level tokenizer, which it does not know."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .conftest import llama_cpp_dir

BYTE_VOCABULARY = """

_found = get_model_class


def _set_vocab(self):
    self._set_vocab_gpt2()
    self.gguf_writer.add_token_merges(["a b"])  # llama.cpp wants some


def get_model_class(name, mmproj=False):
    found = _found(name, mmproj)
    if not mmproj:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        found.set_vocab = _set_vocab
    return found
"""
"""What the converter's package ``conversion`` lacks: it takes only tokenizers that it knows by a hash."""

_CODE = """
import json, runpy, sys
import conversion
script, pairs, flags, vocabulary = json.loads(sys.argv[1])
exec(vocabulary, vars(conversion))
for source, target in pairs:
    sys.argv = [script, "--outfile", target, *flags, source]
    runpy.run_path(script, run_name="__main__")
"""


def convert_with_bytes(pairs: Sequence[tuple[Path, Path]], *flags: str) -> None:
    """Convert model directories to GGUF files, all in one process: it takes seconds to start."""
    directory = llama_cpp_dir()
    arguments = (str(directory / "convert_hf_to_gguf.py"), [(str(a), str(b)) for a, b in pairs], flags, BYTE_VOCABULARY)
    run = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{directory / 'gguf-py'}:{directory}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
