"""The rounding pass: blocks are rounded one after another, each on the inputs that the quantized ones before it make.

Two streams of hidden states run through the model side by side, the original's and the quantized one's. In every input
group of a block (``block``) the weight is first moved to where it best reproduces the *original's* output from the
*quantized* inputs, so that the drift of the earlier groups is cancelled and not accumulated (``drift``), and then
rounded with error feedback by a rounder, which knows the format.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...checkpoint.files.resume import ResumeStore
from ...convert.rounding import Rounder, drift_of
from ...measure.measurement import Measurement
from ...measure.model.batches import micro_batches
from ...measure.model.calls import Calls
from ...measure.model.states import new_state
from ...measure.model.stream import StreamedModel
from ...progress import Progress
from .block import BlockRounding
from .head import round_head
from .linears import LinearRounder
from .targets import OriginalBlock

__all__ = ["ROUNDED", "RoundingPass"]

ROUNDED = "rounded"
"""Name of the resume store in the work directory."""


class RoundingPass:
    """One run through a model, resumed where an earlier one was cut off."""

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        rounder: Rounder,
        store: ResumeStore,
        *,
        correct_drift: bool = True,
        inputs: ResumeStore | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: The original.
            measurement: Gives the calibration rows, and what is known of each linear.
            rounder: Rounds single linears.
            store: Where finished linears are kept, by name.
            correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
            inputs: What enters the original's blocks, if it is at hand (see ``bpwise.measure.run.kept_inputs``).
        """
        self.model = model
        self.tokens = torch.from_numpy(measurement.tokens).long()
        self.batches = micro_batches(*self.tokens.shape)
        self.linears = LinearRounder(model, measurement, rounder, store, correct_drift=correct_drift)
        self.store = store
        self.inputs = inputs
        self._quantized_calls = Calls()

    def blocks(self, progress: Progress, table: Tensor | None = None) -> None:
        """Round all decoder blocks, in order.

        Args:
            progress: Wraps the blocks.
            table: The quantized model's token embeddings, shape (tokens, hidden size), where they differ.
        """
        streams = {
            "original": self.model.embed(self.tokens),
            "quantized": self.model.embed(self.tokens, table, self._quantized_calls),
        }
        finished = self._finished()
        if finished >= 0:
            streams = self._load(self.store, f"state-{finished}")
        for index in progress(range(self.model.block_count), "quantize: round"):
            if index <= finished:
                continue
            self._round_block_(index, streams)
            self.store.save(f"drift-{index}", {"drift": drift_of(**streams)})
            self.store.save(f"state-{index}", streams)
            self.store.discard(f"state-{index - 1}")
            if self.inputs is not None:
                self.inputs.discard(f"input-{index}")

    def head(self) -> None:
        """Round the output head on what the quantized decoder gives it."""
        if not self.store.has(self.model.source.head_name):
            round_head(self.model, self.linears, self.store, self.batches)

    def _finished(self) -> int:
        # The last block that need not be done again, with all before it; -1 if there is none. Where a block has lost an
        # artifact, all are done again from the first on: states in between are not kept. So they are where blocks hand
        # keys and values to later ones, which are in memory only.
        finished = max((i for i in range(self.model.block_count) if self.store.has(f"state-{i}")), default=-1)
        for index in range(finished + 1):
            groups = self.model.structure(index).groups
            names = [name for group in groups for name in self.linears.names_of(index, group).values()]
            if self.model.calls.hands_state or not all(map(self.store.has, [f"drift-{index}", *names])):
                self.store.discard(f"state-{finished}")
                return -1
        return finished

    def _round_block_(self, index: int, streams: dict[str, Tensor]) -> None:
        # In the place of both streams into the block come those out of it.
        with torch.no_grad(), self.model.block(index, index + 1) as block:
            rounding = BlockRounding(self.model, index, block, self.linears, self.batches, self._quantized_calls)
            original = OriginalBlock(self.model, index, block, self.tokens, rounding.groups)
            known = self._output_of(index) if original.last_group_only_adds else None
            targets, streams["original"] = original.run(streams.pop("original"), known)
            rounding.sort_groups(original.order)
            rounding.round_(targets, streams["quantized"])

    def _output_of(self, index: int) -> Tensor | None:
        # The original block's output, if measuring left it.
        artifact = f"input-{index + 1}"
        if self.inputs is None or not self.inputs.has(artifact):
            return None
        return self._load(self.inputs, artifact)["hidden"]

    def _load(self, store: ResumeStore, artifact: str) -> dict[str, Tensor]:
        return store.load(artifact, partial(new_state, directory=self.model.offload_dir))
