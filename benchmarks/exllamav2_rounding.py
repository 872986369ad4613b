"""What ExLlamaV2's converter needs of its compiled extension, in PyTorch and NumPy on the CPU.

Written anew after the semantics of its sources (0.3.2, exllamav2_ext): float32 where they compute in float32, rounded
to float16 where they round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["ConverterFunctions"]

_CHUNK_ELEMENTS = 1 << 17
"""Weights whose errors are summed at a time: 512 KiB in float32, so that temporaries stay in the cache."""

_PANEL_ROWS = 32
"""Rows whose error feedback to later rows of the group is put off and done as one matrix product."""

_PROPOSALS_AT_ONCE = 20_000
"""Random proposals of the annealer drawn at a time."""


class ConverterFunctions:
    """Functions of the module ``exllamav2_ext`` that rounding, packing and choosing widths call.

    Arguments have the order that ExLlamaV2 passes them in. Tensors marked as output are filled in place.
    """

    def __init__(self, seed: int) -> None:
        """Start the annealer.

        Args:
            seed: Its seed, which it takes from the system in ExLlamaV2.
        """
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

    # --- packing ---------------------------------------------------------------------------------------------------

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
