"""Random weights with which every part of a model matters to its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ENTROPY = 0.875
"""Of the logits, as a share of the largest possible: neither flat nor certain."""


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights of a model."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    # Some families multiply the embeddings; what the blocks add must not drown in them.
    scale = getattr(text, "embedding_multiplier", None) or math.sqrt(text.hidden_size if _is_gemma(model) else 1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is table:
                parameter.copy_(noise(parameter) / scale * (1 / math.sqrt(text.hidden_size) if tied else 0.5))
            elif parameter.ndim < 2 or "conv" in name:
                parameter.add_(0.1 * noise(parameter))
            else:
                owner = model.get_submodule(name.rpartition(".")[0])
                parameter.copy_(1.2 / math.sqrt(parameter.shape[-2 if _is_turned(owner) else -1]) * noise(parameter))
        for name, buffer in model.named_buffers():
            if "layer_scalar" in name:
                buffer.copy_(0.8 + 0.2 * torch.rand(buffer.shape, generator=generator))
            elif "correction" in name or "expert_bias" in name:
                buffer.copy_(0.02 * noise(buffer))
        _undo_scales(model)
        _spread_logits(model, torch.randint(3, 250, (1, 64), generator=generator))


def _undo_scales(model: nn.Module) -> None:
    """Let attention and routers of Gemma be as decided as others': trained weights scale what the code does not."""
    for module in model.modules():
        if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
            module.q_norm.weight.div_(math.sqrt(module.head_dim))
        if hasattr(module, "scalar_root_size"):
            module.scale.div_(module.scalar_root_size)


def _spread_logits(model: nn.Module, tokens: Tensor) -> None:
    """Scale the last norm so that the logits' entropy is as wanted."""
    called: list[nn.Module] = []
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    hooks = [norm.register_forward_hook(lambda norm, *_: called.append(norm)) for norm in norms]
    logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    low, high = 1e-3, 1e3
    for _ in range(30):
        factor = math.sqrt(low * high)
        entropy = torch.distributions.Categorical(logits=logits * factor).entropy().mean()
        low, high = (factor, high) if entropy > ENTROPY * math.log(logits.shape[-1]) else (low, factor)
    # Gemma's and Qwen3-Next's norms multiply by 1 + weight.
    offset = float(_is_centred(called[-1]))
    for parameter in called[-1].parameters():
        parameter.copy_((parameter + offset) * low - offset)


def _is_gemma(model: nn.Module) -> bool:
    return "gemma" in type(model).__name__.lower()


def _is_centred(norm: nn.Module) -> bool:
    return float(norm.weight.mean()) < 0.5


def _is_turned(module: nn.Module) -> bool:
    # Weights of (in, out): gpt-oss' experts, GPT-2's linears.
    return getattr(module, "is_transposed", False) or type(module).__name__ == "Conv1D"
