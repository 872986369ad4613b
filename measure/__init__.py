"""What the model tells us: calibration text, streaming passes, statistics, error curves.

The room can be called: ``bpwise.measure(model, output, config)`` is ``bpwise.measure.run.measure_to_file``.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measurement import Measurement


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Measurement:
        """Measure a model; see ``bpwise.measure.run.measure_to_file``."""
        from .run import measure_to_file  # noqa: PLC0415 - keeps `import bpwise` free of torch

        return measure_to_file(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
