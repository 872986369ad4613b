"""How much more a linear's errors hurt because the tokens of a sequence act together.

    python benchmarks/coherence.py MODEL --text prose.txt

One by one, tokens x with gradients g at a linear's outputs turn an error dW of its weight into the damage
``sum |x dW|^2 |g|^2``, if outputs are alike; a sequence of them turns it into ``|dW^T X^T G|^2``. For each kind of
linear the ratio of the two is printed, once for errors that are white noise, and once as error feedback leaves them,
fitted on other sequences: ``dW = R^-T diag(R_kk) d`` with ``R R^T`` the damped Gram matrix of these, and d white noise.
Gradients are those of sampled next tokens, one at each place. Needs no quantized model, and nothing of bpwise's own
measuring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from bpwise.measure.text.tokenizer import load_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

__all__ = ["feedback_factor", "main", "tokens_alone_and_together"]

_HEAD = "lm_head"
"""Whose tokens never act together: each has a next token of its own."""


def feedback_factor(gram: Tensor, damping: float) -> Tensor:
    """Return ``diag(R_kk) R^-1``, shape (K, K), of a Gram matrix damped by so much of its diagonal's mean."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return upper.diagonal()[:, None] * torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)


def tokens_alone_and_together(inputs: Tensor, gradients: Tensor, factor: Tensor | None) -> tuple[float, float]:
    """Return the damage of unit errors, summed over a sequence's tokens one by one, and of the sequence.

    Args:
        inputs: X, shape (tokens, K).
        gradients: G, shape (tokens, out).
        factor: Of ``feedback_factor``, shape (K, K); None for white noise.
    """
    moved = inputs.T if factor is None else factor @ inputs.T
    alone = (moved.square().sum(dim=0) * gradients.square().sum(dim=1)).sum()
    return float(alone), float((moved @ gradients).square().sum())


class _Tapped:
    """A model whose linears tell what they read, and the gradients at their outputs."""

    def __init__(self, model: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._model = model
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and _HEAD not in name:
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name] = args[0][0].detach()
            output.register_hook(lambda gradient: self.gradients.update({name: gradient[0].detach()}))

        return hook

    def run(self, tokens: Tensor) -> None:
        logits = self._model(tokens[None]).logits[0]
        sampled = torch.multinomial(logits.detach().softmax(dim=-1), 1)[:, 0]
        nn.functional.cross_entropy(logits, sampled, reduction="sum").backward()
        self._model.zero_grad()


def _table(ratios: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    lines = ["| linear | white noise | with error feedback |", "| --- | --- | --- |"]
    for kind, found in ratios.items():
        means = (math.fsum(column) / len(found) for column in zip(*found, strict=True))
        lines.append(f"| {kind} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


@click.command()
@click.argument("model")
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="Text to take sequences of.")
@click.option("-r", "--rows", default=14, show_default=True, help="Sequences; the last third is not fitted on.")
@click.option("-l", "--row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option(
    "--damping", default=0.1, show_default=True, help="Of the Gram matrices, relative to their diagonals' mean."
)
def main(model: str, text: Path, rows: int, row_tokens: int, damping: float) -> None:
    """Print how much more the errors of MODEL's linears hurt in sequences than token by token."""
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.requires_grad_(False)
    loaded.get_input_embeddings().weight.requires_grad_(True)  # so that gradients flow through every linear
    tapped = _Tapped(loaded)
    ids = torch.tensor(load_tokenizer(Path(model))(text.read_text())["input_ids"][: rows * row_tokens])
    sequences = ids.view(rows, row_tokens)
    fitted = rows - rows // 3
    grams: dict[str, Tensor] = {}
    for tokens in sequences[:fitted]:
        tapped.run(tokens)
        for name, inputs in tapped.inputs.items():
            weighted = inputs * tapped.gradients[name].norm(dim=1, keepdim=True)
            grams[name] = grams.get(name, 0) + weighted.T @ weighted
    factors = {name: feedback_factor(gram, damping) for name, gram in grams.items()}
    sums = {name: [0.0] * 4 for name in factors}
    for tokens in sequences[fitted:]:
        tapped.run(tokens)
        for name, factor in factors.items():
            of_row = [tokens_alone_and_together(tapped.inputs[name], tapped.gradients[name], x) for x in (None, factor)]
            sums[name] = [total + value for total, value in zip(sums[name], of_row[0] + of_row[1], strict=True)]
    ratios: dict[str, list[tuple[float, float]]] = {}
    for name, (white, white_together, alone, together) in sums.items():
        ratios.setdefault(name.rpartition(".")[2], []).append((white_together / white, together / alone))
    click.echo(_table(ratios))


if __name__ == "__main__":
    main()
