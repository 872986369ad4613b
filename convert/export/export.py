"""All programs that plans are exported for, and how that is done."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import write_text
from ...errors import BpwiseWarning, ConfigError
from ...measure.measurement import Measurement
from ..conversion import Target
from ..format import ExportedPlan, Exporter
from ..registry import formats

__all__ = ["default_output", "export_plan", "exporters", "is_export"]

_HEAD_BYTES = 1 << 16
_PATTERN = r"\^\(model"


def _when_asked(module: str, function: str) -> Callable[..., ExportedPlan]:
    def make(*arguments: Any) -> ExportedPlan:
        made: ExportedPlan = getattr(import_module(module, __package__), function)(*arguments)
        return made

    return make


_OWN = (
    Exporter(
        engine="exllamav3",
        suffix=".yaml",
        sign=r"# bpwise \S+: bits of linears",
        make=_when_asked(".exllamav3", "exllamav3_plan"),
    ),
    Exporter(
        engine="gptqmodel",
        suffix=".json",
        sign=rf'\{{\s*"dynamic": \{{\s*"{_PATTERN}',
        make=_when_asked(".gptqmodel", "gptqmodel_plan"),
    ),
    Exporter(
        engine="auto-round",
        suffix=".json",
        sign=rf'\{{\s*"{_PATTERN}',
        make=_when_asked(".auto_round", "auto_round_plan"),
    ),
)


def exporters() -> Mapping[str, Exporter]:
    """Return all of them by name: those that make a format of bpwise, then those with formats of their own."""
    known = (*(each for format_ in formats().values() for each in format_.exporters), *_OWN)
    return {each.engine: each for each in known}


def default_output(measurement: Path, engine: str, target: Target) -> Path:
    """Return the name by convention: ``m-exllamav3-4bpw.yaml`` beside the measurement."""
    label = f"{target.bpw:g}bpw" if target.bpw is not None else target.label
    return measurement.with_name(f"{measurement.stem}-{engine}-{label}{exporters()[engine].suffix}")


def is_export(path: Path, engine: str) -> bool:
    """Return whether a file is a plan that was exported for an engine."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return False
    return re.match(exporters()[engine].sign, head) is not None


def export_plan(
    measurement: str | Path,
    output: str | Path | None = None,
    *,
    engine: str,
    bpw: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> ExportedPlan:
    """Write a plan for another program that quantizes models.

    Args:
        measurement: A measurement's file.
        output: File to make or replace; None for ``default_output``.
        engine: ``llama-quantize``, ``ik`` (ik_llama.cpp), ``exllamav3``, ``gptqmodel`` or ``auto-round``.
        bpw: Bits per weight: for the first two over all tensors, for the others over the decoder's linears; met from
            below, never exceeded.
        max_bytes: Largest size of the model's files; one of the two is given.
        dry_run: Whether nothing is written.

    Returns:
        What is in the file, and the commands to run.

    Raises:
        BudgetError: No plan has this size; the message gives the range that there is.
        ConfigError: The engine is not known, or the measurement lacks the curves that it needs.
        FormatError: The measurement is damaged.
        WorkDirectoryError: The file cannot be written.

    Example:
        >>> from bpwise import export_plan
        >>> plan = export_plan("m.safetensors", "bits.yaml", engine="exllamav3", bpw=4.0)
        >>> plan.commands[0]
        'python convert.py -i MODEL -o OUT -w WORK -rcp bits.yaml'
    """
    known, source = exporters(), Path(measurement)
    if engine not in known:
        raise ConfigError(f"engine: not known. Got {engine!r}. Expected one of {', '.join(known)}. Choose another.")
    target = Target(bpw=bpw, max_bytes=max_bytes)
    path = default_output(source, engine, target) if output is None else Path(output)
    measured = Measurement.load(source)
    if any(linear.input_factors is not None for linear in measured.linears):
        warnings.warn(
            f"{source}: the measurement is of equalized channels, which {engine} does not have. The plan may not be "
            "the best there, and loses more than it says. Measure the model without --equalize.",
            BpwiseWarning,
            stacklevel=2,
        )
    plan = known[engine].make(measured, target, source, path)
    if not dry_run:
        write_text(path, plan.text)
    return plan
