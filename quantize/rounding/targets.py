"""Targets of a block's linears: what the original sees and makes where they stand.

Notes:
    A linear whose output stays inside the block has the original's input as its target. One whose output joins the
    residual stream should bring the quantized stream to where the original's is. With the streams r and r' into the
    block, what the original's modules add to it, a_1, a_2, ..., what the quantized block's do, a'_1, a'_2, ..., and
    the scales m_1, m_2, ... of these sums, the i-th of them should add

        t_i = (r + m_1 a_1 + ... + m_i a_i) - (r' + m_1 a'_1 + ... + m_(i-1) a'_(i-1)).

    The first bracket is computed here, all that the quantized model makes is subtracted (``subtract_``) as it arrives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.model.structure import BlockStructure, InputGroup
from ...measure.layers.linears import linear_of
from ...measure.model.batches import check_finite, micro_batches
from ...measure.model.calls import Calls
from ...measure.model.stream import StreamedModel
from ...measure.statistics.inputs import tapped_inputs, tapped_outputs
from .pausable import run_until

__all__ = ["OriginalBlock", "Target", "Targets", "experts_input", "run_micro_batch", "subtract_"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Target of one input group.

    Attributes:
        values: The original's input of the group or, where it joins the residual stream, what it should add, shape
            (rows, tokens, width), on the CPU.
        sizes: Where a norm follows, what it divides the original's output of each token by, shape (rows, tokens, 1).
        gains: Where the group joins the stream, what each output is multiplied by on its way into it, the norm's
            division apart, shape (out,), on the device.
    """

    values: Tensor
    sizes: Tensor | None
    gains: Tensor | None


_TINY = 1e-30
"""Keeps outputs of norms that are zero from being divided by."""

Targets = dict[InputGroup, Target]
"""Targets of the groups of a block that have not been rounded yet."""


def experts_input(structure: BlockStructure) -> InputGroup | None:
    """Return the group that stands for all experts of a block: their common input is that of the module around them.

    Args:
        structure: The block's structure; None is returned where it has no experts.
    """
    return InputGroup(structure.experts) if structure.experts else None


def subtract_(targets: Targets, arrived: Tensor, batch: slice = slice(None), multiplier: float = 1.0) -> None:
    """Subtract what is in the quantized stream by now from all that should be added to it.

    Args:
        targets: Targets of the groups to come.
        arrived: Part of the quantized stream, of the tokens of ``batch``.
        batch: Rows that it belongs to.
        multiplier: What it is multiplied by.
    """
    for group, target in targets.items():
        if group.joins_stream:
            missing = target.values[batch]
            missing.sub_(arrived.view(missing.shape).to(missing.device), alpha=multiplier)


def run_micro_batch(
    model: StreamedModel, index: int, hidden: Tensor, batch: slice, calls: Calls | None = None
) -> Tensor:
    """Return what a block, which must be loaded, makes of a micro-batch of the hidden states, on the device."""
    return model.run_block(index, hidden[batch].to(model.device), batch.start, calls)


