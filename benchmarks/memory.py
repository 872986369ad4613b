"""Peak memory and time of ``bpwise quantize`` on a model of real dimensions with random weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --preset llama-3-8b --layers 2 --rows 8

The checkpoint is made on the spot, shard by shard, with a byte-level tokenizer beside it. What ``--dry-run``
forecasts is printed next to what the run took.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from bpwise.checkpoint.files.atomic import atomic_directory
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["PRESETS", "main", "write_checkpoint"]

_INIT_SCALE = 0.02
"""Standard deviation of all matrices: Llama's ``initializer_range``."""

_CHUNK_ELEMENTS = 1 << 24
"""Weights drawn at a time: 64 MiB in float32."""

_MIB = 1 << 20

_LLAMA_3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001}

PRESETS = {
    "llama-3.2-1b": LlamaConfig(
        **_LLAMA_3,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-3-8b": LlamaConfig(
        **_LLAMA_3,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen2.5-1.5b": LlamaConfig(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
"""Dimensions of known models, and of one to try the benchmark out with."""

# The memory that the operating system reports for a child includes what its parent held when it started it, so the
# run is started from a small process of its own.
_WATCH = """
import json, os, sys, time
start = time.monotonic()
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:]), 0)
scale = 1 if sys.platform == "darwin" else 1024
result = {"seconds": time.monotonic() - start, "peak_bytes": usage.ru_maxrss * scale}
open(sys.argv[1], "w").write(json.dumps(result))
sys.exit(os.waitstatus_to_exitcode(status))
"""

_CLI = ("-c", "from bpwise.cli import main; main()")


def write_checkpoint(directory: Path, config: LlamaConfig, seed: int, *, scale: float = _INIT_SCALE) -> int:
    """Write a random bfloat16 checkpoint, a shard for each block, with little memory.

    Args:
        directory: Directory to make.
        config: The model.
        seed: Seed of the weights.
        scale: Standard deviation of all matrices.

    Returns:
        Number of parameters.
    """
    rng = torch.Generator().manual_seed(seed)
    shards = dict(_shards(config))
    weight_map, parameters = {}, 0
    with atomic_directory(directory) as target:
        for number, (shard, shapes) in enumerate(shards.items(), start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            click.echo(f"write {shard} -> {file}", err=True)
            save_file(
                {name: _draw(shape, rng, scale) for name, shape in shapes.items()}, target / file, {"format": "pt"}
            )
            weight_map |= dict.fromkeys(shapes, file)
            parameters += sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = "bfloat16"
        config.save_pretrained(target)
        _byte_tokenizer().save_pretrained(target)
    return parameters


def _shards(config: LlamaConfig) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    # Names and shapes of each shard's tensors.
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "embedding", {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config.num_hidden_layers):
        yield f"block {layer}", {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    tail: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        tail["lm_head.weight"] = (config.vocab_size, hidden)
    yield "head", tail


def _draw(shape: tuple[int, ...], rng: torch.Generator, scale: float) -> Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for part in tensor.split(max(1, _CHUNK_ELEMENTS // shape[1])):
        part.copy_(torch.randn(part.shape, generator=rng) * scale)
    return tensor


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _forecast_mib(arguments: list[str]) -> float:
    result = subprocess.run(
        [sys.executable, *_CLI, *arguments, "--dry-run"], check=True, stdout=subprocess.PIPE, text=True
    )
    found = re.search(r"^memory +([\d.]+) MiB", result.stdout, re.MULTILINE)
    if found is None:
        raise click.ClickException(f"the dry run printed no memory forecast:\n{result.stdout}")
    return float(found[1])


def _run(arguments: list[str], record: Path) -> tuple[float, float]:
    """Run bpwise and return its peak of resident memory in MiB and its wall time in seconds."""
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(record), sys.executable, *_CLI, *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise click.ClickException(f"bpwise ended with exit code {code}.")
    measured = json.loads(record.read_text())
    return measured["peak_bytes"] / _MIB, measured["seconds"]


@click.command(context_settings={"show_default": True})
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama-3.2-1b", help="Dimensions of the model.")
@click.option("--layers", type=click.IntRange(1), help="Number of decoder blocks.  [default: the preset's]")
@click.option("--bpw", default=4.0, help="Decoder bits per weight.")
@click.option("--head-bits", default="6", help="Bits of the output head.")
@click.option("--rows", type=click.IntRange(1), default=4, help="Calibration rows.")
@click.option("--row-tokens", type=click.IntRange(2), default=512, help="Tokens in each row.")
@click.option("--eval-rows", type=click.IntRange(0), default=1, help="Rows to evaluate on; 0: no evaluation.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:N, mps or auto.")
@click.option("--seed", default=0, help="Seed of the weights.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/memory"),
    help="Keeps the random checkpoint for other runs; outputs go into directories named by the time.",
)
def main(
    preset: str,
    layers: int | None,
    bpw: float,
    head_bits: str,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    device: str,
    seed: int,
    work_dir: Path,
) -> None:
    """Quantize a random model of real dimensions and print peak memory and time."""
    config = LlamaConfig.from_dict(PRESETS[preset].to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    name = f"{preset}-{config.num_hidden_layers}-layers-seed-{seed}"
    checkpoint = work_dir / name
    if not checkpoint.exists():
        write_checkpoint(checkpoint, config, seed)
    output = work_dir / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    arguments = ["quantize", str(checkpoint), str(output), "--bpw", str(bpw), "--head-bits", head_bits]
    arguments += ["--rows", str(rows), "--row-tokens", str(row_tokens), "--device", device]
    evaluation = ["--eval-rows", str(eval_rows), "--eval-row-tokens", str(row_tokens)] if eval_rows else ["--no-eval"]
    arguments += evaluation
    forecast = _forecast_mib(arguments)
    peak, seconds = _run(arguments, work_dir / f"{output.name}.json")
    click.echo()
    click.echo("| model | rows x tokens | device | peak memory, MiB | forecast, MiB | wall time, s |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    click.echo(f"| {name} | {rows} x {row_tokens} | {device} | {peak:.0f} | {forecast:.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
