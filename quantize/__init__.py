"""What we decide and do: bit allocation, the rounding pass, the pipeline that joins the stages.

The room can be called: ``bpwise.quantize(model, output, config)`` is ``bpwise.quantize.pipeline.quantize_model``.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import QuantizeResult


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> QuantizeResult:
        """Quantize a model; see ``bpwise.quantize.pipeline.quantize_model``."""
        from .pipeline import quantize_model  # noqa: PLC0415 - keeps `import bpwise` free of torch

        return quantize_model(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
