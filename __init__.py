"""bpwise: measure how much each bit matters to a language model, then quantize it to exactly the asked size.

``bpwise.quantize`` and ``bpwise.measure`` run the stages, and ``bpwise.quantize_series`` makes several bitrates from
one measurement; ``bpwise.plan``, ``bpwise.verify``, ``bpwise.evaluate``, ``bpwise.inspect`` and ``bpwise.dequantize``
are other commands as functions, and ``bpwise.open_model`` says what shall be changed while a model is read. Options
are frozen config objects. Everything is imported when it is first used, so that ``import bpwise`` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .convert.exl2.dense import dequantize_model as dequantize
    from .convert.exl2.verify import verify_model as verify
    from .convert.original import open_model
    from .errors import BpwiseError
    from .eval.comparison import EvalConfig, evaluate
    from .measure.calibration import CalibrationConfig, CalibrationSet
    from .measure.measurement import Measurement
    from .measure.run import MeasureConfig
    from .measure.run import measure_to_file as measure
    from .quantize.inspect import inspect_path as inspect
    from .quantize.pipeline import QuantizeConfig
    from .quantize.pipeline import quantize_model as quantize
    from .quantize.plan import Plan
    from .quantize.plan import make_plan as plan
    from .quantize.series import quantize_series

_HOMES = {
    "BpwiseError": ("errors", "BpwiseError"),
    "CalibrationConfig": ("measure.calibration", "CalibrationConfig"),
    "CalibrationSet": ("measure.calibration", "CalibrationSet"),
    "EvalConfig": ("eval.comparison", "EvalConfig"),
    "MeasureConfig": ("measure.run", "MeasureConfig"),
    "Measurement": ("measure.measurement", "Measurement"),
    "Plan": ("quantize.plan", "Plan"),
    "QuantizeConfig": ("quantize.pipeline", "QuantizeConfig"),
    "dequantize": ("convert.exl2.dense", "dequantize_model"),
    "evaluate": ("eval.comparison", "evaluate"),
    "inspect": ("quantize.inspect", "inspect_path"),
    "open_model": ("convert.original", "open_model"),
    "plan": ("quantize.plan", "make_plan"),
    "quantize_series": ("quantize.series", "quantize_series"),
    "verify": ("convert.exl2.verify", "verify_model"),
}

__all__ = [
    "BpwiseError",
    "CalibrationConfig",
    "CalibrationSet",
    "EvalConfig",
    "MeasureConfig",
    "Measurement",
    "Plan",
    "QuantizeConfig",
    "__version__",
    "dequantize",
    "evaluate",
    "inspect",
    "measure",
    "open_model",
    "plan",
    "quantize",
    "quantize_series",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("measure", "quantize"):  # rooms that can be called
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
