"""One family on its way to a GGUF file, and what others make of that file: llama.cpp, llama-quantize, Transformers."""

from __future__ import annotations

import subprocess
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.dense import dequantize_model
from bpwise.convert.gguf.engine.gate import gate_base
from bpwise.convert.gguf.engine.library import load_library
from bpwise.convert.gguf.llama_cpp.converter import make_base
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.plan.plan import GgufPlan
from bpwise.convert.registry import GgufOptions, export_imatrix
from bpwise.errors import BpwiseWarning
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import measure_model, quantize_model
from gguf import GGUFReader, ReaderTensor
from torch import Tensor

from ..quantize.runs import arguments
from .models import family_config, model_class

MIXTURE = "Q4_K_M"
"""What sets the size."""

FLOATS = ("F32", "F16", "BF16")

NEED_IMPORTANCE = ("IQ1", "IQ2", "IQ3_XXS")

TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
"""Read by token id: no inputs, so nothing to feed back."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came of a family; the last five are unknown without llama-quantize.

    Attributes:
        gate_nats: KL of llama.cpp on the unquantized file from Transformers on the original, as a run itself finds.
        reader_nats: KL of llama.cpp on the quantized file from Transformers on what the file decodes to.
        nats: KL of llama.cpp on the quantized file from Transformers on the original.
        tensor_bytes: Size of the quantized file's tensors.
        unmeasured: Tensors of which the plan says that nothing was measured.
        projector: The file with what the model sees images with.
        their_nats: As ``nats``, of llama-quantize's file of no smaller size.
        plain_nats: As ``nats``, of llama-quantize's file with the same types.
        their_bytes: As ``tensor_bytes``, of llama-quantize's file of no smaller size.
        matrices: Weights of all tensors that llama-quantize quantizes, but for tables.
        plain: Of these tensors those that are quantized, but that no feedback changed: byte for byte as llama-quantize
            makes them.
    """

    gate_nats: float | None
    reader_nats: float
    nats: float
    tensor_bytes: int
    unmeasured: tuple[str, ...]
    projector: Path | None
    their_nats: float | None = None
    plain_nats: float | None = None
    their_bytes: int = 0
    matrices: int = 0
    plain: dict[str, int] = field(default_factory=dict)

    @property
    def feedback_share(self) -> float:
        """Share of the matrices' weights that were rounded with feedback."""
        return 1 - sum(self.plain.values()) / self.matrices


def judge_family(name: str, model: Path, work: Path, llama_cpp: Path, llama_quantize: Path | None) -> Judged:
    """Quantize a family to the size of llama-quantize's file, and judge both files on other tokens."""
    checkpoint = Checkpoint.open(model)
    base, measurement, ours, dense = (work / each for each in ("base.gguf", "m.safetensors", "ours.gguf", "dense"))
    make_base(checkpoint, base, llama_cpp=llama_cpp)
    # With a file that was given, no other is made of what a model sees images with.
    options = GgufOptions(llama_cpp=llama_cpp, base=None if "vision_config" in checkpoint.config else base)
    config = QuantizeConfig(target=Target(bpw=4.85), options=options, evaluate=None)
    measured = measure_model(
        checkpoint,
        measurement,
        formats=["gguf"],
        options=[options],
        measure=MeasureConfig(device="cpu"),
        calibration=_rows(),
    )
    export_imatrix(measured, work / "imatrix.gguf")
    # What has no statistics (layers for multi-token prediction) is the same in both files.
    fixed = [tensor.name for tensor in make_gguf_plan(measured, bpw=16.0).tensors if tensor.damage_nats is None]
    theirs = None if llama_quantize is None else LlamaQuantize(llama_quantize, base, work, fixed)
    if theirs is not None:
        config = replace(config, target=Target(bpw=theirs.bpw))
    plan = quantize_model(checkpoint, ours, **arguments(config), measurement=measurement).plan
    assert isinstance(plan, GgufPlan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BpwiseWarning)  # what nothing explains is taken from the original
        dequantize_model(ours, dense, original=model)

    tokens = torch.randint(3, 250, (16, 128), generator=torch.Generator().manual_seed(1))
    original, decoded = (transformers_logits(name, each, tokens) for each in (model, dense))
    found = engine_logits(ours, tokens)
    judged = Judged(
        gate_nats=gate_base(base, checkpoint, work).kl_nats,
        reader_nats=mean_kl(decoded, found),
        nats=mean_kl(original, found),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors_of(ours).values()),
        unmeasured=tuple(tensor.name for tensor in plan.tensors if tensor.damage_nats is None),
        projector=next(work.glob("mmproj-*.gguf"), None),
    )
    return judged if theirs is None else theirs.compared(judged, ours, original, tokens)


