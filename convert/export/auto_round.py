"""Plans for AutoRound: bits by module as its ``layer_config``."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from ...measure.measurement import Measurement
from ..conversion import Target
from ..format import ExportedPlan
from .units import joined_units, measured_structure
from .widths import Grid, choose_bits, group_size_of

__all__ = ["auto_round_plan"]

_WIDTHS = (2, 3, 4, 8)
"""Those of its presets W2A16 to W8A16, which its formats and their readers have in common."""


def auto_round_plan(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    """Return a plan for AutoRound: regular expressions of modules' names; see ``Exporter.make``.

    It escapes dots itself. Source: auto-round 0.16.1, ``compressors/layer_config_resolver.py`` and
    ``utils/common.py``.

    Raises:
        BudgetError: Nothing has this size.
        ConfigError: No format was measured that has whole bits, or no group size fits.
        FormatError: The measurement does not tell the structure of the model.
    """
    units, group = joined_units(measured_structure(measurement)), group_size_of(measurement)
    chosen = choose_bits(measurement, units, Grid(engine="auto-round", widths=_WIDTHS, group_size=group), target)
    config = {
        unit.pattern.replace(r"\.", "."): {"bits": bits, "group_size": group}
        for unit, bits in zip(units, chosen.bits, strict=True)
    }
    return ExportedPlan(
        text=json.dumps(config, indent=1) + "\n",
        facts=(*chosen.facts, f"groups of {group} inputs"),
        commands=(
            f"auto-round --model MODEL --scheme W{chosen.commonest}A16 --group_size {group} "
            f'--layer_config "$(cat {quote(str(output))})" --output_dir OUT',
        ),
    )
