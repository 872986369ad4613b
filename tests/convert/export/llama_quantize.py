"""llama-quantize itself, on rules of ours: ``python tests/convert/export/llama_quantize.py PROGRAM BASE.gguf GOLDEN``.

BASE.gguf is any unquantized file of rows that 32 divides, as the ``llama`` of the fixture ``converted``.
"""

import json
import subprocess
import sys
from pathlib import Path

from bpwise.convert.gguf.export.rules import tensor_rules
from bpwise.convert.gguf.plan.plan import GgufPlan, TensorPlan
from gguf import GGUFReader

TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "F16")
"""Types of 32 weights a block, and one that is not quantized."""


def plan_of(shapes: dict[str, tuple[int, ...]]) -> GgufPlan:
    """A plan of tensors by name, with types in turn."""
    tensors = [
        TensorPlan(name=name, shape=shape, linears=(), type=TYPES[index % 7 if index else 7], damage_nats=0)
        for index, (name, shape) in enumerate(sorted(shapes.items()))
    ]
    numbers = {"other_weights": 0, "other_bytes": 0, "target_bytes": 1 << 40, "lower_bound_nats": 0}
    return GgufPlan(tensors=tuple(tensors), measurement="x", **numbers)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The matrices of a file, outermost dimension first."""
    tensors = GGUFReader(path).tensors
    return {each.name: tuple(int(n) for n in reversed(each.shape)) for each in tensors if len(each.shape) > 1}


def types_made(program: Path, base: Path, rules: str, folder: Path) -> dict[str, str]:
    """Types of all matrices in the file that llama-quantize makes by rules; what none names would be Q8_0."""
    (folder / "rules.txt").write_text(rules, encoding="utf-8")
    output = folder / "made.gguf"
    command = [str(program), "--tensor-type-file", str(folder / "rules.txt"), str(base), str(output), "Q8_0", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return {each.name: each.tensor_type.name for each in GGUFReader(output).tensors if len(each.shape) > 1}


def main(program: Path, base: Path, golden: Path) -> None:
    """Write what the program makes of a plan."""
    shapes = shapes_of(base)
    rules = tensor_rules(plan_of(shapes))
    made = types_made(program, base, "\n".join(rules), golden.parent)
    content = {"shapes": shapes, "rules": rules, "types": made}
    golden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
