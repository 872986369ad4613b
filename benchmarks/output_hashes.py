"""Hashes of what fixed runs write, to hold against those of another version: a refactoring changes none of them.

Each MODEL is quantized to three sizes in both formats. Of every output the names and bytes of all tensors are hashed,
and config.json where there is one; metadata of files, cards and reports are not. Sums of floating-point numbers differ
from machine to machine, so both versions run on the same one::

    python benchmarks/output_hashes.py MODEL... --save before.json
    python benchmarks/output_hashes.py MODEL... --check before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

RUNS = {
    "exl2": ["--bpw", "8,4,3", "--head-bits", "8", "-r", "4", "-l", "512"],
    "gguf": ["--format", "gguf", "--bpw", "8.5,6,5", "-r", "2", "-l", "256"],
}


def main() -> None:
    """Quantize, hash, and save or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--formats", default=",".join(RUNS), help="Which of the runs.")
    parser.add_argument("--options", default="", help="Further options of bpwise quantize.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save", type=Path)
    target.add_argument("--check", type=Path)
    args = parser.parse_args()
    found = {}
    for model in args.models:
        for name in args.formats.split(","):
            with tempfile.TemporaryDirectory() as directory:
                found |= _run(model, Path(directory) / "out", [*RUNS[name], *args.options.split()])
    for name, digest in found.items():
        print(f"{digest}  {name}")
    if args.save is not None:
        args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(args.check.read_text(encoding="utf-8"))
    different = [name for name, digest in found.items() if before.get(name) != digest]
    if different:
        sys.exit(f"{len(different)} of {len(found)} differ: {', '.join(different)}")
    print(f"all {len(found)} are the same")


def _run(model: Path, output: Path, options: list[str]) -> dict[str, str]:
    command = [
        sys.executable,
        "-c",
        "from bpwise.cli import main; main()",
        "quantize",
        str(model),
        str(output),
        "--no-eval",
        *options,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {}
    for made in sorted(output.iterdir()):
        if made.is_dir():
            found[f"{made.name} tensors"] = _of_safetensors(made)
            found[f"{made.name} config.json"] = hashlib.sha256((made / "config.json").read_bytes()).hexdigest()[:32]
        elif made.suffix == ".gguf":
            found[f"{made.name} tensors"] = _of_gguf(made)
    return found


def _of_safetensors(directory: Path) -> str:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                array = file.get_tensor(name) if file.get_slice(name).get_dtype() != "BF16" else _bytes(path, name)
                tensors[name] = hashlib.sha256(array.tobytes()).hexdigest()
    return _digest(tensors)


def _bytes(path: Path, name: str) -> memoryview:
    # NumPy has no bfloat16.
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    first, last = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return memoryview(raw)[8 + length + first : 8 + length + last]


def _of_gguf(path: Path) -> str:
    from gguf import GGUFReader  # noqa: PLC0415 - an extra

    tensors = GGUFReader(path).tensors
    return _digest({tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in tensors})


def _digest(tensors: dict[str, str]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name}{tensors[name]}".encode())
    return whole.hexdigest()[:32]


if __name__ == "__main__":
    main()
