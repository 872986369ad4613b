"""The measuring stage: one forward and one backward pass over the calibration rows, block by block, then curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.checkpoint import Checkpoint
from ..convert.exl2.layout import MAX_ROWS, ROW_MULTIPLE, WIDTHS
from ..convert.work import StageDirectory
from ..errors import ConfigError, UnsupportedModelError
from ..progress import Progress, silent
from ..version import __version__
from .calibration import CalibrationConfig, CalibrationSet
from .curves import ErrorCurve, measure_curves
from .families import HEAD
from .measurement import MeasuredLinear, Measurement
from .statistics import StageStatistics, collect, tapped_inputs
from .stream import StreamedModel, check_finite, micro_batches

__all__ = ["MeasureConfig", "measure_model", "resolve_device"]

_TAIL_TOKENS = 256
"""Positions whose logits are held at once: 128 MiB for a vocabulary of 128k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """Options of the measuring stage.

    Attributes:
        calibration: Which text, and how much of it.
        group_size: Rows that share a bit width and a scale; a multiple of 32.
        damping: What is added to the diagonal of every Gram matrix, relative to its mean, dimensionless.
        seed: Seed of the tokens that the model samples for the Fisher information.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    group_size: int = 64
    damping: float = 0.02
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if self.group_size < ROW_MULTIPLE or self.group_size % ROW_MULTIPLE:
            raise ConfigError(
                f"group_size must be a positive multiple of {ROW_MULTIPLE}, got {self.group_size}."
            )
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping must lie between 0 and 1, got {self.damping}.")


def resolve_device(name: str) -> torch.device:
    """Return the device that an option names.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({error}). Try 'cpu' or 'auto'.") from error
    return device


def measure_model(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    config: MeasureConfig,
    work: Path,
    progress: Progress = silent,
) -> Measurement:
    """Measure every linear of a model's decoder, and its head.

    Args:
        checkpoint: The model.
        calibration: Token ids, shape (rows, tokens).
        config: Options; ``config.calibration`` is not read here.
        work: Work directory; finished blocks in it are not done again.
        progress: Wraps the blocks of each pass.

    Returns:
        The measurement. Its damages are in nats per token.

    Raises:
        UnsupportedModelError: The family is unknown, or an input width is no multiple of 32.
        NumericalError: NaN or infinity in activations or gradients.
    """
    options = {"group_size": config.group_size, "damping": config.damping, "seed": config.seed}
    provenance = {
        "bpwise": __version__,
        "model": checkpoint.fingerprint,
        "calibration": calibration.fingerprint,
        "calibration_text": calibration.description,
        "rows": int(calibration.tokens.shape[0]),
        "row_tokens": int(calibration.tokens.shape[1]),
        **options,
    }
    device = resolve_device(config.device)
    pieces = StageDirectory(work, "measure", {**provenance, "device": device.type})
    model = StreamedModel(checkpoint, device=device, dtype=torch.float32)
    _check_widths(model, checkpoint)
    run = _Measuring(model, calibration.tokens, config, pieces)
    run.forward(progress)
    run.head()
    run.backward(progress)
    measurement = Measurement(
        linears=tuple(
            linear for index in range(model.block_count) for linear in run.finished(f"curves-{index}")
        ),
        head=run.finished("head")[0],
        widths=WIDTHS,
        group_size=config.group_size,
        provenance=provenance,
    )
    return measurement


def _check_widths(model: StreamedModel, checkpoint: Checkpoint) -> None:
    names = [
        name
        for index in range(model.block_count)
        for stage in model.family.stages
        for name in model.family.linear_names(index, stage)
    ]
    for name in names:
        rows = checkpoint.shape(f"{name}.weight")[1]
        if rows % ROW_MULTIPLE or rows > MAX_ROWS:
            raise UnsupportedModelError(
                f"{name}: {rows} input features, expected a multiple of {ROW_MULTIPLE} up to {MAX_ROWS}: "
                "EXL2 cannot hold this linear."
            )


