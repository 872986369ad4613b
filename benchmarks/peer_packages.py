"""GPTQModel and AutoRound on the calibration tokens that bpwise takes. Runs in a virtual environment of theirs.

    python benchmarks/peer_packages.py gptqmodel quantize MODEL OUT --tokens TOKENS --group-size 64
    python benchmarks/peer_packages.py gptqmodel decode OUT PLAIN --original MODEL

``decode`` has the package load what it wrote, and runs every packed linear on the unit vectors: that gives its weights
as the package computes with them. They are written as a float32 checkpoint, once each group of input channels has been
seen to hold no more values than its bits allow. bpwise is not imported here; ``peers.py`` calls this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["main"]

_BITS = 4


def quantize_gptqmodel(model: Path, out: Path, tokens: Tensor, group_size: int, iterations: int) -> None:
    """GPTQ with the package's defaults."""
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415

    loaded = GPTQModel.load(str(model), QuantizeConfig(bits=_BITS, group_size=group_size), device="cpu")
    loaded.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens])
    loaded.save(str(out))


def quantize_autoround(model: Path, out: Path, tokens: Tensor, group_size: int, iterations: int) -> None:
    """AutoRound's W4A16 scheme; its default is 200 iterations."""
    from auto_round import AutoRound  # noqa: PLC0415

    rows, row_tokens = tokens.shape
    batches = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=rows
    )
    rounding = AutoRound(
        str(model),
        AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        group_size=group_size,
        dataset=batches,
        nsamples=rows,
        seqlen=row_tokens,
        iters=iterations,
        device_map="cpu",
        **({"lr": 5e-3} if iterations == 50 else {}),  # its light recipe
    )
    rounding.quantize_and_save(str(out), format="auto_round")
    saved = next(out.glob("**/config.json")).parent  # a folder named by model and scheme
    for file in saved.iterdir():
        file.rename(out / file.name)


def _load_gptqmodel(path: Path) -> Any:
    from gptqmodel import BACKEND, GPTQModel  # noqa: PLC0415

    return GPTQModel.load(str(path), backend=BACKEND.TORCH, device="cpu").model


def _load_autoround(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu")


_QUANTIZE = {"gptqmodel": quantize_gptqmodel, "auto-round": quantize_autoround}
_LOAD = {"gptqmodel": _load_gptqmodel, "auto-round": _load_autoround}


@torch.no_grad()
def decoded(module: Any, in_features: int) -> Tensor:
    """Return the weights that a packed linear computes with, (out_features, in_features) float32."""
    dtype = module.scales.dtype
    unit = torch.eye(in_features, dtype=dtype)
    rows = [module(part).float() for part in unit.split(512)]
    return torch.cat(rows).T.contiguous()


def most_values(weight: Tensor, group_size: int) -> int:
    """Return the largest number of different values in any group of input channels."""
    ordered = [group.sort(dim=-1).values for group in weight.split(group_size, dim=1)]
    return max(int((group.diff(dim=-1) != 0).sum(dim=-1).max()) + 1 for group in ordered)


@click.group()
@click.argument("package", type=click.Choice(list(_QUANTIZE)))
@click.pass_context
def main(context: click.Context, package: str) -> None:
    """Quantize with PACKAGE, or decode what it wrote."""
    context.obj = package


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.Path(path_type=Path), required=True, help="Calibration rows, safetensors.")
@click.option("--group-size", default=64, show_default=True, help="Input channels that share a scale.")
@click.option("--iterations", default=200, show_default=True, help="AutoRound's.")
@click.pass_obj
def quantize(package: str, model: Path, out: Path, tokens: Path, group_size: int, iterations: int) -> None:
    """Quantize MODEL to OUT."""
    _QUANTIZE[package](model, out, load_file(tokens)["input_ids"], group_size, iterations)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("plain", type=click.Path(path_type=Path))
@click.option("--original", type=click.Path(path_type=Path), required=True, help="The model that was quantized.")
@click.pass_obj
def decode(package: str, path: Path, plain: Path, original: Path) -> None:
    """Write the model in PATH with plain weights to PLAIN, and its bits per weight to PLAIN/bits.json."""
    stored_bits = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name.endswith((".qweight", ".qzeros", ".scales")):
                    tensor = tensors.get_tensor(name)
                    stored_bits += 8 * tensor.numel() * tensor.element_size()
    group_size = json.loads((path / "config.json").read_text())["quantization_config"]["group_size"]
    dense = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    weights = 0
    for name, module in _LOAD[package](path).named_modules():
        if hasattr(module, "qweight"):
            target = dense.get_submodule(name).weight
            weight = decoded(module, target.shape[1])
            if most_values(weight, group_size) > 2**_BITS:
                raise click.ClickException(f"{name}: a group has {most_values(weight, group_size)} different values")
            target.data.copy_(weight)
            weights += weight.numel()
    dense.save_pretrained(plain)
    AutoTokenizer.from_pretrained(original).save_pretrained(plain)
    (plain / "bits.json").write_text(json.dumps({"bpw": stored_bits / weights, "weights": weights}))


if __name__ == "__main__":
    main()
