"""Plans for exllamav3's converter: a recipe for ``-rcp``."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from ...measure.measurement import Measurement
from ...version import __version__
from ..conversion import Target
from ..format import ExportedPlan
from .units import measured_structure, single_units
from .widths import Grid, choose_bits

__all__ = ["exllamav3_plan"]

_GRID = Grid(engine="exllamav3", widths=(1, 2, 3, 4, 5, 6, 7, 8), multiple=128, head_bits=6)
"""Source: exllamav3 1.6.5, ``modules/linear.py`` and ``conversion/allocation.py``. Its half bits are not measured."""


def exllamav3_plan(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    """Return a plan for exllamav3, one pattern a linear; see ``Exporter.make``.

    Patterns are fnmatch's and begin with ``*``: exllamav3 calls modules as checkpoints do, which put another prefix
    before a language model inside of another model. All experts of a block get the same bits, as its kernels need.
    Source: ``conversion/convert_model.py`` and ``conversion/allocation.py``.

    Raises:
        BudgetError: Nothing has this size.
        ConfigError: No format was measured that has whole bits.
        FormatError: The measurement does not tell the structure of the model.
    """
    units = single_units(measured_structure(measurement))
    chosen = choose_bits(measurement, units, _GRID, target)
    lines = [
        f"# bpwise {__version__}: bits of linears, for exllamav3's convert.py -rcp",
        f"achieved_bpw: {chosen.bpw:.4f}",
        f"head_bits: {_GRID.head_bits}",
        "tensors:",
        *(
            f"  {json.dumps(f'*{unit.place}.{unit.names[0]}' + ('.*' if unit.below else ''))}: {bits}"
            for unit, bits in zip(units, chosen.bits, strict=True)
        ),
    ]
    return ExportedPlan(
        text="\n".join(lines) + "\n",
        facts=(*chosen.facts, f"head: {_GRID.head_bits} bits beside them"),
        commands=(f"python convert.py -i MODEL -o OUT -w WORK -rcp {quote(str(output))}",),
    )
