"""Derives a model with a narrower residual stream: K types need rows that are multiples of 256, which SmolLM2 lacks.

    python benchmarks/narrow_model.py MODEL OUT --hidden-size 512

Works on any Llama without biases. The norms' weights go into the linears that read them, and the stream is projected
onto the directions in which, over calibration text and all places where it is normalised, it has most of its power
(SliceGPT, Ashkboos et al., arXiv 2401.15024, with one basis for all blocks). Among the bases of that subspace the one
closest to the strongest channels themselves is taken, so that weights and activations keep their outliers. SmolLM2
from 576 to 512 channels keeps 98.9 % of the power; its perplexity on the built-in evaluation text, 16 rows of 512
tokens, rises from 11.5 to 17.3: still a language model. The head becomes a tensor of its own, because the last norm's
weight goes into it. The result calls itself a Mistral, which computes the same and may have heads that do not divide
its width.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copy2
from typing import Any

import click
import torch
from bpwise.checkpoint.files.atomic import atomic_directory
from bpwise.checkpoint.files.side_files import is_side_file
from bpwise.checkpoint.source.original import open_model
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig

__all__ = ["main", "narrowed", "write_narrowed"]


@torch.no_grad()
def stream_covariance(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean of x x^T over tokens and norms, x being the stream divided by its root mean square."""
    covariance = torch.zeros(model.config.hidden_size, model.config.hidden_size)

    def add(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        x = args[0].flatten(0, 1)
        x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        covariance.addmm_(x.T, x)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    handles = [norm.register_forward_hook(add) for norm in norms]
    for row in tokens:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return covariance / (len(norms) * tokens.numel())


def basis_of(covariance: Tensor, hidden_size: int) -> Tensor:
    """Return an orthonormal basis of the strongest directions, shape (channels, hidden size)."""
    strongest = torch.linalg.eigh(covariance.double()).eigenvectors[:, -hidden_size:]
    channels = covariance.diagonal().argsort()[-hidden_size:].sort().values
    axes = torch.eye(len(covariance), dtype=torch.float64)[:, channels]
    left, _, right = torch.linalg.svd(strongest @ (strongest.T @ axes), full_matrices=False)
    return (left @ right).float()


@torch.no_grad()
def narrowed(model: Any, basis: Tensor) -> Any:
    """Return the Mistral whose residual stream is that of ``model`` in a basis of a subspace.

    Args:
        model: A ``LlamaForCausalLM`` in float32, without biases.
        basis: Orthonormal columns, shape (channels, hidden size).
    """
    settings = model.config.to_dict()
    for key in ("architectures", "dtype", "model_type"):
        del settings[key]
    settings["sliding_window"] = None
    config = MistralConfig(**{**settings, "hidden_size": basis.shape[1], "tie_word_embeddings": False})
    small: Any = AutoModelForCausalLM.from_config(config)
    for block, source in zip(small.model.layers, model.model.layers, strict=True):
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for name in names:
                weight = source.get_submodule(name).weight * getattr(source, norm).weight
                block.get_submodule(name).weight.copy_(weight @ basis)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            block.get_submodule(name).weight.copy_(basis.T @ source.get_submodule(name).weight)
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis)
    small.lm_head.weight.copy_((model.lm_head.weight * model.model.norm.weight) @ basis)
    return small


def write_narrowed(model: str, output: Path, hidden_size: int) -> float:
    """Write a model with a narrower residual stream to a directory, which appears once it is whole.

    Args:
        model: Directory or Hub id of a Llama or Mistral without biases.
        output: The directory to make.
        hidden_size: Channels of the narrower stream.

    Returns:
        Share of the stream's power that is kept, 0 to 1.
    """
    directory = open_model(model).directory
    source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = calibration_rows(open_model(model), CalibrationConfig(rows=16, row_tokens=512))
    covariance = stream_covariance(source, rows.tokens)
    basis = basis_of(covariance, hidden_size)
    kept = float((basis.T @ covariance @ basis).trace() / covariance.trace())
    with atomic_directory(output) as temporary:
        narrowed(source, basis).to(torch.bfloat16).save_pretrained(temporary)
        for file in filter(Path.is_file, directory.iterdir()):
            if is_side_file(file.name):
                copy2(file, temporary)
    return kept


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--hidden-size", default=512, show_default=True, help="Channels of the narrower stream.")
def main(model: str, output: Path, hidden_size: int) -> None:
    """Write MODEL with a narrower residual stream to the directory OUTPUT."""
    kept = write_narrowed(model, output, hidden_size)
    click.echo(f"{hidden_size} channels keep {kept:.2%} of the power")


if __name__ == "__main__":
    main()
