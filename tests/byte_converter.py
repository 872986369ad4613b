"""llama.cpp's converter on models with the tests' byte-level tokenizer, which it does not know."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .conftest import llama_cpp_dir

_CODE = """
import json, runpy, sys
import conversion.base
script, pairs, flags = json.loads(sys.argv[1])
base = conversion.base.TextModel
base.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"

def set_vocab(self):
    base._set_vocab_gpt2(self)
    self.gguf_writer.add_token_merges(["a b"])  # llama.cpp wants some

def with_byte_vocabulary(found):
    def get_model_class(*arguments, **options):
        kind = found(*arguments, **options)
        if not options.get("mmproj"):
            kind.set_vocab = set_vocab
        return kind
    return get_model_class

for source, target in pairs:
    sys.argv = [script, "--outfile", target, *flags, source]
    module = runpy.run_path(script, run_name="converter")
    names = module["main"].__globals__
    names["get_model_class"] = with_byte_vocabulary(names["get_model_class"])
    module["main"]()
"""


def convert_with_bytes(pairs: Sequence[tuple[Path, Path]], *flags: str) -> None:
    """Convert model directories to GGUF files, all in one process: it takes seconds to start."""
    directory = llama_cpp_dir()
    arguments = (str(directory / "convert_hf_to_gguf.py"), [(str(a), str(b)) for a, b in pairs], flags)
    run = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{directory / 'gguf-py'}:{directory}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
