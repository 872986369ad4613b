"""Plans for ik_llama.cpp's llama-quantize: rules for ``--custom-q``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ....measure.measurement import Measurement
from ...conversion import Target
from ...format import ExportedPlan
from ..ggml.types import TYPES
from ..plan.plan import TypeOverride
from .rules import base_mixture, planned, tensor_rules

__all__ = ["ik_plan"]

_UNKNOWN = ("TQ1_0", "TQ2_0", "BF16", "F32")
"""Types that it does not have, and wide ones that never pay. Source: ik_llama.cpp's ``ggml/src/ggml.c``."""


def ik_plan(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    """Return a plan for ik_llama.cpp in its own and llama.cpp's common types, in one line; see ``Exporter.make``.

    It reads no file of rules, and importance matrices of the older format alone. Source: ik_llama.cpp's
    ``examples/quantize/quantize.cpp`` and ``src/llama-quantize.cpp``.

    Raises:
        BudgetError: No plan has this size.
        ConfigError: GGUF was not measured.
    """
    known = tuple(kind for kind in TYPES.values() if kind.name not in _UNKNOWN)
    plan = planned(measurement, target, (TypeOverride("*", known),))
    matrix = quote(str(output.with_name(f"{source.stem}-imatrix.dat")))
    return ExportedPlan(
        text=",".join(tensor_rules(plan)) + "\n",
        facts=plan.describe().facts,
        commands=(
            f"bpwise imatrix {quote(str(source))} -o {matrix}",
            f'llama-quantize --imatrix {matrix} --custom-q "$(cat {quote(str(output))})" MODEL-BF16.gguf MODEL.gguf '
            f"{base_mixture(plan)}",
        ),
    )
