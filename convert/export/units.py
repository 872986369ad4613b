"""Linears that get the same bits, because programs that run a model join them when they load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...checkpoint.model.structure import ModelStructure
from ...checkpoint.model.structure_json import structure_from_json
from ...errors import FormatError
from ...measure.measurement import Measurement
from ...measure.measurement_file import REMEDY

__all__ = ["Unit", "joined_units", "measured_structure", "single_units"]

_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), "in_proj_ba"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""What vLLM and SGLang call linears that they join, by the names of these. Source: ``packed_modules_mapping`` of vLLM
0.33's models. Beside them, all experts of a block are one."""


@dataclass(slots=True)
class Unit:
    """Linears that get the same bits.

    Attributes:
        place: Name of the block, without what may be before it in a model of several parts: ``layers.3``.
        names: Names of the modules inside the block, with what others call them when they are joined.
        below: Whether the linears are below these modules, as those of experts are.
        linears: Names in the measurement.
    """

    place: str
    names: list[str] = field(default_factory=list)
    below: bool = False
    linears: list[str] = field(default_factory=list)

    def add(self, linear: str, *names: str) -> None:
        """Add a linear, and what its module may be called."""
        self.linears.append(linear)
        self.names = list(dict.fromkeys((*self.names, *names)))

    @property
    def pattern(self) -> str:
        r"""A regular expression that modules' full names match, whatever model of several parts the decoder is in.

        ``^(model\.|language_model\.)*layers\.3\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$``
        """
        stems = {name.rpartition(".")[0] for name in self.names}
        stem = f"{stems.pop()}." if len(stems) == 1 else ""
        leaves = [re.escape(name.removeprefix(stem)) for name in self.names]
        names = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        end = r"(\.|$)" if self.below else "$"
        return rf"^(model\.|language_model\.)*{re.escape(f'{self.place}.{stem}')}{names}{end}"


def measured_structure(measurement: Measurement) -> ModelStructure:
    """Return where a measurement's linears are in Transformers' model.

    Raises:
        FormatError: It does not say, or says so of other linears.
    """
    where = "measurement: provenance: structure"
    structure = structure_from_json(measurement.provenance.get("structure"), FormatError, where=where)
    known = [
        f"{structure.blocks}.{index}.{name}"
        for index, block in enumerate(structure.structures)
        for group in block.groups
        for name in group.linears
    ]
    if known != [linear.name for linear in measurement.linears]:
        raise FormatError(f"{where}: not that of the measured linears. Got {len(known)} others. {REMEDY}")
    return structure


def single_units(structure: ModelStructure) -> list[Unit]:
    """Return a unit for each linear outside of experts, and one for all experts of a block; by names in checkpoints."""
    units: dict[str, Unit] = {}
    for linear, place, name, expert, _ in _linears(structure):
        inside = name if expert is None else name.rpartition(f".{expert}.")[0]
        units.setdefault(f"{place}.{inside}", Unit(place, below=expert is not None)).add(linear, inside)
    return list(units.values())


def joined_units(structure: ModelStructure) -> list[Unit]:
    """Return a unit for all that programs join, under the names of Transformers' modules and of what joins them."""
    units: dict[str, Unit] = {}
    for linear, place, name, expert, module in _linears(structure):
        if expert is not None:
            names = [name.rpartition(f".{expert}.")[0], module]
        else:
            stem, _, leaf = module.rpartition(".")
            names = [module, ".".join(filter(None, (stem, _JOINED.get(leaf, leaf))))]
        units.setdefault(f"{place}.{names[-1]}", Unit(place, below=expert is not None)).add(linear, *names)
    for unit in units.values():  # parts first, then the whole
        unit.names.sort(key=lambda name: name.rpartition(".")[2] in _JOINED.values())
    return list(units.values())


def _linears(structure: ModelStructure) -> list[tuple[str, str, str, int | None, str]]:
    # Of each linear its full name, its block, its name in it, the number of its expert, and the module in Transformers.
    found = []
    for index, block in enumerate(structure.structures):
        full = f"{structure.blocks}.{index}"
        for name in (name for group in block.groups for name in group.linears):
            place = block.places[name]
            stack = (each for each in block.experts if place.parameter.startswith(f"{each}."))
            module = place.parameter.removesuffix(".weight") if place.expert is None else next(stack, block.experts[0])
            found.append((f"{full}.{name}", full.removeprefix("model."), name, place.expert, module))
    return found