class LlamaQuantize:
    """What llama-quantize makes of an unquantized file, with a measurement's own importances."""

    def __init__(self, program: Path, base: Path, work: Path, fixed: list[str]) -> None:
        self._program, self._base, self._work = program, base, work
        self._file = self._made("theirs", work / "imatrix.gguf", dict.fromkeys(fixed, "Q8_0"))
        self._tensors = tensors_of(self._file)
        self._bytes = sum(tensor.n_bytes for tensor in self._tensors.values())
        self.bpw = 8 * self._bytes / sum(int(tensor.n_elements) for tensor in self._tensors.values())

    def compared(self, judged: Judged, ours: Path, original: Tensor, tokens: Tensor) -> Judged:
        """Return what is known of a file, completed."""
        tensors = tensors_of(ours)
        types = {name: tensor.tensor_type.name for name, tensor in tensors.items() if len(tensor.shape) > 1}
        plainly = self._made("plain", self._work / "imatrix.gguf", types)
        # Some types cannot be made without importances.
        usable = {name: kind for name, kind in types.items() if not kind.startswith(NEED_IMPORTANCE)}
        plain = [tensors_of(plainly), tensors_of(self._made("plainer", None, usable))]
        matrices = {
            name: int(tensor.n_elements)
            for name, tensor in self._tensors.items()
            if tensor.tensor_type.name not in FLOATS and name not in TABLES and not self._predicts(name)
        }
        unchanged = {
            name: weights
            for name, weights in matrices.items()
            if types[name] not in FLOATS and any(np.array_equal(tensors[name].data, each[name].data) for each in plain)
        }
        return replace(
            judged,
            their_nats=mean_kl(original, engine_logits(self._file, tokens)),
            plain_nats=mean_kl(original, engine_logits(plainly, tokens)),
            their_bytes=self._bytes,
            matrices=sum(matrices.values()),
            plain=unchanged,
        )

    def _predicts(self, name: str) -> bool:
        # Whether it belongs to layers for multi-token prediction, which come after the decoder's.
        return any(f".{name.split('.')[1]}.nextn." in each for each in self._tensors) if "." in name else False

    def _made(self, name: str, imatrix: Path | None, types: dict[str, str]) -> Path:
        output = self._work / f"{name}.gguf"
        command = [str(self._program), *([] if imatrix is None else ["--imatrix", str(imatrix)])]
        for tensor, kind in types.items():
            command += ["--tensor-type", f"^{tensor.replace('.', '[.]')}$={kind.lower()}"]
        subprocess.run([*command, str(self._base), str(output), MIXTURE, "1"], check=True, capture_output=True)
        return output


def tensors_of(path: Path) -> dict[str, ReaderTensor]:
    """Return what llama.cpp's own Python package reads of a file."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def transformers_logits(name: str, directory: Path, tokens: Tensor) -> Tensor:
    """Return what Transformers computes with a checkpoint of a family, float32."""
    loaded = model_class(family_config(name)).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: Tensor = loaded.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits


def engine_logits(path: Path, tokens: Tensor) -> Tensor:
    """Return what llama.cpp computes with a file, float32."""
    with load_library().model(path, row_tokens=tokens.shape[1], threads=1) as model:
        return torch.stack([torch.cat(list(model.logits(row))) for row in tokens])


def mean_kl(expected: Tensor, found: Tensor) -> float:
    """Return the mean KL divergence of ``found`` from ``expected``, nats per token."""
    theirs, ours = (logits[..., : expected.shape[-1]].double().log_softmax(-1) for logits in (expected, found))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def _rows() -> CalibrationSet:
    # Text means nothing to random weights.
    tokens = torch.randint(3, 250, (8, 128), generator=torch.Generator().manual_seed(0))
    return CalibrationSet(tokens=tokens, origins=("random",) * len(tokens), description="random tokens", adds_bos=False)
