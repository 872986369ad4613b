"""Attention over rows of any length in memory that grows with the length, not with its square.

Transformers' own ``sdpa`` needs no mask where attention is plainly causal, and its kernels then need no square matrix.
But a sliding window, or any other pattern, it hands over as a mask of tokens x tokens: 4 GiB as bools for 65536. Here a
mask stays a rule, of which a few queries at a time see their part, over the keys within their reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaskRule", "attention_for", "attention_in_parts"]

_NAME = "bpwise"
"""What Transformers knows the functions of this module by."""

_WHOLE_MASK = 1 << 22
"""Queries x keys up to which a mask is made in one piece, as Transformers does: rows of 2048 tokens."""

_PART_SCORES = 1 << 26
"""Scores (heads x queries x keys) of one part: 256 MiB in float32, where the kernel does make them."""

_MOST_QUERIES = 1024

_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries, keys, values and the mask between them to what is attended to, shape (rows, queries, heads, features)."""


class MaskRule:
    """A mask of queries x keys that is not made until a part of it is needed.

    Attributes:
        length: Number of queries, and of keys.
        reach: Keys that a query sees at most, itself included, none of them further away; None if that has no limit.
    """

    def __init__(self, rule: Callable[..., Tensor], rows: int, length: int, reach: int | None, device: Any) -> None:
        """Keep a rule.

        Args:
            rule: As Transformers' mask functions: whether a query sees a key, by index of row, head, query and key.
            rows: Number of rows.
            length: Number of queries and of keys.
            reach: See there.
            device: Where parts are made.
        """
        self._rule = rule
        self._rows = rows
        self.length = length
        self.reach = reach
        self._device = device

    @cached_property
    def whole(self) -> Tensor:
        """All of it, bool, shape (rows, 1, queries, keys)."""
        return self._part(0, self.length, 0, self.length)

    def __getitem__(self, parts: tuple[slice, ...]) -> MaskRule:
        """Return all of it, as a model that could leave out positions asks for; there is no part."""
        if any(part.start or part.stop is not None for part in parts):
            raise TypeError("a rule has no parts")
        return self

    def seen(self, first: int, last: int) -> tuple[slice, Tensor]:
        """Return which keys the queries from ``first`` to before ``last`` see, and the mask between the two."""
        low, high = 0, self.length
        if self.reach is not None:
            low, high = max(0, first - self.reach + 1), min(high, last + self.reach - 1)
        mask = self._part(first, last, low, high)
        used = mask.any(dim=2).flatten(0, 1).any(dim=0).nonzero()[:, 0]
        start, end = int(used[0]), int(used[-1]) + 1  # a causal rule leaves out what comes after
        return slice(low + start, low + end), mask[..., start:end]

    def _part(self, first: int, last: int, first_key: int, last_key: int) -> Tensor:
        row = torch.arange(self._rows, device=self._device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self._device)
        query = torch.arange(first, last, device=self._device)[None, None, :, None]
        key = torch.arange(first_key, last_key, device=self._device)[None, None, None, :]
        return self._rule(row, head, query, key).expand(self._rows, -1, last - first, last_key - first_key)


def attention_for(model_class: Any) -> str:
    """Return the name of the attention that a model class of Transformers shall be built with.

    It is the one of this module wherever the class lets its attention be chosen, else the class's own.
    """
    if not model_class._supports_sdpa:
        return "eager"  # it has something that no other attention has, as the sinks of gpt-oss
    if not model_class._supports_attention_backend:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415 - seconds to import

    AttentionInterface.register(_NAME, attention_in_parts)
    AttentionMaskInterface.register(_NAME, _mask)
    return _NAME


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> MaskRule | Tensor | None:
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415 - seconds to import

    if attention_mask is not None or use_vmap or q_length != kv_length:  # no row of ours, or no rule by index
        made: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
        return made
    if allow_is_causal_skip and (local_size is None or q_length < local_size):
        return None
    return MaskRule(mask_function, batch_size, q_length, local_size, device)


def attention_in_parts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as an attention function of Transformers.

    Args:
        module: The attention layer.
        query: Shape (rows, heads, queries, features).
        key: Shape (rows, key heads, keys, features).
        value: Shape (rows, key heads, keys, features).
        attention_mask: A rule, a mask that is made already, or None for plainly causal attention.
        dropout: Not used: nothing is trained.
        scaling: What scores are multiplied by; None for one over the root of the features.
        softcap: Scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
        **kwargs: What else a layer tells; not needed, since the mask says it.

    Returns:
        Shape (rows, queries, heads, features), and None in the place of the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415 - seconds to import

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if softcap is not None:
            assert mask is not None
            return _capped(queries, keys, values, mask, scaling, softcap)
        attended: Tensor = sdpa_attention_forward(module, queries, keys, values, mask, scaling=scaling, **kwargs)[0]
        return attended

    rows, heads, length, _ = query.shape
    rule = attention_mask
    if rule is None and softcap is not None:
        rule = MaskRule(lambda _row, _head, q, k: k <= q, rows, length, None, query.device)
    if not isinstance(rule, MaskRule):
        return attend(query, key, value, rule), None
    if length * length <= _WHOLE_MASK:
        return attend(query, key, value, rule.whole), None
    most = max(1, min(_MOST_QUERIES, _PART_SCORES // (rows * heads * min(length, rule.reach or length))))
    bounds = [(first, min(first + most, length)) for first in range(0, length, most)]
    output: Tensor = _InParts.apply(attend, rule, bounds, query, key, value)  # type: ignore[no-untyped-call] # torch has none
    return output, None


class _InParts(torch.autograd.Function):
    """Attention of some queries after others; the backward pass makes each part's mask and scores anew.

    Autograd alone would keep the masks of all parts, which together are the square again, and add up a gradient of all
    keys for each part.
    """

    @staticmethod
    def forward(ctx: Any, attend: _Attend, rule: MaskRule, bounds: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        ctx.attend, ctx.rule, ctx.bounds = attend, rule, bounds
        ctx.save_for_backward(*tensors)
        query, key, value = tensors
        parts = []
        for first, last in bounds:
            keys, mask = rule.seen(first, last)
            parts.append(attend(query[:, :, first:last], key[:, :, keys], value[:, :, keys], mask))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        sums = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for first, last in ctx.bounds:
            keys, mask = ctx.rule.seen(first, last)
            places = (slice(first, last), keys, keys)
            own = [
                tensor[:, :, place].detach().requires_grad_()
                for tensor, place in zip((query, key, value), places, strict=True)
            ]
            with torch.enable_grad():
                output = ctx.attend(*own, mask)
            parts = torch.autograd.grad(output, own, gradient[:, first:last])
            for total, place, part in zip(sums, places, parts, strict=True):
                total[:, :, place] += part
        return (None, None, None, *sums)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    rows, heads, queries, features = query.shape
    grouped = query.view(rows, key.shape[1], -1, queries, features)
    scores = grouped @ key[:, :, None].transpose(-1, -2)
    scores = torch.tanh(scores * ((scaling or features**-0.5) / softcap)) * softcap
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value[:, :, None]).view(rows, heads, queries, -1).transpose(1, 2)
