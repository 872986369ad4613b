"""MLX as a format: a directory of safetensors files that mlx-lm loads on Apple's machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BpwiseError, CheckpointError
from ..conversion import Conversion
from ..format import Format
from ..model import CardFacts, QuantizedModel, Verification
from ..plan import Plan
from .file.manifest import MANIFEST_FILE
from .options import MlxOptions

if TYPE_CHECKING:
    from ...checkpoint.source.checkpoint import Checkpoint
    from ...measure.measurement import Measurement

__all__ = ["FORMAT", "MlxFormat"]

_HIGHEST_BPW = 8.5
"""8 bits in groups of 64: above it the damage is below what evaluation can see."""


class MlxFormat(Format):
    """All that is special to MLX."""

    name = "mlx"
    title = "MLX"
    bpw_means = "of all tensors"
    default_bpw = 4.5
    Options = MlxOptions
    own_files = (*Format.own_files, MANIFEST_FILE)

    def is_installed(self) -> bool:
        """Return whether mlx-lm is."""
        from .mlx_lm.loading import is_installed

        return is_installed()

    def recognises(self, path: Path) -> bool:
        """Return whether a directory is an MLX model, by whatever program: by its config, and scales beside codes."""
        from ...checkpoint.files.schemas import read_json
        from ...checkpoint.source.index import weight_headers
        from .file.model import CONFIG_KEYS

        if not (path / "config.json").is_file():
            return False
        try:
            if CONFIG_KEYS[0] not in read_json(path / "config.json", CheckpointError):
                return False
            headers = weight_headers(path).values()
        except BpwiseError:  # what is wrong with it shows when it is opened as something else
            return False
        return any(name.endswith(".scales") for header in headers for name in header.entries)

    def open(self, path: Path) -> QuantizedModel:
        """Open an MLX directory; see ``MlxModel.open``."""
        from .file.model import MlxModel

        return MlxModel.open(path)

    def verify(self, path: Path) -> Verification:
        """Read every tensor back; see ``verify_mlx``."""
        from .file.writer import verify_mlx

        return verify_mlx(path)

    def card(self, model: QuantizedModel, base_name: str) -> CardFacts:
        """Return what a card says of a model; ``base_name`` is what the original is called."""
        from .card import mlx_card
        from .file.model import MlxModel

        assert isinstance(model, MlxModel)
        return mlx_card(model, base_name)

    def output_name(self, base_name: str, bpw: float | str, options: Any) -> str:
        """Return the name of an output by convention: ``Llama-3.2-1B-4.5bpw-mlx``."""
        from .card import mlx_name

        return mlx_name(base_name, bpw)

    def load_plan(self, raw: dict[str, Any], where: str) -> Plan:
        """Return the plan that a JSON file holds."""
        from .plan.plan import MlxPlan

        return MlxPlan.from_json(raw, where)

    def plan(self, measurement: Measurement, options: Any, *, bpw: float | None, max_bytes: int | None) -> Plan:
        """Return a plan made from a measurement alone; see ``make_mlx_plan``."""
        from .plan.problem import make_mlx_plan

        return make_mlx_plan(measurement, bpw=bpw, tensor_bytes=max_bytes, overrides=options.overrides)

    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Return the smallest bits per weight over all tensors, and the largest worth planning."""
        from .plan.problem import measured_problem

        if self.name not in measurement.curves:
            return None
        problem = measured_problem(measurement, options.overrides)
        least, most = problem.size_range
        return 8 * least / problem.weights, min(_HIGHEST_BPW, 8 * most / problem.weights)

    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Return an original on its way to MLX."""
        from .conversion import MlxConversion

        return MlxConversion(checkpoint, options)


FORMAT = MlxFormat()