class _Measuring:
    """One run of the measuring stage: what its passes share."""

    def __init__(
        self, model: StreamedModel, tokens: Tensor, config: MeasureConfig, pieces: StageDirectory
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.config = config
        self.pieces = pieces
        self.batches = micro_batches(*tokens.shape)

    def forward(self, progress: Progress) -> None:
        """Keep the input of every block on disk, and the output of the last."""
        last = self.model.block_count
        hidden: Tensor | None = self.model.embed(self.tokens)
        if not self.pieces.has("gradient") and not self.pieces.has("input-0"):
            self.pieces.save("input-0", {"hidden": hidden})
        for index in progress(range(last), "measure: forward"):
            if self.pieces.has("head") or self.pieces.has(f"input-{index + 1}"):
                hidden = None
                continue
            if hidden is None:
                hidden = self.pieces.load(f"input-{index}")["hidden"]
            hidden = self._forward_block(index, hidden)
            self.pieces.save(f"input-{index + 1}", {"hidden": hidden})

    def _forward_block(self, index: int, hidden: Tensor) -> Tensor:
        output = torch.empty_like(hidden)
        with torch.no_grad(), self.model.block(index):
            for batch in self.batches:
                output[batch] = self.model.run_block(index, hidden[batch].to(self.model.device)).cpu()
        check_finite(output, self.model.block_name(index))
        return output

    def head(self) -> None:
        """Sample targets, keep the gradient at the last block's output, measure the head."""
        if self.pieces.has("head"):
            return
        last = self.model.block_count
        hidden = self.pieces.load(f"input-{last}")["hidden"]
        rng = torch.Generator(self.model.device).manual_seed(self.config.seed)
        gradient = torch.empty_like(hidden)
        with self.model.tail() as head, tapped_inputs(head, [""]) as taps:
            sums = StageStatistics(torch.zeros(head.in_features, head.in_features, device=self.model.device))
            sums.fisher[HEAD] = torch.zeros(head.out_features, device=self.model.device)
            flat, flat_gradient = hidden.flatten(0, 1), gradient.view(-1, hidden.shape[-1])
            for first in range(0, flat.shape[0], _TAIL_TOKENS):
                part = flat[None, first : first + _TAIL_TOKENS].to(self.model.device).requires_grad_()
                logits = self.model.logits(part)
                sums.add_input(taps[""])
                probabilities = logits.detach()[0].softmax(dim=-1)
                # Of a sampled one-hot target t, E (p - t)^2 = p (1 - p) exactly: no need to sample for the head.
                sums.fisher[HEAD] += (probabilities * (1 - probabilities)).sum(dim=0)
                targets = torch.multinomial(probabilities, 1, generator=rng)
                probabilities.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=logits.dtype))
                logits.backward(probabilities[None])
                flat_gradient[first : first + _TAIL_TOKENS] = part.grad[0].cpu()
            check_finite(gradient, "output head, gradient")
            curves = self._curves({HEAD: head}, sums)
        self.pieces.save("gradient", {"gradient": gradient, "block": torch.tensor(last)})
        self.pieces.save("head", _pack(curves))
        self.pieces.discard(f"input-{last}")

    def backward(self, progress: Progress) -> None:
        """Go back through the blocks: statistics, then curves, block by block."""
        stages = self.model.family.stages
        gradient: Tensor | None = None
        for index in progress(range(self.model.block_count - 1, -1, -1), "measure: backward, curves"):
            if self.pieces.has(f"curves-{index}"):
                continue
            if gradient is None:
                gradient = self._resumed_gradient(index)
            hidden = self.pieces.load(f"input-{index}")["hidden"]
            with self.model.block(index) as block:
                with collect(block, stages) as statistics:
                    gradient = self._backward_block(index, hidden, gradient)
                curves: dict[str, ErrorCurve] = {}
                for stage, sums in zip(stages, statistics, strict=True):
                    names = self.model.family.linear_names(index, stage)
                    modules = [block.get_submodule(inner) for inner in stage.linears]
                    sums.fisher = {
                        n: sums.fisher[inner] for n, inner in zip(names, stage.linears, strict=True)
                    }
                    curves |= self._curves(dict(zip(names, modules, strict=True)), sums)
            # The gradient first: a run cut off between the two repeats this block from an unchanged input.
            self.pieces.save(f"gradient-{index}", {"gradient": gradient})
            self.pieces.save(f"curves-{index}", _pack(curves))
            self.pieces.discard(f"gradient-{index + 1}")
            self.pieces.discard(f"input-{index}")

    def _resumed_gradient(self, index: int) -> Tensor:
        piece = "gradient" if index == self.model.block_count - 1 else f"gradient-{index + 1}"
        return self.pieces.load(piece)["gradient"]

    def _backward_block(self, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        before = torch.empty_like(gradient)
        for batch in self.batches:
            inputs = hidden[batch].to(self.model.device).requires_grad_()
            self.model.run_block(index, inputs).backward(gradient[batch].to(self.model.device))
            assert inputs.grad is not None
            before[batch] = inputs.grad.cpu()
        check_finite(before, f"{self.model.block_name(index)}, gradient")
        return before

    def _curves(self, linears: dict[str, nn.Module], sums: StageStatistics) -> dict[str, ErrorCurve]:
        curves = measure_curves(
            [module.weight.detach().float().T for module in linears.values()],
            sums.gram / sums.tokens,
            [sums.fisher[name] / sums.tokens for name in linears],
            widths=WIDTHS,
            group_size=self.config.group_size,
            damping=self.config.damping,
        )
        return dict(zip(linears, curves, strict=True))

    def finished(self, piece: str) -> list[MeasuredLinear]:
        """Return the measured linears of a finished piece, in the order of computation."""
        return _unpack(self.pieces.load(piece))


def _pack(curves: dict[str, ErrorCurve]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for position, (name, curve) in enumerate(curves.items()):
        for key, value in asdict(curve).items():
            packed[f"{position}|{name}|{key}"] = torch.as_tensor(value).cpu()
    return packed


def _unpack(tensors: dict[str, Tensor]) -> list[MeasuredLinear]:
    linears: dict[tuple[int, str], dict[str, Any]] = {}
    for key, tensor in tensors.items():
        position, name, field_name = key.split("|")
        linears.setdefault((int(position), name), {})[field_name] = tensor
    return [
        MeasuredLinear(
            name=name,
            damage_nats=fields["damage_nats"].numpy(),
            order=fields["order"].int().numpy(),
            fisher=fields["fisher"].numpy(),
            input_power=fields["input_power"].numpy(),
            damping=float(fields["damping"]),
        )
        for (_, name), fields in sorted(linears.items())
    ]
