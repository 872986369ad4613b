"""What ExLlamaV2's converter needs of CUDA, in PyTorch on the CPU, and the process that runs the converter on it.

    python benchmarks/exllamav2_standin.py PACKAGE_PARENT SEED [ARGUMENTS OF ExLlamaV2's CONVERTER ...]

ExLlamaV2 comes with a compiled extension that takes an NVIDIA card to build and to run. :class:`Extension` has the
functions of it that converting calls, written anew after the semantics of its sources (0.3.2, exllamav2_ext):
float32 where they compute in float32, rounded to float16 where they round. All else that runs is ExLlamaV2's own
Python, unchanged, from the directory that holds the package. Being a process of its own, this may put stand-ins where
other code would trip over them; ``exllamav2_peer.py`` starts it.

Without flash-attn, ExLlamaV2's measuring and converting lack a causal mask. A stand-in for flash-attn has them take
the path that they take on a card.
"""

from __future__ import annotations

import importlib
import itertools
import math
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["CpuForCuda", "Extension", "causal_attention", "main", "spread_rows"]

_CHUNK_ELEMENTS = 1 << 17
"""Weights whose errors are summed at a time: 512 KiB in float32, so that temporaries stay in the cache."""

_PANEL_ROWS = 32
"""Rows whose error feedback to later rows of the group is put off and done as one matrix product."""

_PROPOSALS_AT_ONCE = 20_000
"""Random proposals of the annealer drawn at a time."""

_HALF_MAX = 65504.0

# Not installed everywhere, and needed by nothing that is called here: data frames, progress bars, images, servers.
_OPTIONAL_MODULES = (
    "pandas",
    "fastparquet",
    "rich",
    "rich.progress",
    "PIL",
    "PIL.Image",
    "websockets",
    "pygments",
    "ninja",
)


class _QMatrix:
    """A quantized matrix as the loader gets it.

    Attributes:
        dense: What it decodes to, float16, shape (in, out).
        bias: Float16, shape (out,), or None.
    """

    def __init__(self, dense: Tensor, bias: Tensor | None) -> None:
        self.dense = dense
        self.bias = bias


