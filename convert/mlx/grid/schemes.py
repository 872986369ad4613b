"""What a module of MLX may be quantized to: codes of some bits, and a scale and a bias for every group. Needs no torch.

Source: ``mlx.core.quantize`` of MLX 0.32 (mode "affine").
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BITS", "GROUPS", "SCHEMES", "Scheme", "scheme_named"]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
"""Widths of codes and sizes of groups that MLX has kernels for."""


@dataclass(frozen=True, slots=True, order=True)
class Scheme:
    """One way to quantize a module.

    Attributes:
        bits: Width of a code.
        group_size: G, input channels of a group.
    """

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """As plans and overrides have it: ``4g64``."""
        return f"{self.bits}g{self.group_size}"

    def fits(self, channels: int) -> bool:
        """Whether K input channels are a whole number of groups."""
        return channels % self.group_size == 0

    def row_bytes(self, channels: int, scale_bytes: int = 2) -> int:
        """Return the bytes of an output: of its codes, and of a scale and a bias for every group."""
        return channels * self.bits // 8 + 2 * scale_bytes * (channels // self.group_size)

    def bits_per_weight(self, scale_bytes: int = 2) -> float:
        """Return the bits of a weight, scales and biases included."""
        return self.bits + 16 * scale_bytes / self.group_size


SCHEMES = tuple(sorted((Scheme(bits, group) for bits in BITS for group in GROUPS), reverse=True))
"""All of them, the largest first."""

_NAMED = {scheme.name: scheme for scheme in SCHEMES}


def scheme_named(name: str) -> Scheme | None:
    """Return a scheme by its name; None if there is none of that name."""
    return _NAMED.get(name)
