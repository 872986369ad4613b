"""bpwise: measure how much each bit matters to a language model, then quantize it to exactly the asked size.

``bpwise.quantize`` and ``bpwise.measure_model`` run the steps, and ``bpwise.quantize_series`` makes several bitrates
from one measurement; ``bpwise.plan``, ``bpwise.verify``, ``bpwise.evaluate``, ``bpwise.inspect`` and
``bpwise.dequantize`` are other commands as functions, and ``bpwise.open_model`` says what shall be changed while a
model is read. Options are frozen config objects. Everything is imported when it is first used, so that
``import bpwise`` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.source.original import open_model
    from .convert.dense import dequantize_model as dequantize
    from .convert.exl2.file.verify import verify_model as verify
    from .convert.exl2.plan.plan import Plan
    from .convert.exl2.plan.plan import make_plan as plan
    from .errors import BpwiseError
    from .eval.comparison import EvalConfig, evaluate
    from .measure.measurement import Measurement
    from .measure.run import MeasureConfig, measure_model
    from .measure.text.calibration import CalibrationConfig, CalibrationSet
    from .quantize.inspect import inspect_path as inspect
    from .quantize.pipeline import QuantizeConfig
    from .quantize.pipeline import quantize_model as quantize
    from .quantize.series import quantize_series

_HOMES = {
    "BpwiseError": ("errors", "BpwiseError"),
    "CalibrationConfig": ("measure.text.calibration", "CalibrationConfig"),
    "CalibrationSet": ("measure.text.calibration", "CalibrationSet"),
    "EvalConfig": ("eval.comparison", "EvalConfig"),
    "MeasureConfig": ("measure.run", "MeasureConfig"),
    "Measurement": ("measure.measurement", "Measurement"),
    "Plan": ("convert.exl2.plan.plan", "Plan"),
    "QuantizeConfig": ("quantize.pipeline", "QuantizeConfig"),
    "dequantize": ("convert.dense", "dequantize_model"),
    "evaluate": ("eval.comparison", "evaluate"),
    "inspect": ("quantize.inspect", "inspect_path"),
    "measure_model": ("measure.run", "measure_model"),
    "open_model": ("checkpoint.source.original", "open_model"),
    "plan": ("convert.exl2.plan.plan", "make_plan"),
    "quantize_series": ("quantize.series", "quantize_series"),
    "verify": ("convert.exl2.file.verify", "verify_model"),
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
    "measure_model",
    "open_model",
    "plan",
    "quantize",
    "quantize_series",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "quantize":  # a room that can be called
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
