"""EXL2 as a format: a directory of safetensors files that ExLlamaV2 and TabbyAPI load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..conversion import Conversion
from ..format import Format
from ..model import CardFacts, QuantizedModel, Verification
from ..plan import Plan, planned_context
from .file.manifest import MANIFEST_FILE, read_manifest
from .options import CONFLICTS, Exl2Options

if TYPE_CHECKING:
    from ...checkpoint.source.checkpoint import Checkpoint
    from ...measure.measurement import Measurement

__all__ = ["FORMAT", "Exl2Format"]

_FLOAT16_BITS = 16


class Exl2Format(Format):
    """All that is special to EXL2."""

    name = "exl2"
    title = "EXL2"
    bpw_means = "of all linears but the head"
    default_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"head_bits": 8})
    Options = Exl2Options
    conflicts = CONFLICTS
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

    def completed(self, options: Any, *, sized: bool) -> Any:
        """Return options that leave nothing open; see ``Format``."""
        options = super().completed(options, sized=sized)
        return replace(options, head_bits=options.head)

    def output_name(self, base_name: str, bpw: float | str, options: Any) -> str:
        """Return the name of an output by convention: ``Llama-3.2-1B-8.0bpw-8hb-exl2``."""
        from .card import exl2_name

        return exl2_name(base_name, bpw, options.head if isinstance(options.head, int) else None)

    def run_of(self, path: Path) -> str | None:
        """Return what the manifest of a directory says of its run; None if it has none."""
        manifest = read_manifest(path) if path.is_dir() else None
        return None if manifest is None else manifest.provenance.run

    def load_plan(self, raw: dict[str, Any], where: str) -> Plan:
        """Return the plan that a JSON file holds."""
        from .plan.plan import Exl2Plan

        return Exl2Plan.from_json(raw, where)

    def plan(self, measurement: Measurement, options: Any, *, bpw: float | None, max_bytes: int | None) -> Plan:
        """Return a plan made from a measurement alone; see ``make_exl2_plan``."""
        from .plan.making import make_exl2_plan, measured_limit

        return make_exl2_plan(
            measurement,
            bpw=bpw,
            size=None if max_bytes is None else measured_limit(measurement, max_bytes),
            head_bits=options.head,
            overrides=options.overrides,
            keep_fp16=options.keep_fp16,
        )

    def beside_in_vram(
        self, measurement: Measurement, options: Any, vram_bytes: int, context_tokens: int | None
    ) -> int:
        """See ``Format``; the embeddings are in main memory, and the head is on the GPU even if tied."""
        from .plan.vram import exl2_overhead_bytes

        config, context = planned_context(measurement, context_tokens)
        table = 2 * measurement.embedding.tokens * measurement.embedding.hidden_size
        head_on_gpu = table if measurement.embedding.tied and options.head == _FLOAT16_BITS else 0
        beside = exl2_overhead_bytes(vram_bytes, config, context, cache_bits=options.cache_bits)
        return beside - table + head_on_gpu

    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Return the smallest and largest bits per weight of the decoder."""
        from .plan.making import exl2_bpw_range

        if self.name not in measurement.curves:
            return None
        return exl2_bpw_range(measurement, options.head, options.overrides, options.keep_fp16)

    def damage_by_bits(self, measurement: Measurement) -> Mapping[str, Mapping[int, float]] | None:
        """Return the damage of every linear if all its groups have the same width."""
        from .plan.measured import exl2_curves

        if self.name not in measurement.curves:
            return None
        curves = exl2_curves(measurement)
        names = [linear.name for linear in (*measurement.linears, measurement.head)]
        damages = {name: curves.damage_nats(name).sum(axis=0, dtype="float64").tolist() for name in names}
        return {name: dict(zip(curves.widths, damage, strict=True)) for name, damage in damages.items()}

    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Return an original on its way to EXL2."""
        from .conversion import Exl2Conversion

        return Exl2Conversion(checkpoint, options)


FORMAT = Exl2Format()
