"""Plans for llama.cpp's llama-quantize: a file of types for ``--tensor-type-file``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ....measure.measurement import Measurement
from ...conversion import Target
from ...format import ExportedPlan
from .rules import base_mixture, planned, tensor_rules

__all__ = ["llama_quantize_plan"]


def llama_quantize_plan(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    """Return a plan for llama-quantize, one rule a line; see ``Exporter.make``.

    Entries are separated by white space, the first that matches wins, and a tensor without one gets the mixture's type.
    Source: llama.cpp's ``tools/quantize/quantize.cpp`` and ``src/llama-quant.cpp``.

    Raises:
        BudgetError: No plan has this size.
        ConfigError: GGUF was not measured.
    """
    plan = planned(measurement, target)
    matrix = quote(str(output.with_name(f"{source.stem}-imatrix.gguf")))
    return ExportedPlan(
        text="".join(f"{rule}\n" for rule in tensor_rules(plan)),
        facts=plan.describe().facts,
        commands=(
            f"bpwise imatrix {quote(str(source))} -o {matrix}",
            f"llama-quantize --imatrix {matrix} --tensor-type-file {quote(str(output))} MODEL-BF16.gguf MODEL.gguf "
            f"{base_mixture(plan)}",
        ),
    )
