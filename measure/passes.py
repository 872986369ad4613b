"""The passes of the measuring stage: forward, head, backward with the curves of each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files.resume import ResumeStore
from ..checkpoint.model.families import HEAD, InputGroup
from ..convert.exl2.rounding.curves import ErrorCurve, measure_curves
from ..convert.gguf.ggml.curves import SAMPLED_ROWS, measure_plain_types, measure_types
from ..convert.gguf.ggml.kernels import GgmlType
from ..linalg.sampling import systematic_sample
from ..progress import Progress
from .measurement import MeasuredLinear, MeasuredTable
from .model.positionwise import chunked_positionwise
from .model.states import new_state
from .model.stream import TAIL_TOKENS, StreamedModel, check_finite, micro_batches
from .statistics.experts import collect_experts, expert_statistics
from .statistics.heldout import DAMPINGS, cross_validate_damping
from .statistics.inputs import InputStatistics, collect, tapped_inputs, tapped_outputs

__all__ = ["MeasuringPasses"]

_CACHED_TOKENS = 16
"""Positions whose probabilities are worked on together, so that they stay in a processor's cache."""

_TINY = 1e-30
"""Keeps sums that are zero from being divided by."""

_LARGEST_WEIGHT = 65504.0
"""Token weights are kept in float16."""


