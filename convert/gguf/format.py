"""GGUF as a format: one file that llama.cpp and all that is built on it load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import Conversion
from ..format import Export, ExportedPlan, Exporter, Format
from ..model import CardFacts, Description, QuantizedModel, Verification
from ..names import NameParts
from ..plan import Plan, planned_context
from .llama_cpp.mixtures import MIXTURES
from .options import CONFLICTS, GgufOptions

if TYPE_CHECKING:
    from ...checkpoint.source.checkpoint import Checkpoint
    from ...measure.measurement import Measurement
    from ..conversion import Target

__all__ = ["FORMAT", "GgufFormat"]

_RULE = r"\^[^=,\s]+\$=[a-zA-Z0-9_]+"
"""A tensor's name as a regular expression, and its type."""

_HIGHEST_BPW = 8.5
"""Q8_0: above it the damage is below what evaluation can see."""


def _write_imatrix(measurement: Measurement, output: Path) -> int:
    from .llama_cpp.importance import export_imatrix

    return export_imatrix(measurement, output)


def _is_own_imatrix(path: Path) -> bool:
    from .llama_cpp.imatrix import is_own_imatrix

    return is_own_imatrix(path)


def _for_llama_quantize(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    from .export.llama_quantize import llama_quantize_plan

    return llama_quantize_plan(measurement, target, source, output)


def _for_ik(measurement: Measurement, target: Target, source: Path, output: Path) -> ExportedPlan:
    from .export.ik import ik_plan

    return ik_plan(measurement, target, source, output)


class GgufFormat(Format):
    """All that is special to GGUF."""

    name = "gguf"
    title = "GGUF"
    suffix = ".gguf"
    bpw_means = "of all tensors"
    default_bpw = 4.5
    size_names = tuple(MIXTURES)
    keeps_digests = False
    Options = GgufOptions
    conflicts = CONFLICTS
    exports = (
        Export(
            name="imatrix",
            kind="an importance matrix",
            help="Write MEASUREMENT as an importance matrix for llama.cpp.",
            output_help="File to write; in llama.cpp's older format if its name ends in .dat.",
            write=_write_imatrix,
            is_own=_is_own_imatrix,
        ),
    )
    exporters = (
        Exporter(engine="llama-quantize", suffix=".txt", sign=_RULE + r"\n", make=_for_llama_quantize),
        Exporter(engine="ik", suffix=".txt", sign=_RULE + r"[,\n]", make=_for_ik),
    )

    def recognises(self, path: Path) -> bool:
        """Return whether a file is a GGUF file, or is named as one: what is wrong with it shows when it is opened."""
        from .file.header import is_gguf

        return is_gguf(path) or (path.suffix.lower() == self.suffix and path.is_file())

    def open(self, path: Path) -> QuantizedModel:
        """Open a GGUF file; see ``GgufModel.open``."""
        from .model.reader import GgufModel

        return GgufModel.open(path)

    def describe(self, path: Path) -> Description:
        """Return what is in a GGUF file, of whatever architecture."""
        from .file.describe import describe_gguf
        from .file.split import read_model_header

        return describe_gguf(read_model_header(path))

    def verify(self, path: Path) -> Verification:
        """Decode every tensor; see ``verify_gguf``."""
        from .model.verify import verify_gguf

        return verify_gguf(path)

    def card(self, model: QuantizedModel, base_name: str) -> CardFacts:
        """Return what a card says of a model, whatever the original is called."""
        from .card import gguf_card
        from .model.reader import GgufModel

        assert isinstance(model, GgufModel)
        return gguf_card(model)

    def output_name(self, base_name: str, bpw: float | str, options: Any) -> str:
        """Return the name of an output by convention: ``Llama-3.2-1B-4.5bpw-Q4_K_M.gguf``.

        The Hub, Ollama and llama.cpp look for the mixture at its end, which conversions put into ``bpw``.
        """
        from ..names import convention_name

        return f"{convention_name(base_name, bpw)}{self.suffix}"

    def name_parts(self, name: str) -> NameParts | None:
        """Take a name apart; the size may also be a label, as in llama.cpp's own names: ``Llama-3.2-1B.Q4_K_M``."""
        from .file.split import whole_name
        from .llama_cpp.mixtures import label_in

        whole = whole_name(name)
        found, parts = label_in(whole), NameParts.of(whole)
        if found is None:
            return parts
        return replace(parts or NameParts(*found), label=found[1])

    def run_of(self, path: Path) -> str | None:
        """Return what a file says of its run; None if it does not. A part that is not the first is read alone."""
        from .file.header import read_gguf_header
        from .file.metadata import RUN_KEY
        from .file.split import is_later_part, read_model_header

        read = read_gguf_header if is_later_part(path) else read_model_header
        run = None if path.is_dir() else read(path).metadata.get(RUN_KEY)
        return None if run is None else str(run)

    def companions(self, output: Path) -> tuple[Path, ...]:
        """Return its other parts, and what the model sees images with: a file of bpwise's own of the same model."""
        from .file.split import is_later_part, parts_beside

        if is_later_part(output):
            return ()
        parts, run = parts_beside(output), self.run_of(output)
        found = () if run is None else sorted(output.parent.glob("mmproj-*.gguf"))
        seen = (path for path in found if path != output and (self.run_of(path) or "")[:8] == (run or "")[:8])
        return (*parts, *seen)

    def whole_path(self, path: Path) -> Path:
        """Return the path without the number of a part."""
        from .file.split import whole_name

        return path.with_name(f"{whole_name(path.stem)}{path.suffix}")

    def places(self, output: Path) -> Mapping[Path, tuple[Path, ...]]:
        """Return the single file and the first of several; see ``Format``."""
        from .file.split import parts_traced

        return {output: (output,), **parts_traced(output)}

    def load_plan(self, raw: dict[str, Any], where: str) -> Plan:
        """Return the plan that a JSON file holds."""
        from .plan.plan import GgufPlan

        return GgufPlan.from_json(raw, where)

    def plan(self, measurement: Measurement, options: Any, *, bpw: float | None, max_bytes: int | None) -> Plan:
        """Return a plan made from a measurement alone; see ``make_gguf_plan``."""
        from .plan.making import make_gguf_plan

        return make_gguf_plan(measurement, bpw=bpw, tensor_bytes=max_bytes, overrides=options.choices)

    def overhead_bytes(self, measurement: Measurement) -> int:
        """Return what metadata and vocabulary take; see ``Format``."""
        from .plan.measured import gguf_curves

        return gguf_curves(measurement).layout.overhead_bytes

    def beside_in_vram(
        self, measurement: Measurement, options: Any, vram_bytes: int, context_tokens: int | None
    ) -> int:
        """See ``Format`` and ``room_for_weights``."""
        from .llama_cpp.vram import room_for_weights

        config, context = planned_context(measurement, context_tokens)
        return vram_bytes - room_for_weights(vram_bytes, config, context)

    def bytes_for_vram(self, measurement: Measurement, options: Any, room_bytes: int) -> int:
        """See ``Format``; llama.cpp keeps the table of embeddings in main memory."""
        from .plan.making import bytes_for_vram

        return bytes_for_vram(measurement, room_bytes, options.choices)

    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Return the smallest bits per weight over all tensors, and the largest worth planning."""
        from .plan.problem import measured_problem

        if self.name not in measurement.curves:
            return None
        problem = measured_problem(measurement, options.choices)
        least, most = problem.size_range
        return 8 * least / problem.weights, min(_HIGHEST_BPW, 8 * most / problem.weights)

    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Return an original on its way to a GGUF file."""
        from .conversion import GgufConversion
        from .mixture import MixtureConversion

        return (GgufConversion if options.mixture is None else MixtureConversion)(checkpoint, options)


FORMAT = GgufFormat()
