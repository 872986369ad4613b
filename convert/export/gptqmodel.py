"""Plans for GPTQModel: arguments of its ``QuantizeConfig``, with bits by module as ``dynamic``."""

from __future__ import annotations

import json
from pathlib import Path

from ...measure.measurement import Measurement
from ..conversion import Target
from ..format import ExportedPlan
from .units import joined_units, measured_structure
from .widths import Grid, choose_bits, group_size_of

__all__ = ["gptqmodel_plan"]

_WIDTHS = (2, 3, 4, 8)
"""5, 6 and 7 bits switch a whole file to a layout that few programs read. Source: GPTQModel 7.7.0."""


def gptqmodel_plan(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    """Return a plan for GPTQModel: symmetric codes, the first pattern that matches a module's name from its start wins.

    Patterns match the names of what vLLM and SGLang join, too; see ``Exporter.make``. Source: GPTQModel 7.7.0,
    ``quantization/config.py`` and its README.

    Raises:
        BudgetError: Nothing has this size.
        ConfigError: No format was measured that has whole bits, or no group size fits.
        FormatError: The measurement does not tell the structure of the model.
    """
    units, group = joined_units(measured_structure(measurement)), group_size_of(measurement)
    chosen = choose_bits(measurement, units, Grid(engine="gptqmodel", widths=_WIDTHS, group_size=group), target)
    dynamic = {unit.pattern: {"bits": bits} for unit, bits in zip(units, chosen.bits, strict=True)}
    settings = {"dynamic": dynamic, "bits": chosen.commonest, "group_size": group, "sym": True}
    return ExportedPlan(
        text=json.dumps(settings, indent=1) + "\n",
        facts=(*chosen.facts, f"groups of {group} inputs"),
        commands=(
            "import json; from gptqmodel import GPTQModel, QuantizeConfig",
            f"model = GPTQModel.load('MODEL', QuantizeConfig(**json.load(open({str(output)!r}))))",
            "model.quantize(TEXTS); model.save('OUT')",
        ),
    )