class MeasuringPasses:
    """One run of the measuring stage: what its passes share. Every finished block is kept in ``artifacts``."""

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tensor,
        artifacts: ResumeStore,
        *,
        widths: Sequence[int],
        kinds: Sequence[GgmlType],
        group_size: int,
        damping: float | None,
        seed: int,
        experts_see_all_tokens: bool,
    ) -> None:
        """Prepare a run.

        Args:
            model: The model to measure.
            tokens: Calibration rows, int64, shape (rows, tokens).
            artifacts: Where finished blocks are kept.
            widths: Bit widths of the curves.
            kinds: ggml's types to measure.
            group_size: Rows of a group.
            damping: Damping of the Gram matrices, or None to choose it for each stage on held-out rows.
            seed: Seed of the random signs that probe the Fisher information.
            experts_see_all_tokens: Whether tokens that did not choose an expert count a little for it, all of them.
        """
        self.model = model
        self.tokens = tokens
        self.artifacts = artifacts
        self.widths = widths
        self.kinds = kinds
        self.group_size = group_size
        self.dampings = DAMPINGS if damping is None else (damping,)
        self.seed = seed
        self.experts_see_all_tokens = experts_see_all_tokens
        self.batches = micro_batches(*tokens.shape)

    def forward(self, progress: Progress) -> None:
        """Keep the input of every block on disk, and the output of the last; rounding in this run reads them again."""
        last = self.model.block_count
        self._discard_unusable()
        needed = [index for index in range(last) if not self.artifacts.has(f"curves-{index}")]
        needed += [] if self.artifacts.has("head") else [last]
        missing = max((index for index in needed if not self.artifacts.has(f"input-{index}")), default=-1)
        embedded = self.model.embed(self.tokens)  # which makes ready to run blocks, too
        if missing >= 0 and not self.artifacts.has("input-0"):
            self.artifacts.save("input-0", {"hidden": embedded})
        hidden: Tensor | None = embedded
        del embedded
        for index in progress(range(last), "measure: forward"):
            if index >= missing or self.artifacts.has(f"input-{index + 1}"):
                hidden = None
                continue
            if hidden is None:
                hidden = self._kept(f"input-{index}", "hidden")
            self._forward_block(index, hidden)
            self.artifacts.save(f"input-{index + 1}", {"hidden": hidden})

    def _discard_unusable(self) -> None:
        # The backward pass goes on with a gradient, from block to block. Where that is gone, by damage or because a
        # finished block has to be done again, it begins anew at the head; blocks below are not affected.
        waiting = [index for index in range(self.model.block_count) if not self.artifacts.has(f"curves-{index}")]
        waiting += [] if self.artifacts.has("embedding") else [-1]
        if not waiting:
            return
        last = max(waiting)
        if not self.artifacts.has(f"gradient-{last + 1}"):
            self.artifacts.discard("head")
            last = self.model.block_count
        for index in range(max(0, min(waiting)), last):
            self.artifacts.discard(f"curves-{index}")

    def _kept(self, artifact: str, name: str) -> Tensor:
        # A state, in memory or in a file as all are.
        return self.artifacts.load(artifact, partial(new_state, directory=self.model.offload_dir))[name]

    def _forward_block(self, index: int, hidden: Tensor) -> None:
        # Puts the block's output in the place of its input.
        stages = self.model.input_groups(index)
        with torch.no_grad(), self.model.block(index) as block, chunked_positionwise(block, stages):
            for batch in self.batches:
                hidden[batch] = self.model.run_block(index, hidden[batch].to(self.model.device)).cpu()
        check_finite(hidden, self.model.block_name(index))

    def head(self) -> None:
        """Probe the logits, keep the gradient at the last block's output, measure the head."""
        if self.artifacts.has("head"):
            return
        last = self.model.block_count
        hidden = self._kept(f"input-{last}", "hidden")
        rng = np.random.default_rng(self.seed)
        gradient = self.model.new_state(self.tokens)
        with self.model.tail() as head, tapped_inputs(head, [""]) as taps, tapped_outputs(head, [""]) as raw:
            sums = InputStatistics(head.in_features, self.tokens.shape[1], self.model.device)
            flat, flat_gradient = hidden.flatten(0, 1), gradient.view(-1, hidden.shape[-1])
            errors = torch.empty(TAIL_TOKENS, head.out_features, device=self.model.device)
            for first in range(0, flat.shape[0], TAIL_TOKENS):
                part = flat[None, first : first + TAIL_TOKENS].to(self.model.device).requires_grad_()
                logits = self.model.logits(part)
                sums.see_inputs(taps[""])
                slopes = _slopes(logits, raw[""])
                error, outputs, weights = _probe(logits.detach()[0], rng, slopes, errors)
                sums.see_sums(HEAD, outputs, weights)
                sums.end_batch()
                logits.backward(error[None])
                assert part.grad is not None
                flat_gradient[first : first + TAIL_TOKENS] = part.grad[0].cpu()
            check_finite(gradient, "output head", "gradients")
            curves, types = self._curves({HEAD: head}, sums)
        self.artifacts.save(f"gradient-{last}", {"gradient": gradient})
        none = torch.empty(head.out_features, 0)  # its outputs are rounded each for itself
        self.artifacts.save("head", self._pack(curves, types, sums.scaled_weights(), {HEAD: none}))

    def backward(self, progress: Progress) -> None:
        """Go back through the blocks: statistics, then curves, block by block."""
        gradient: Tensor | None = None
        for index in progress(range(self.model.block_count - 1, -1, -1), "measure: backward, curves"):
            if self.artifacts.has(f"curves-{index}"):
                continue
            if gradient is None:
                gradient = self._kept(f"gradient-{index + 1}", "gradient")
            hidden = self._kept(f"input-{index}", "hidden")
            stages = self.model.input_groups(index)
            shared = [stage for stage in stages if stage.expert is None]
            experts = [stage for stage in stages if stage.expert is not None]
            packed: dict[str, Tensor] = {}
            with self.model.block(index) as block:
                with (
                    collect(block, shared, self.tokens.shape[1]) as statistics,
                    collect_experts(block, self.model.family.experts_path, experts, self.tokens.numel()) as seen,
                    chunked_positionwise(block, stages),
                ):
                    self._backward_block(index, hidden, gradient, statistics)
                del hidden
                for stage, sums in zip(shared, statistics, strict=True):
                    packed |= self._measured_stage(index, block, stage, sums)
                for stage, chosen, sums in expert_statistics(
                    block, experts, seen, self.tokens.shape[1], all_tokens=self.experts_see_all_tokens
                ):
                    packed |= self._measured_stage(index, block, stage, sums)
                    for name in self.model.family.linear_names(index, stage):
                        packed[f"{name}|chosen_tokens"] = torch.tensor(chosen)
            # The gradient first: a run cut off between the two repeats this block from an unchanged input.
            self.artifacts.save(f"gradient-{index}", {"gradient": gradient})
            self.artifacts.save(f"curves-{index}", packed)
            self.artifacts.discard(f"gradient-{index + 1}")

    def _measured_stage(self, index: int, block: Any, stage: InputGroup, sums: InputStatistics) -> dict[str, Tensor]:
        names = self.model.family.linear_names(index, stage)
        modules = [block.get_submodule(inner) for inner in stage.linears]
        couplings = {n: sums.couplings[i].coupling(sums.fisher[i]) for n, i in zip(names, stage.linears, strict=True)}
        sums.fisher = {n: sums.fisher[inner] for n, inner in zip(names, stage.linears, strict=True)}
        curves, types = self._curves(dict(zip(names, modules, strict=True)), sums)
        return self._pack(curves, types, sums.scaled_weights(), couplings)

    def _backward_block(
        self,
        index: int,
        hidden: Tensor,
        gradient: Tensor,
        statistics: Sequence[InputStatistics],
    ) -> None:
        # Puts the gradient at the block's input in the place of that at its output.
        for batch in self.batches:
            inputs = hidden[batch].to(self.model.device).requires_grad_()
            self.model.run_block(index, inputs).backward(gradient[batch].to(self.model.device))
            assert inputs.grad is not None
            gradient[batch] = inputs.grad.cpu()
            for sums in statistics:
                sums.end_batch()
        check_finite(gradient, self.model.block_name(index), "gradients")

    def _curves(
        self, linears: dict[str, Any], sums: InputStatistics
    ) -> tuple[dict[str, ErrorCurve], dict[str, Tensor]]:
        # Damage of every row group at every width, and of every linear in every one of ggml's types.
        weights = [module.weight.detach().T for module in linears.values()]
        fishers = [sums.fisher[name] / sums.tokens for name in linears]
        totals = [half.weight for half in sums.halves]
        halves = [half.mean() for half in sums.halves]
        for name, fisher in zip(linears, fishers, strict=True):
            check_finite(fisher, name, "squared gradients")
        for sums_of_half in (*halves, torch.tensor(totals)):
            check_finite(sums_of_half, next(iter(linears)), "weighted inputs")
        judged = cross_validate_damping(weights, halves, fishers, dampings=self.dampings)
        first, second = (half.mul_(total) for total, half in zip(totals, halves, strict=True))
        gram = first.add_(second).div_(max(sum(totals), _TINY))
        del halves, second
        curves = measure_curves(
            weights,
            gram,
            fishers,
            widths=self.widths,
            group_size=self.group_size,
            damping=judged.damping,
            generalization_ratio=judged.generalization_ratio,
        )
        for name, curve in zip(linears, curves, strict=True):
            check_finite(curve.damage_nats, name, "predicted damages")
        if HEAD in linears and self.model.tied:
            (weight,), (fisher,) = weights, fishers
            types = [
                measure_plain_types(weight, gram, fisher, self.kinds, generalization_ratio=judged.generalization_ratio)
            ]
        else:
            types = measure_types(
                weights,
                gram,
                fishers,
                self.kinds,
                damping=judged.damping,
                generalization_ratio=judged.generalization_ratio,
            )
        return dict(zip(linears, curves, strict=True)), dict(zip(linears, types, strict=True))

    def embedding(self) -> None:
        """Measure the token embeddings; the backward pass has ended."""
        if self.artifacts.has("embedding"):
            return
        gradient = self.model.embedding_gradient(self.tokens, self._kept("gradient-0", "gradient"))
        squares = gradient.flatten(0, 1).square()
        total = squares.sum()
        check_finite(total, self.model.embedding_name, "squared gradients")
        fisher = squares.mean(dim=0)
        # As in a Gram matrix, a token counts what its gradients say.
        weights = squares.sum(dim=1) / max(float(total), _TINY)
        uses = torch.zeros(self.model.vocabulary).index_add_(0, self.tokens.flatten(), weights)
        rows, shares = systematic_sample(uses, SAMPLED_ROWS)
        table = self.model.embeddings(rows).float().T
        damage = measure_plain_types(table, fisher.diag(), shares, self.kinds)
        self.artifacts.save("embedding", {"importance": fisher, "type_damage_nats": damage})

    def measured_embedding(self) -> MeasuredTable:
        """Return the measured token embeddings."""
        artifact = self.artifacts.load("embedding")
        return MeasuredTable(
            name=self.model.embedding_name,
            tokens=self.model.vocabulary,
            importance=artifact["importance"].numpy(),
            type_damage_nats=artifact["type_damage_nats"].numpy(),
            tied=self.model.tied,
        )

    def _pack(
        self,
        curves: dict[str, ErrorCurve],
        types: dict[str, Tensor],
        weights: Tensor,
        couplings: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        packed: dict[str, Tensor] = {}
        kept = weights.clamp(max=_LARGEST_WEIGHT).half().view(self.tokens.shape)
        for name, curve in curves.items():
            for key, value in asdict(curve).items():
                packed[f"{name}|{key}"] = torch.as_tensor(value).cpu()
            packed[f"{name}|type_damage_nats"] = types[name]
            packed[f"{name}|coupling"] = couplings[name].half().cpu()
            packed[f"{name}|token_weights"] = kept
        return packed

    def finished(self, artifact: str) -> dict[str, MeasuredLinear]:
        """Return the measured linears of a finished artifact, by name."""
        return _unpack(self.artifacts.load(artifact))


def _slopes(logits: Tensor, output: Tensor) -> Tensor | None:
    # How much each logit moves with the head's output, where models scale or cap it; None where they do not.
    if output is logits:
        return None
    (slopes,) = torch.autograd.grad(logits.sum(), output, retain_graph=True)
    return slopes.flatten(0, -2)


def _probe(
    logits: Tensor, rng: np.random.Generator, slopes: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # A random direction with the logits' Fisher matrix F = diag(p) - p p^T as its covariance, in the first rows of
    # ``out``: F p^-1/2 z with random signs z. p - t of a sampled target t has the same covariance, but where the model
    # is nearly sure of a token all of its size hangs on the rare draw of another one. And the sums over tokens and over
    # the vocabulary of the mean square, p (1 - p).
    probe = out[: len(logits)]
    outputs = torch.zeros(logits.shape[1], device=logits.device)
    weights = []
    for first, probabilities in zip(range(0, len(probe), _CACHED_TOKENS), probe.split(_CACHED_TOKENS), strict=True):
        torch.softmax(logits[first : first + _CACHED_TOKENS], dim=-1, out=probabilities)
        squares = torch.addcmul(probabilities, probabilities, probabilities, value=-1)
        if slopes is not None:
            squares *= slopes[first : first + _CACHED_TOKENS].square()
        outputs += squares.sum(dim=0)
        weights.append(squares.sum(dim=1))
        signed = probabilities.sqrt().copysign_(_signs(probabilities.shape, rng).to(logits.device))
        probabilities.mul_(-signed.sum(dim=1, keepdim=True)).add_(signed)
    return probe, outputs, torch.cat(weights)


def _signs(shape: torch.Size, rng: np.random.Generator) -> Tensor:
    # Numbers of random sign, int8. From the CPU for every device, so that all measure the same.
    return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))


def _unpack(tensors: dict[str, Tensor]) -> dict[str, MeasuredLinear]:
    linears: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, field_name = key.split("|")
        linears.setdefault(name, {})[field_name] = tensor
    return {
        name: MeasuredLinear(
            name=name,
            damage_nats=fields["damage_nats"].numpy(),
            order=fields["order"].int().numpy(),
            fisher=fields["fisher"].numpy(),
            input_power=fields["input_power"].numpy(),
            coupling=fields["coupling"].numpy(),
            token_weights=fields["token_weights"].numpy(),
            type_damage_nats=fields["type_damage_nats"].numpy(),
            damping=float(fields["damping"]),
            chosen_tokens=int(fields["chosen_tokens"]) if "chosen_tokens" in fields else None,
        )
        for name, fields in linears.items()
    }
