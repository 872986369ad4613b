"""EXL2 as a format: a directory of safetensors files that ExLlamaV2 and TabbyAPI load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..format import CardFacts, Conversion, Format, Plan, QuantizedModel, Verification
from .file.manifest import MANIFEST_FILE, read_manifest

if TYPE_CHECKING:
    from ...checkpoint.source.checkpoint import Checkpoint
    from ...measure.curves import CurveMaker
    from ...measure.measurement import Measurement

__all__ = ["FORMAT", "Exl2Format"]


class Exl2Format(Format):
    """All that is special to EXL2."""

    name = "exl2"
    title = "EXL2"
    bpw_means = "of all linears but the head"
    own_files = (*Format.own_files, MANIFEST_FILE)

    def recognises(self, path: Path) -> bool:
        """Return whether a directory is an EXL2 model, by whatever program."""
        from .file.tensors import is_exl2

        return is_exl2(path)

    def open(self, path: Path) -> QuantizedModel:
        """Open an EXL2 directory; see ``Exl2Model.open``."""
        from .file.reader import Exl2Model

        return Exl2Model.open(path)

    def verify(self, path: Path) -> Verification:
        """Read every tensor back; see ``verify_exl2``."""
        from .file.verify import verify_exl2

        return verify_exl2(path)

    def card(self, model: QuantizedModel, base_name: str) -> CardFacts:
        """Return what a card says of a model; ``base_name`` is what the original is called."""
        from .card import exl2_card
        from .file.reader import Exl2Model

        assert isinstance(model, Exl2Model)
        return exl2_card(model, base_name)

    def output_name(self, base_name: str, bpw: float, options: Any) -> str:
        """Return the name of an output by convention: ``Llama-3.2-1B-8.0bpw-8hb-exl2``."""
        from .card import exl2_name

        return exl2_name(base_name, bpw, options.head_bits if isinstance(options.head_bits, int) else None)

    def run_of(self, path: Path) -> str | None:
        """Return what the manifest of a directory says of its run; None if it has none."""
        manifest = read_manifest(path) if path.is_dir() else None
        return None if manifest is None else manifest.provenance.run

    def curves(self, options: Any) -> CurveMaker | None:
        """Not written yet."""
        raise NotImplementedError

    def load_plan(self, raw: dict[str, Any], where: str) -> Plan:
        """Not written yet."""
        raise NotImplementedError

    def plan(self, measurement: Measurement, options: Any, *, bpw: float | None, max_bytes: int | None) -> Plan:
        """Not written yet."""
        raise NotImplementedError

    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Not written yet."""
        raise NotImplementedError

    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Not written yet."""
        raise NotImplementedError


FORMAT = Exl2Format()
