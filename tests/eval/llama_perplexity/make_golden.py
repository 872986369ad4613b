"""Makes golden.json and quantized.gguf.gz with llama.cpp's own llama-perplexity.

``make build/llama.cpp/bin/llama-perplexity``, then
``.venv/bin/python -m tests.eval.llama_perplexity.make_golden build/llama.cpp/bin/llama-perplexity``.

``base_sha256``: of the base file that it writes. ``final``: what it prints of the original. ``table``: what it prints
of the other model beside the base file, which ``quantized.gguf.gz`` holds. Made
with the source that llama-cpp-python 0.3.36 holds.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ...byte_converter import convert_with_bytes
from .models import TEXT, WINDOW_TOKENS, save_exact_model

FINAL = "Final estimate:"
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


def main(program: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [save_exact_model(folder / "original"), save_exact_model(folder / "quantized", quantized=True)]
        convert_with_bytes([(model, folder / f"{model.name}.gguf") for model in models], "--outtype", "f32")
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        final = run(program, folder, "original", FINAL, "-f", "text.txt")[-1]
        base = (folder / "base.kld").read_bytes()
        lines = run(program, folder, "quantized", "Same top p:", "--kl-divergence")
        golden = {
            "base_sha256": hashlib.sha256(base).hexdigest(),
            "base_bytes": len(base),
            "final": final[final.index(FINAL) :],
            "table": lines[lines.index(TABLE) :],
        }
        packed = gzip.compress((folder / "quantized.gguf").read_bytes(), mtime=0)
    path = Path(__file__).with_name("golden.json")
    path.with_name("quantized.gguf.gz").write_bytes(packed)
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
