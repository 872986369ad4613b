"""What llama-imatrix collects of a model, from the streamed passes: mean squares of every linear's inputs."""

from __future__ import annotations

import torch
from bpwise.checkpoint.model.families import HEAD
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.gguf.llama_cpp.imatrix import ImportanceMatrix
from bpwise.convert.gguf.model.names import gguf_name
from bpwise.linalg.precision import in_float64, precise_device
from bpwise.measure.device import resolve_device
from bpwise.measure.model.batches import micro_batches
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.statistics.inputs import tapped_inputs
from torch import Tensor
from tqdm import tqdm

__all__ = ["input_mean_squares"]


@torch.no_grad()
def input_mean_squares(checkpoint: Checkpoint, tokens: Tensor, device: str = "cpu") -> ImportanceMatrix:
    """Return what llama-imatrix collects: mean squares of the inputs of every linear, all tokens alike.

    Args:
        checkpoint: The model.
        tokens: Calibration rows, shape (rows, tokens).
        device: Where the passes run, as ``MeasureConfig.device``.
    """
    model = StreamedModel(checkpoint, device=resolve_device(device), dtype=torch.float32)
    hidden = model.embed(tokens)
    means: dict[str, Tensor] = {}
    for index in tqdm(range(model.block_count), desc="importance matrix"):
        output = torch.empty_like(hidden)
        firsts = [stage.linears[0] for stage in model.structure(index).groups]
        sums: dict[str, Tensor] = {}
        with model.block(index) as block, tapped_inputs(block, firsts) as taps:
            for batch in micro_batches(*tokens.shape):
                output[batch] = model.run_block(index, hidden[batch].to(model.device), batch.start).cpu()
                for name in firsts:
                    square = in_float64(taps[name].flatten(0, 1)).square().sum(dim=0)
                    sums[name] = sums[name] + square if name in sums else square
        hidden = output
        for stage in model.structure(index).groups:
            for name in model.linear_names(index, stage):
                means[_name(name)] = (sums[stage.linears[0]] / tokens.numel()).float().cpu()
    if not model.source.tied_embeddings:
        with model.tail() as head, tapped_inputs(head, [""]) as taps:
            model.logits(hidden[:1].to(model.device))
            total = torch.zeros(taps[""].shape[-1], dtype=torch.float64, device=precise_device(model.device))
            for row in hidden:
                model.logits(row[None].to(model.device))
                total += in_float64(taps[""].flatten(0, 1)).square().sum(dim=0)
        means[_name(HEAD)] = (total / tokens.numel()).float().cpu()
    rows, row_tokens = tokens.shape
    return ImportanceMatrix.from_means(means, tokens.numel(), chunks=rows, chunk_tokens=row_tokens)


def _name(module: str) -> str:
    name = gguf_name(f"{module}.weight")
    assert name is not None
    return name
