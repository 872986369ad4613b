"""What ExLlamaV2 needs of its compiled extension to load and run a model, in PyTorch and NumPy on the CPU.

Written anew after the semantics of its sources (0.3.2, exllamav2_ext): float32 where they compute in float32, rounded
to float16 where they round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ReaderFunctions"]

_HALF_MAX = 65504.0


class _QMatrix:
    """A quantized matrix as the loader gets it.

    Attributes:
        dense: What it decodes to, float16, shape (in, out).
        bias: Float16, shape (out,), or None.
    """

    def __init__(self, dense: Tensor, bias: Tensor | None) -> None:
        self.dense = dense
        self.bias = bias


class ReaderFunctions:
    """Functions of the module ``exllamav2_ext`` that loading and running a model call.

    Arguments have the order that ExLlamaV2 passes them in. Tensors marked as output are filled in place.
    """

    def __init__(self) -> None:
        """Start without matrices."""
        self._matrices: dict[int, _QMatrix] = {}
        self._handles: Iterator[int] = itertools.count(1)

    # --- matrices ---------------------------------------------------------------------------------------------------

    def make_group_map(self, groups: Tensor, word_rows: int) -> Tensor:
        """Return a placeholder: :meth:`make_q_matrix` has no use for a map from rows to groups."""
        return torch.zeros(1, dtype=torch.int16)

    def make_q_matrix(
        self,
        words: Tensor,
        perm: Tensor,
        invperm: Tensor,
        scale_words: Tensor,
        scale_max: Tensor,
        groups: Tensor,
        *others: Any,
    ) -> int:
        """Decode a matrix from the tensors of its file.

        Args:
            words: ``q_weight``, int32, shape (word rows, columns).
            perm: For each stored row its input feature, as 16 bits; a meta tensor where rows are in their order.
            invperm: The inverse, not used.
            scale_words: ``q_scale``, int32, shape (groups, columns / 8).
            scale_max: ``q_scale_max`` divided by 256, float16, shape (groups,).
            groups: ``q_groups``, int16: width and first word row of every group.
            others: The group map, three tensors of another format, the bias, scratch memory and its size.

        Returns:
            A handle.
        """
        packed = words.numpy().view(np.uint32)
        nibbles = np.arange(8, dtype=np.uint32) * np.uint32(4)
        scale_codes = (scale_words.numpy().view(np.uint32)[:, :, None] >> nibbles) & np.uint32(15)
        steps = torch.from_numpy(scale_codes.reshape(len(scale_codes), -1).astype(np.float32)) + 1
        scales = (steps.square() * scale_max.float()[:, None]).half().float()
        decoded: list[Tensor] = []
        table = groups.tolist()
        for group in range(len(table) // 2):
            bits, start = table[2 * group : 2 * group + 2]
            stop = table[2 * group + 3] if 2 * group + 3 < len(table) else len(packed)
            codes = torch.from_numpy(_unpack(packed[start:stop], bits).astype(np.float32))
            decoded.append(((codes - 2 ** (bits - 1)) * scales[group]).half())
        stored = torch.cat(decoded)
        if perm.is_meta:
            dense = stored
        else:
            dense = torch.empty_like(stored)
            dense[torch.from_numpy(perm.numpy().view(np.uint16).astype(np.int64))] = stored
        bias = others[4]
        handle = next(self._handles)
        self._matrices[handle] = _QMatrix(dense, None if bias.is_meta else bias)
        return handle

    def make_q_attn(self, *_arguments: Any) -> None:
        """Make no handle: without one, ExLlamaV2 computes attention by its own code in PyTorch."""

    def make_q_mlp(self, *_arguments: Any) -> None:
        """Make no handle, as for attention."""

    def make_q_moe_mlp(self, *_arguments: Any) -> None:
        """Make no handle, as for attention."""

    def tensor_remap(self, tensor: Tensor, order: Tensor) -> None:
        """Reorder columns in place: column i becomes what column ``order[i]`` was.

        Args:
            tensor: Int32, shape (rows, columns).
            order: Int32, shape (columns,).
        """
        tensor.copy_(tensor[:, order.long()].clone())

    def tensor_remap_4bit(self, tensor: Tensor, order: Tensor) -> None:
        """Do the same with columns of four bits, eight to a word, shape (rows, columns / 8)."""
        places = np.arange(8, dtype=np.uint32) * np.uint32(4)
        codes = (tensor.numpy().view(np.uint32)[:, :, None] >> places) & np.uint32(15)
        codes = codes.reshape(len(codes), -1)[:, order.long().numpy()].reshape(codes.shape)
        words = np.bitwise_or.reduce(codes << places, axis=-1).astype(np.uint32)
        tensor.copy_(torch.from_numpy(words.view(np.int32)))

    def free_q_matrix(self, handle: int) -> None:
        """Forget a matrix."""
        del self._matrices[handle]

    def reconstruct(self, handle: int, output: Tensor) -> None:
        """Fill ``output``, float16, shape (in, out), with what a matrix decodes to."""
        output.copy_(self._matrices[handle].dense)

    def gemm_half_q_half(self, inputs: Tensor, handle: int, output: Tensor, force_cuda: bool) -> None:
        """Multiply by a matrix and add its bias.

        Args:
            inputs: Float16, shape (tokens, in).
            handle: The matrix.
            output: Output, float16, shape (tokens, out).
            force_cuda: Which of two kernels to take; without meaning here.
        """
        matrix = self._matrices[handle]
        output.copy_(inputs.float() @ matrix.dense.float())
        if matrix.bias is not None:
            output += matrix.bias

    def stloader_read(self, filename: str, offset: int, size: int, target: Tensor) -> None:
        """Fill ``target`` with ``size`` bytes of a file from ``offset`` on."""
        with Path(filename).open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{filename}: got {len(data)} bytes at {offset}, expected {size}. The file is cut off.")
        flat = np.frombuffer(data, np.uint8).copy()
        target.view(-1).view(torch.uint8).copy_(torch.from_numpy(flat))

    # --- the forward pass -------------------------------------------------------------------------------------------

    def rms_norm(self, inputs: Tensor, weight: Tensor, output: Tensor, epsilon: float) -> None:
        """Fill ``output`` with the root-mean-square norm of ``inputs``, computed in float32.

        Args:
            inputs: Float16 or float32, shape (tokens, features).
            weight: Float16, shape (features,).
            output: Output, float16 or float32, shape of ``inputs``.
            epsilon: Added to the mean square.
        """
        output.copy_(_rms_norm(inputs, weight, epsilon))

    def layer_norm(self, inputs: Tensor, weight: Tensor, bias: Tensor, output: Tensor, epsilon: float) -> None:
        """Fill ``output`` with the layer norm of ``inputs``, computed in float32.

        Args:
            inputs: Float16 or float32, shape (tokens, features).
            weight: Float16, shape (features,).
            bias: Of the same shape, or a meta tensor.
            output: Output, shape of ``inputs``.
            epsilon: Added to the variance.
        """
        normed = torch.nn.functional.layer_norm(inputs.float(), inputs.shape[-1:], eps=epsilon) * weight.float()
        output.copy_(normed if bias.is_meta else normed + bias.float())

    def head_norm(
        self, inputs: Tensor, weight: Tensor, bias: Tensor, output: Tensor, epsilon: float, rms: bool
    ) -> None:
        """Norm every head by itself.

        Args:
            inputs: Float16, shape (batch, tokens, heads, features).
            weight: Float16, shape (heads, features).
            bias: Float16, of the same shape, or a meta tensor.
            output: Output, float16, shape of ``inputs``; may be ``inputs``.
            epsilon: Added to the mean square.
            rms: Whether the mean stays in; without it, this is a layer norm. (ExLlamaV2 takes Qwen3's norms of
                queries and keys, which are root-mean-square norms, for layer norms.)
        """
        values = inputs if rms else inputs.float().clamp(-_HALF_MAX, _HALF_MAX)
        if not rms:
            values = values - values.mean(-1, keepdim=True)
        output.copy_(_rms_norm(values, weight, epsilon))
        if not bias.is_meta:
            output += bias

    def rope_(
        self,
        states: Tensor,
        sin: Tensor,
        cos: Tensor,
        past_tokens: int,
        heads: int,
        head_features: int,
        offsets: Tensor,
        neox: bool,
    ) -> None:
        """Rotate queries or keys in place: products rounded to float16, sums rounded once.

        Args:
            states: Float16, shape (batch, tokens, heads, features).
            sin: Float16, shape (1, 1, positions, features that are rotated): those of a pair are alike.
            cos: The same of the cosine.
            past_tokens: Position of the first token.
            heads: Number of heads.
            head_features: Features of a head.
            offsets: A meta tensor: further offsets are for batches of prompts.
            neox: Whether the two halves of a head are rotated against each other, as in Llama, or neighbours.
        """
        if not offsets.is_meta:
            raise NotImplementedError("rope_: offsets are not known here")
        tokens, rotated = states.shape[1], sin.shape[-1]
        # The two numbers of every pair that is rotated, and of sines and cosines, which are alike in a pair.
        first, second = (
            (slice(rotated // 2), slice(rotated // 2, rotated))
            if neox
            else (slice(0, rotated, 2), slice(1, rotated, 2))
        )
        sine = sin[0, 0, past_tokens : past_tokens + tokens, None, first].float()
        cosine = cos[0, 0, past_tokens : past_tokens + tokens, None, first].float()
        left, right = states[..., first].float(), states[..., second].float()
        states[..., first] = (left * cosine - (right * sine).half()).half()
        states[..., second] = (right * cosine + (left * sine).half()).half()

    def softcap_(self, values: Tensor, cap: float) -> None:
        """Bring values, float16 of any shape, in place below ``cap`` by a hyperbolic tangent."""
        values.copy_(torch.tanh(values.float() / cap) * cap)


def _unpack(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    rows = len(words) * 32 // bits
    codes = np.empty((rows, words.shape[1]), np.uint8)
    for row in range(rows):
        word, shift = divmod(row * bits, 32)
        code = words[word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | words[word + 1] << np.uint32(32 - shift)
        codes[row] = code & np.uint32(2**bits - 1)
    return codes


def _rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    values = inputs.float()
    if inputs.dtype == torch.half:
        values = values.clamp(-_HALF_MAX, _HALF_MAX)
    return values * weight.float() * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