class OriginalBlock:
    """One block of the original, its weights loaded and not rounded yet.

    Attributes:
        order: Names of what groups read their inputs with, in the order in which the block calls them, once it has run;
            without the last of them where that need not run.
    """

    def __init__(
        self, model: StreamedModel, index: int, block: Any, tokens: Tensor, groups: Collection[InputGroup]
    ) -> None:
        """Hold what a run needs; nothing runs.

        Args:
            model: The original.
            index: Which block.
            block: The block.
            tokens: The calibration rows, shape (rows, tokens).
            groups: Groups to find targets of; ``experts_input`` may be among them.
        """
        self._model = model
        self._index = index
        self._block = block
        self._tokens = tokens
        self._groups = groups
        self._all_groups = model.structure(index).groups
        self._joining = [group for group in self._all_groups if group.joins_stream]
        self._values: dict[str, Tensor] = {}
        self.order: list[str] = []

    @property
    def last_group_only_adds(self) -> bool:
        """Whether the last group need not run where the block's output is known."""
        known = self._model.source.listed is not None  # else something may follow the last sum
        plain = all(group.expert is None and not group.normed for group in self._all_groups)
        return known and plain and [group.joins_stream for group in self._all_groups[-2:]] == [False, True]

    def run(self, hidden: Tensor, known: Tensor | None) -> tuple[Targets, Tensor]:
        """Run the block on all rows.

        Args:
            hidden: What enters it, shape (rows, tokens, hidden size), on the CPU.
            known: What leaves it, if that is known and ``last_group_only_adds``.

        Returns:
            The targets, nothing of the quantized model subtracted from them, and what leaves the block.

        Raises:
            NumericalError: NaN or infinity leaves it.
        """
        reading = [group.first for group in self._groups if not group.joins_stream]
        joining = [group.first for group in self._groups if group.joins_stream]
        norms = [group.adds for group in self._groups if group.adds and group.normed]
        adding = [group.adds for group in self._joining if group.adds]
        output = self._model.new_state(self._tokens, hidden.shape[-1]) if known is None else known
        for batch in micro_batches(*self._tokens.shape):
            forward = partial(run_micro_batch, self._model, self._index, hidden, batch)
            with (
                tapped_inputs(self._block, [*reading, *joining, *norms]) as inputs,
                tapped_outputs(self._block, adding) as added,
            ):
                if known is None:
                    output[batch] = forward().cpu()
                else:
                    run_until(self._block.get_submodule(self._all_groups[-2].first), forward)
            self.order = list(inputs)
            self._record_inputs(batch, {name: inputs[name] for name in reading})
            self._record_sums(batch, hidden, added, known)
            self._record_sizes(batch, {name: (inputs[name], added[name]) for name in norms})
        check_finite(output, self._model.block_name(self._index))
        return self._targets(), output

    def _record_inputs(self, batch: slice, inputs: Mapping[str, Tensor]) -> None:
        # Groups that read the same tensor, as queries, keys and values do, have one target in memory.
        first_with: dict[int, str] = {}
        for name, values in inputs.items():
            first = first_with.setdefault(id(values), name)
            if first == name:
                self._record(name, batch, values)
            else:
                self._values[name] = self._values[first]

    def _record_sums(self, batch: slice, hidden: Tensor, added: Mapping[str, Tensor], known: Tensor | None) -> None:
        # The original's stream after every module that adds to it.
        stream = hidden[batch].to(self._model.device)
        for group in self._joining:
            if known is not None and group is self._joining[-1]:
                stream = known[batch]
            elif group.adds:
                stream = stream + group.scale * added[group.adds].view_as(stream)  # experts see tokens in a row
            if group in self._groups:
                self._record(group.first, batch, stream)

    def _record_sizes(self, batch: slice, norms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        # What norms divide by, from what enters and leaves them: each adds its own epsilon.
        for name, (values, normed) in norms.items():
            undivided = (values * self._norm_gains(name, values.shape[-1])).norm(dim=-1, keepdim=True)
            self._record(name, batch, undivided / normed.norm(dim=-1, keepdim=True).clamp(min=_TINY))

    def _record(self, name: str, batch: slice, values: Tensor) -> None:
        # Values of a micro-batch's tokens, among those of all tokens.
        if name not in self._values:
            self._values[name] = self._model.new_state(self._tokens, values.shape[-1])
        of_batch = self._values[name][batch]
        of_batch.copy_(values.view(of_batch.shape))

    def _targets(self) -> Targets:
        values, self._values = self._values, {}
        return {
            group: Target(
                values=values[group.first],
                sizes=values[group.adds] if group.adds and group.normed else None,
                gains=self._gains(group),
            )
            for group in self._groups
        }

    def _gains(self, group: InputGroup) -> Tensor | None:
        if group.adds is None:
            return None
        linear = linear_of(self._block, self._model.structure(self._index), group.first)
        gains = torch.full((linear.out_features,), group.scale, device=self._model.device)
        if group.normed:
            gains = gains * self._norm_gains(group.adds, len(gains))
        return gains

    def _norm_gains(self, name: str, width: int) -> Tensor:
        # What a norm makes of ones.
        ones = torch.ones(width, device=self._model.device)
        gains: Tensor = self._block.get_submodule(name)(ones).float()
        return gains
