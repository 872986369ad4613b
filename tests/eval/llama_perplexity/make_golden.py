"""Makes golden.json and quantized.gguf.gz with llama.cpp's own llama-perplexity.

``make build/llama.cpp/bin/llama-perplexity``, then
``.venv/bin/python -m tests.eval.llama_perplexity.make_golden build/llama.cpp/bin/llama-perplexity``.

``base_sha256``: of the base file that it writes of the exact original. ``final``: what it prints of that. ``table``:
what it prints of the other exact model, which ``quantized.gguf.gz`` holds, beside the base file. ``attending``: the
last two of the models that attend. Made with the source that llama-cpp-python 0.3.36 holds.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...byte_converter import convert_with_bytes
from .models import TEXT, WINDOW_TOKENS, save_attending_model, save_exact_model

FINAL = "Final estimate:"
FLOAT32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
"""By default it rounds keys and values to float16."""

TABLE = "====== Perplexity statistics ======"


def run(program: str, folder: Path, model: str, last: str, *flags: str) -> list[str]:
    """Return what it prints, up to the line that begins so.

    A thread of its own prints, and the process may end before it is through: then it runs again.
    """
    command = [program, "-m", f"{model}.gguf", "-c", str(WINDOW_TOKENS), "--kl-divergence-base", "base.kld", *flags]
    for _ in range(50):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        lines = (done.stderr + done.stdout).splitlines()
        ends = [number for number, line in enumerate(lines, start=1) if last in line]
        if ends and not done.returncode:
            return lines[: ends[0]]
    raise SystemExit(f"{' '.join(command)}: printed no line with {last!r}")


def pair(program: str, folder: Path, save: Callable[..., Path], *flags: str) -> dict[str, Any]:
    """Return what it prints of an original, and of the other model beside it."""
    models = [save(folder / "original"), save(folder / "quantized", quantized=True)]
    convert_with_bytes([(model, folder / f"{model.name}.gguf") for model in models], "--outtype", "f32")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    final = run(program, folder, "original", FINAL, "-f", "text.txt", *flags)[-1]
    lines = run(program, folder, "quantized", "Same top p:", "--kl-divergence", *flags)
    return {"final": final[final.index(FINAL) :], "table": lines[lines.index(TABLE) :]}


def main(program: str) -> None:
    golden = Path(__file__).with_name("golden.json")
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        exact = pair(program, Path(name), save_exact_model)
        base = Path(name, "base.kld").read_bytes()
        found = {"base_sha256": hashlib.sha256(base).hexdigest(), "base_bytes": len(base), **exact}
        packed = gzip.compress(Path(name, "quantized.gguf").read_bytes(), mtime=0)
        golden.with_name("quantized.gguf.gz").write_bytes(packed)
        found["attending"] = pair(program, Path(other), save_attending_model, *FLOAT32)
    golden.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
