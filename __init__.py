"""bpwise: measure how much each bit matters to a language model, then quantize it to exactly the asked size.

The steps as functions: ``measure_model``, ``make_plan``, ``quantize_model`` (all steps), ``quantize_series`` (several
bitrates from one measurement), ``evaluate_models``. What was made: ``verify_model``, ``inspect_path``,
``dequantize_model``, ``write_card``, ``push_model``. For other programs: ``export_imatrix``, ``export_plan``.
``open_model`` says what is changed while a model is read. What is rarely set is in frozen config objects:
``GgufOptions``, ``Exl2Options`` or ``MlxOptions`` (``options=``), ``MeasureConfig`` (``measure=``), ``EvalConfig``
(``evaluate=``).
Everything is imported when it is first used, so that ``import bpwise`` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.source.original import open_model
    from .convert.conversion import Target
    from .convert.dense import dequantize_model
    from .convert.export.export import export_plan
    from .convert.opening import verify_model
    from .convert.plan import Plan
    from .convert.registry import Exl2Options, GgufOptions, MlxOptions, export_imatrix
    from .errors import BpwiseError
    from .eval.comparison import EvalConfig, evaluate_models
    from .eval.publishing.cards import write_card
    from .eval.publishing.push import push_model
    from .measure.measurement import Measurement
    from .measure.run import MeasureConfig
    from .measure.text.calibration import CalibrationConfig, CalibrationSet
    from .progress import ProgressBars, ProgressEvent, ProgressEvents
    from .quantize.inspect import inspect_path
    from .quantize.planning.plans import make_plan
    from .quantize.result import QuantizeResult
    from .quantize.run import measure_model, quantize_model
    from .quantize.series import SeriesResult, quantize_series

_HOMES = {
    "BpwiseError": "errors",
    "CalibrationConfig": "measure.text.calibration",
    "CalibrationSet": "measure.text.calibration",
    "EvalConfig": "eval.comparison",
    "Exl2Options": "convert.registry",
    "GgufOptions": "convert.registry",
    "MlxOptions": "convert.registry",
    "MeasureConfig": "measure.run",
    "Measurement": "measure.measurement",
    "Plan": "convert.plan",
    "ProgressBars": "progress",
    "ProgressEvent": "progress",
    "ProgressEvents": "progress",
    "QuantizeResult": "quantize.result",
    "SeriesResult": "quantize.series",
    "Target": "convert.conversion",
    "dequantize_model": "convert.dense",
    "evaluate_models": "eval.comparison",
    "export_imatrix": "convert.registry",
    "export_plan": "convert.export.export",
    "inspect_path": "quantize.inspect",
    "make_plan": "quantize.planning.plans",
    "measure_model": "quantize.run",
    "open_model": "checkpoint.source.original",
    "push_model": "eval.publishing.push",
    "quantize_model": "quantize.run",
    "quantize_series": "quantize.series",
    "verify_model": "convert.opening",
    "write_card": "eval.publishing.cards",
}

__all__ = [
    "BpwiseError",
    "CalibrationConfig",
    "CalibrationSet",
    "EvalConfig",
    "Exl2Options",
    "GgufOptions",
    "MeasureConfig",
    "Measurement",
    "MlxOptions",
    "Plan",
    "ProgressBars",
    "ProgressEvent",
    "ProgressEvents",
    "QuantizeResult",
    "SeriesResult",
    "Target",
    "__version__",
    "dequantize_model",
    "evaluate_models",
    "export_imatrix",
    "export_plan",
    "inspect_path",
    "make_plan",
    "measure_model",
    "open_model",
    "push_model",
    "quantize_model",
    "quantize_series",
    "verify_model",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
