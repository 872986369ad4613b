"""Makes golden.json with llama.cpp's own llama-quantize: ``python make_golden.py PATH/TO/llama-quantize``.

``types``: for each model and mixture, without and with an importance matrix, a digest of the types that
``llama-quantize --dry-run`` names, or null where it refuses. ``files``: SHA-256 of whole files that it writes.
Made with llama.cpp's llama-quantize of the source that llama-cpp-python 0.3.36 holds (ggml 0.25.3).
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bpwise.convert.gguf.llama_cpp.imatrix import write_imatrix
from bpwise.convert.gguf.llama_cpp.mixtures import MIXTURES

sys.path.insert(0, str(Path(__file__).parent))
from conftest import MODELS, importance_of, write_model

FILES = {"small": "BF16", "narrow": "F32", "small-experts": "F16"}

# ggml takes seconds to make the tables of these; once is enough.
SLOW = {name for name in MIXTURES if name.startswith(("IQ1", "IQ2"))} | {"IQ3_XXS"}
LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\S+), size = +\S+ MiB(?: -> +\S+ MiB \((\S+)\))?")


def types_digest(program: str, directory: str, model: str, mixture: str, imatrix: list[str]) -> str | None:
    done = subprocess.run(
        [program, "--dry-run", *imatrix, f"{model}.gguf", mixture],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [LINE.match(line) for line in (done.stdout + done.stderr).splitlines()]
    lines = [f"{match[1]} {(match[3] or match[2]).upper()}\n" for match in found if match]
    if done.returncode or not lines:
        raise SystemExit(f"{model} {mixture}: {done.stderr[-2000:]}")
    # A dry run only warns that a real one would refuse.
    if "will require an imatrix" in done.stdout + done.stderr:
        return None
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def file_digest(program: str, directory: str, model: str, mixture: str) -> str:
    command = [program, "--imatrix", "imatrix.gguf", f"{model}.gguf", "out.gguf", mixture, "1"]
    subprocess.run(command, cwd=directory, capture_output=True, check=True)
    return hashlib.sha256(Path(directory, "out.gguf").read_bytes()).hexdigest()


def main(program: str) -> None:
    golden: dict[str, dict[str, dict[str, object]]] = {"types": {}, "files": {}}
    with tempfile.TemporaryDirectory() as directory:
        for model in MODELS:
            write_model(Path(directory, f"{model}.gguf"), model, values=False)
            write_imatrix(Path(directory, "imatrix.gguf"), importance_of(model))
            golden["types"][model] = {
                mixture: [
                    types_digest(program, directory, model, mixture, imatrix)
                    for imatrix in ([], ["--imatrix", "imatrix.gguf"])
                ]
                for mixture in MIXTURES
            }
        for model, dtype in FILES.items():
            write_model(Path(directory, f"{model}.gguf"), model, dtype=dtype)
            write_imatrix(Path(directory, "imatrix.gguf"), importance_of(model))
            golden["files"][model] = {
                mixture: file_digest(program, directory, model, mixture)
                for mixture in MIXTURES
                if model == "small" or mixture not in SLOW
            }
    Path(__file__).with_name("golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