class Extension(ModuleType):
    """Stands for the module ``exllamav2_ext``.

    Arguments have the order that ExLlamaV2 passes them in. Tensors marked as output are filled in place.
    """

    def __init__(self, seed: int) -> None:
        """Start without matrices.

        Args:
            seed: Seed of the annealer, which takes its own from the system in ExLlamaV2.
        """
        super().__init__("exllamav2_ext")
        self._matrices: dict[int, _QMatrix] = {}
        self._handles: Iterator[int] = itertools.count(1)
        self._generator = np.random.default_rng(seed)

    # --- scales and codes -------------------------------------------------------------------------------------------

    def quantize_err(
        self,
        weights: Tensor,
        errors: Tensor,
        scale: Tensor,
        qzero: float,
        maxq: float,
        norm: float,
        min_p: float,
        max_p: float,
        p_grid: int,
    ) -> None:
        """Add up ``|rounded - weight| ** norm`` over a group for every common factor of its scales.

        Args:
            weights: The group, float32, shape (rows, columns).
            errors: Output, float32, shape (p_grid + 1, 128). Readers add up its columns: all goes into the first.
            scale: Scales before the factor, float32, shape (columns,).
            qzero: Code of zero.
            maxq: Largest code.
            norm: The exponent.
            min_p: Smallest factor.
            max_p: Largest factor.
            p_grid: Number of steps from the one to the other.
        """
        steps = torch.arange(p_grid + 1, dtype=torch.float32) / p_grid
        factors = (min_p * (1 - steps) + max_p * steps)[:, None, None]
        rows, columns = weights.shape
        width = max(1, _CHUNK_ELEMENTS // rows)
        with torch._C.DisableTorchFunction():
            for first in range(0, columns, width):
                chunk = weights[:, first : first + width].contiguous()
                negative, base = -chunk, scale[first : first + width]
                together = max(1, _CHUNK_ELEMENTS // chunk.numel())
                buffers = torch.empty((2, together, *chunk.shape))
                for index in range(0, p_grid + 1, together):
                    scaled = base * factors[index : index + together]
                    error, power = buffers[:, : len(scaled)]
                    torch.div(chunk, scaled, out=error)
                    error.round_().clamp_(-qzero, maxq - qzero)
                    torch.addcmul(negative, error, scaled, out=error).abs_()
                    errors[index : index + together, 0] += _sums_of_powers(error, power, norm)

    def quantize_range(
        self,
        quant: Tensor,
        scale: Tensor,
        codes: Tensor,
        qzero: float,
        maxq: float,
        hessian_inv: Tensor,
        weights: Tensor,
        error: Tensor,
        first: int,
        end: int,
    ) -> None:
        """Round the rows of a group one after another, feeding each one's error back to all rows after it.

        ExLlamaV2 updates the rest of the group after every row and the rest of the matrix after the group. Here rows
        of the group beyond a panel wait for its end: the same sums in another order.

        Args:
            quant: Output, the decoded weights, float32, shape (rows, columns); only the group's rows.
            scale: Float16 values in float32, shape (columns,).
            codes: Output, int16, shape (rows, columns), or a meta tensor if codes are not wanted.
            qzero: Code of zero.
            maxq: Largest code.
            hessian_inv: Upper Cholesky factor of the inverse Hessian, float32, shape (rows, rows).
            weights: Changed in place: rows after the group get its errors fed back; the group's rows are not read
                again. Float32, shape (rows, columns).
            error: Output, errors over the diagonal of ``hessian_inv``, float32, shape (rows, columns).
            first: First row of the group.
            end: Row after its last.
        """
        with torch._C.DisableTorchFunction():
            zero_scale = scale == 0
            any_zero_scale = bool(zero_scale.any())
            code = torch.empty_like(scale)
            for start in range(first, end, _PANEL_ROWS):
                stop = min(start + _PANEL_ROWS, end)
                for row in range(start, stop):
                    weight = weights[row]
                    torch.div(weight, scale, out=code)
                    if any_zero_scale:
                        # Zero by zero. The kernel's clamp makes its upper bound of NaN.
                        code.nan_to_num_(nan=maxq - qzero, posinf=math.inf, neginf=-math.inf)
                    code.round_().clamp_(-qzero, maxq - qzero)
                    if not codes.is_meta:
                        codes[row] = code + qzero
                    # Exact in float32: 8 bits times 11. So this rounds once, as the half product does.
                    decoded = (code * scale).half()
                    quant[row] = decoded
                    residual = error[row]
                    torch.sub(weight, decoded, out=residual)
                    residual.div_(hessian_inv[row, row])
                    if row + 1 < stop:
                        weights[row + 1 : stop].addr_(hessian_inv[row, row + 1 : stop], residual, alpha=-1)
                if stop < end:
                    weights[stop:end].addmm_(hessian_inv[start:stop, stop:end].T, error[start:stop], alpha=-1)
            weights[end:].addmm_(hessian_inv[first:end, end:].T, error[first:end], alpha=-1)

    def quantize_range_inplace(
        self, weights: Tensor, scale: Tensor, codes: Tensor, qzero: float, maxq: float, first: int, end: int
    ) -> None:
        """Round the rows of a group to nearest, in place. ExLlamaV2 does so with heads of over 1e9 weights.

        Args:
            weights: Float32, shape (rows, columns); the group's rows become what their codes decode to.
            scale: Float16 values in float32, shape (columns,).
            codes: Output, int16, shape (rows, columns).
            qzero: Code of zero.
            maxq: Largest code.
            first: First row of the group.
            end: Row after its last.
        """
        code = (weights[first:end] / scale).nan_to_num_(nan=maxq - qzero).round_().clamp_(-qzero, maxq - qzero)
        codes[first:end] = code + qzero
        weights[first:end] = (code * scale).half()

    # --- the file ---------------------------------------------------------------------------------------------------

    def pack_rows_4(self, scale_codes: Tensor, packed: Tensor) -> None:
        """Pack scale codes 1 to 16, eight to a word, less one; 0, which pads, fills its place and those above it.

        Args:
            scale_codes: Int16, shape (groups, columns).
            packed: Output, int32, shape (groups, columns / 8).
        """
        codes = (scale_codes.numpy() - np.int16(1)).view(np.uint16).astype(np.uint32)
        words = np.zeros(packed.shape, np.uint32)
        for place in range(8):
            words |= codes[:, place::8] << np.uint32(4 * place)
        packed.copy_(torch.from_numpy(words.view(np.int32)))

    def pack_columns(self, codes: Tensor, packed: Tensor, bits: int) -> None:
        """Pack the codes of a group: each column is a stream of bits, the first code lowest.

        Args:
            codes: Int16, shape (rows, columns).
            packed: Output, int32, shape (rows * bits / 32, columns).
            bits: Bits of a code.
        """
        words = np.zeros(packed.shape, np.uint32)
        for row, code in enumerate(codes.numpy().astype(np.uint32)):
            word, shift = divmod(row * bits, 32)
            words[word] |= code << np.uint32(shift)
            if shift + bits > 32:
                words[word + 1] |= code >> np.uint32(32 - shift)
        packed.copy_(torch.from_numpy(words.view(np.int32)))

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
            perm: For each stored row its input feature, as 16 bits.
            invperm: The inverse, not used.
            scale_words: ``q_scale``, int32, shape (groups, columns / 8).
            scale_max: ``q_scale_max`` divided by 256, float16, shape (groups,).
            groups: ``q_groups``, int16: width and first word row of every group.
            others: The group map, three tensors of another format, the bias, scratch memory and its size.

        Returns:
            A handle.
        """
        packed = words.numpy().view(np.uint32)
        columns = packed.shape[1]
        nibbles = np.arange(8, dtype=np.uint32) * np.uint32(4)
        scale_codes = (scale_words.numpy().view(np.uint32)[:, :, None] >> nibbles) & np.uint32(15)
        steps = torch.from_numpy(scale_codes.reshape(len(scale_codes), -1).astype(np.float32)) + 1
        scales = (steps.square() * scale_max.float()[:, None]).half().float()
        features = torch.from_numpy(perm.numpy().view(np.uint16).astype(np.int64))
        dense = torch.empty((len(features), columns), dtype=torch.half)
        table = groups.tolist()
        stored_row = 0
        for group in range(len(table) // 2):
            bits, start = table[2 * group : 2 * group + 2]
            stop = table[2 * group + 3] if 2 * group + 3 < len(table) else len(packed)
            codes = torch.from_numpy(_unpack(packed[start:stop], bits).astype(np.float32))
            decoded = ((codes - 2 ** (bits - 1)) * scales[group]).half()
            dense[features[stored_row : stored_row + len(decoded)]] = decoded
            stored_row += len(decoded)
        bias = others[4]
        handle = next(self._handles)
        self._matrices[handle] = _QMatrix(dense, None if bias.is_meta else bias)
        return handle

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
            sin: Float16, shape (1, 1, positions, features), its halves alike.
            cos: The same of the cosine.
            past_tokens: Position of the first token.
            heads: Number of heads.
            head_features: Features of a head.
            offsets: A meta tensor: further offsets are for batches of prompts.
            neox: Whether the two halves of a head are rotated against each other, as in Llama.
        """
        if not neox or not offsets.is_meta or sin.shape[-1] != states.shape[-1]:
            raise NotImplementedError("rope_: only full rotation of two halves without offsets is known here")
        tokens, half = states.shape[1], states.shape[-1] // 2
        sine = sin[0, 0, past_tokens : past_tokens + tokens, None, :half].float()
        cosine = cos[0, 0, past_tokens : past_tokens + tokens, None, :half].float()
        left, right = states[..., :half].float(), states[..., half:].float()
        states[..., :half] = left * cosine - (right * sine).half()
        states[..., half:] = right * cosine + (left * sine).half()

    # --- the strategy -----------------------------------------------------------------------------------------------

    def sim_anneal(
        self,
        slots: Sequence[Sequence[tuple[int, float]]],
        max_cost: int,
        initial_temp: float,
        cooling_factor: float,
        min_temp: float,
        iterations: int,
        norm: float,
    ) -> tuple[list[tuple[int, float]], list[int], float, int, float]:
        """Choose an option for each slot by simulated annealing.

        A proposal puts a random option into a random slot. It is taken if the cost stays within the budget, and the
        sum falls or luck has it. (ExLlamaV2 also means to take cheaper ones while over the budget, by a comparison of
        an unsigned number with zero that is never true.)

        Args:
            slots: Cost in bits and error of each option of each slot; all start with the first.
            max_cost: The budget in bits.
            initial_temp: Temperature of the first round.
            cooling_factor: Its factor from round to round.
            min_temp: Temperature to end at.
            iterations: Proposals in a round.
            norm: Exponent of errors in their sum.

        Returns:
            The options, their indices, the sum, the cost and the largest error.
        """
        sizes = np.array([len(slot) for slot in slots])
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        errors = np.array([error for slot in slots for _, error in slot], np.float32)
        energies = iter((errors ** np.float32(norm)).tolist())
        table = [
            (slot, index, cost, next(energies))
            for slot, options in enumerate(slots)
            for index, (cost, _) in enumerate(options)
        ]
        rounds = int(math.log(min_temp / initial_temp) / math.log(cooling_factor))
        temperatures = initial_temp * cooling_factor ** np.arange(rounds)
        chosen = [0] * len(slots)
        costs = [options[0][0] for options in slots]
        slot_energies = [table[start][3] for start in starts]
        room = max_cost - sum(costs)
        rounds_at_once = max(1, _PROPOSALS_AT_ONCE // iterations)
        for first in range(0, rounds, rounds_at_once):
            temperature = np.repeat(temperatures[first : first + rounds_at_once], iterations)
            slot_of = self._generator.integers(0, len(slots), len(temperature))
            proposals = (starts[slot_of] + self._generator.integers(0, sizes[slot_of])).tolist()
            # A uniform number is below exp(-rise / temperature) exactly if the rise is below this one.
            rises = (temperature * self._generator.standard_exponential(len(temperature))).tolist()
            for (slot, index, cost, energy), rise in zip(map(table.__getitem__, proposals), rises, strict=True):
                growth = cost - costs[slot]
                if growth <= room and energy - slot_energies[slot] < rise:
                    room -= growth
                    chosen[slot] = index
                    costs[slot] = cost
                    slot_energies[slot] = energy
        options_chosen = [options[index] for options, index in zip(slots, chosen, strict=True)]
        return options_chosen, chosen, sum(slot_energies), sum(costs), max(error for _, error in options_chosen)


def _sums_of_powers(error: Tensor, power: Tensor, norm: float) -> Tensor:
    # Of each matrix in a stack the sum of error ** norm; both stacks are used up. pow() would take most of the time,
    # and ExLlamaV2's norm is 3.5.
    if norm == 3.5:
        torch.sqrt(error, out=power).mul_(error)
        return power.mul_(error.square_()).sum((1, 2))
    return torch.pow(error, norm, out=power).sum((1, 2))


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


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """Stand for ``flash_attn_func``, computed in float32.

    Args:
        query: Float16, shape (batch, tokens, heads, features).
        key: Shape (batch, tokens, key heads, features).
        value: Shape of ``key``.
        causal: Whether tokens see only themselves and those before.
        softmax_scale: Factor of the scores; None for one over the root of the features.

    Returns:
        Shape and dtype of ``query``.
    """
    groups = query.shape[2] // key.shape[2]
    heads = [part.float().transpose(1, 2) for part in (query, key, value)]
    heads[1:] = [part.repeat_interleave(groups, dim=1) for part in heads[1:]]
    output = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=causal, scale=softmax_scale)
    return output.transpose(1, 2).to(query.dtype)


class CpuForCuda(TorchFunctionMode):
    """Reads every CUDA device as the CPU, and multiplies float16 matrices in float32.

    Moving a tensor to a CUDA device makes a copy even so: ExLlamaV2 goes on to change what it moved and expects the
    original to stay. CPUs without float16 arithmetic are over a hundred times slower at float16 products; results
    are rounded to float16, as a card does that adds up in float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with other arguments where a device or the dtype asks for it."""
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS and args[0].dtype == args[1].dtype == torch.half and not kwargs:
            return _PRODUCTS[func](*(arg.float() for arg in args)).half()
        if func is torch.device:
            # A bare number means an accelerator, and there is none to ask for.
            return torch.device(f"cuda:{args[0]}") if isinstance(args[0], int) else torch.device(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0].clone()
        if func is Tensor.to and any(map(_is_cuda, [*args[1:], kwargs.get("device")])):
            args = [args[0], *("cpu" if _is_cuda(arg) else arg for arg in args[1:])]
            kwargs["copy"] = True
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.matmul: torch.matmul,
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Absent(ModuleType):
    # A module that is not installed: whatever is imported from it is an empty class.
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def spread_rows(tokens: Tensor, rows: int) -> Tensor:
    """Return some of the rows, evenly spread from the first to the last, so that all kinds of text are in them."""
    return tokens[torch.linspace(0, len(tokens) - 1, rows).round().long()]


def _install(package_parent: Path, seed: int) -> None:
    """Put the stand-ins in place and import what the converter is made of."""
    for name in _OPTIONAL_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _Absent(name)
    flash_attn = ModuleType("flash_attn")
    vars(flash_attn).update(
        __version__="2.7.4",
        flash_attn_func=causal_attention,
        flash_attn_varlen_func=None,
        flash_attn_with_kvcache=None,
    )
    sys.modules["flash_attn"] = flash_attn
    sys.modules["flash_attn_2_cuda"] = ModuleType("flash_attn_2_cuda")
    sys.modules["exllamav2_ext"] = Extension(seed)

    for name in ("Stream", "device", "set_device", "set_stream", "stream", "synchronize", "empty_cache"):
        # One function for each: PyTorch keeps a table of its functions, and none may stand in it twice.
        setattr(torch.cuda, name, lambda *_arguments, **_options: nullcontext())
    sys.path.insert(0, str(package_parent))
    threads = torch.get_num_threads()
    tokenize: Any = importlib.import_module("exllamav2.conversion.tokenize")
    importlib.import_module("exllamav2.conversion.measure")
    # Importing these limits PyTorch to one thread, and has Ctrl-C ask a question.
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenize.get_tokens = _calibration_rows


def _calibration_rows(rows: int, row_tokens: int, path: str, _tokenizer: Any) -> Tensor:
    # Stands for the function that cuts rows of a Parquet file's text.
    tokens = load_file(path)["input_ids"]
    if rows > len(tokens) or row_tokens != tokens.shape[1]:
        raise ValueError(f"{path}: holds {tuple(tokens.shape)} tokens, asked for {rows} rows of {row_tokens}")
    return spread_rows(tokens, rows)


def main(arguments: Sequence[str]) -> None:
    """Run ExLlamaV2's converter.

    Args:
        arguments: The directory that holds the package, a seed, and the converter's own options.
    """
    package_parent, seed, *options = arguments
    _install(Path(package_parent), int(seed))
    sys.argv = ["convert_exl2", *options]
    with CpuForCuda():
        runpy.run_module("exllamav2.conversion.convert_exl2", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
