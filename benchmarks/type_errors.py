"""What rounding leaves of single linears in ggml's types, step by step, on the text it was fitted to and on another.

    python benchmarks/type_errors.py MODEL --fit c4.txt --judge wiki.txt --linears '*.15.mlp.down_proj'

Printed is tr(D^T H D) of the weight's error D, H of the inputs that a text gives, relative to ggml's encoder with the
mean squares of the fitted text's inputs as importances: with error feedback, with every code chosen again given all
others, which is what bpwise does (outputs each for itself, and no drift to correct: one linear at a time), and with the
channels equalized before that, as with --equalize.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import click
import torch
from bpwise.checkpoint.equalized.view import column_factors, equalized
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.gguf.ggml.kernels import Bytes, decode, encode, ggml_type
from bpwise.convert.gguf.ggml.rounding import round_to_type
from bpwise.convert.gguf.ggml.types import GgmlType
from bpwise.errors import BpwiseError
from bpwise.eval.comparison import EvalConfig, evaluation_rows
from bpwise.eval.models import vocab_size_of
from bpwise.linalg.hessian import factor_hessian
from bpwise.measure.text.tokenizer import load_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

__all__ = ["error", "main", "steps"]

_TYPES = "IQ1_S,IQ2_XXS,IQ2_S,IQ3_XXS,IQ3_S,Q2_K,Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K"


def steps(
    weight: Tensor, gram: Tensor, kind: GgmlType, damping: float, factors: Tensor | None = None
) -> dict[str, Tensor]:
    """Return one weight rounded in every way, decoded, each of shape (K, out).

    Args:
        weight: Float32, shape (K, out).
        gram: H, float32, shape (K, K).
        kind: The type.
        damping: Of H, relative to the mean of its diagonal.
        factors: What equalization multiplies the input channels of the weight with, shape (K,).
    """
    upper = factor_hessian(gram, damping).upper
    scale = torch.ones(len(weight)) if factors is None else factors
    even = factor_hessian(gram / (scale[:, None] * scale), damping).upper

    def decoded(data: Bytes) -> Tensor:
        return decode(data, kind).T

    return {
        "ggml": decoded(encode(weight.T.contiguous(), kind, gram.diagonal().contiguous())),
        "feedback": decoded(round_to_type(weight, upper, kind, sweeps=0)),
        "chosen again": decoded(round_to_type(weight, upper, kind)),
        "equalized": decoded(round_to_type(weight * scale[:, None], even, kind)) / scale[:, None],
    }


def error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Return tr(D^T H D)."""
    missed = weight - rounded
    return float((missed * (gram @ missed)).sum())


@torch.no_grad()
def _grams(model: nn.Module, names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
    grams = {name: torch.tensor(0.0) for name in names}

    def add(name: str, inputs: Tensor) -> None:
        flat = inputs.flatten(0, -2)
        grams[name] = grams[name] + flat.T @ flat / rows.numel()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _module, inputs, name=name: add(name, inputs[0]))
        for name in names
    ]
    for row in rows.long():
        model(row[None])
    for hook in hooks:
        hook.remove()
    return grams


@click.command()
@click.argument("model")
@click.option("--fit", required=True, help="Text that rounding is fitted to.")
@click.option("--judge", required=True, help="Text that it is judged on as well.")
@click.option("--linears", default="*.0.*,*.15.*", show_default=True, help="Patterns of their names.")
@click.option("--types", default=_TYPES, show_default=True)
@click.option("-r", "--rows", default=16, show_default=True)
@click.option("-l", "--row-tokens", default=512, show_default=True)
@click.option("--outputs", default=512, show_default=True, help="Outputs of a linear that are taken.")
@click.option("--damping", default=0.03, show_default=True)
def main(
    model: str,
    fit: str,
    judge: str,
    linears: str,
    types: str,
    rows: int,
    row_tokens: int,
    outputs: int,
    damping: float,
) -> None:
    """Print the errors of MODEL's linears."""
    try:
        checkpoint = open_model(model)
        tokenizer = load_tokenizer(checkpoint.directory)
        configs = [EvalConfig(rows=rows, row_tokens=row_tokens, text=text) for text in (fit, judge)]
        texts = [evaluation_rows(tokenizer, each, vocab_size=vocab_size_of(checkpoint)).tokens for each in configs]
    except BpwiseError as problem:
        raise click.ClickException(str(problem)) from problem
    network = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in linears.split(","))
    ]
    fitted, judged = (_grams(network, names, text) for text in texts)
    view, source = equalized(checkpoint), language_model(checkpoint)
    columns = "feedback | chosen again | equalized"
    click.echo(f"| linear | type | bits | fitted text: {columns} | other text: {columns} |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        weight = network.get_submodule(name).weight[:outputs].T.detach().contiguous()
        for kind in map(ggml_type, types.split(",")):
            if not kind.fits(len(weight)):
                continue
            made = steps(weight, fitted[name], kind, damping, column_factors(view, source, name))
            cells = [name, kind.name, f"{kind.bits_per_weight:.2f}"]
            for gram in (fitted[name], judged[name]):
                plain, *own = (error(weight, each, gram) for each in made.values())
                cells += [f"{each / plain:.2f}" for each in own]
            click.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
