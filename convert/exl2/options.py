"""What only EXL2 can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ..options import Conflict, Effort, FormatOptions, check_effort, effort_option, option, read_texts
from .file.layout import ROW_MULTIPLE
from .plan.problem import AUTO, HEAD_BITS, HeadBits, WidthOverride, check_head_bits
from .plan.vram import CACHE_BITS

__all__ = ["CONFLICTS", "Exl2Options"]

_MIB = 1 << 20

_SHARD_BYTES = 8192 * _MIB
_HEAD_BITS: HeadBits = 6
"""Both as the official converter."""


def _head_bits(text: str) -> HeadBits:
    return "auto" if text == AUTO else int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exl2Options(FormatOptions):
    """Options of an EXL2 output.

    Attributes:
        head_bits: Bits of the output head: 2, 3, 4, 5, 6, 8, 16 for unquantized, or ``auto``: see ``make_exl2_plan``.
            None for the usual: see ``head``.
        overrides: Widths that linears may have: see ``make_exl2_plan``.
        keep_fp16: Shell patterns of linears that stay in float16: see ``make_exl2_plan``.
        effort: ``high`` fits the decoder's scales to the original's predictions in the end (see ``convert.numerics``),
            ``normal`` does not.
        cache_bits: 16 for a float16 cache, or ExLlamaV2's caches of 8, 6 or 4 bits: which the context is kept in.
        group_size: Input channels that share a width and a scale; a multiple of 32.
        shard_bytes: Largest output file, in bytes.
        force: Whether to quantize a model that EXL2 readers do not know, or would compute otherwise.
    """

    head_bits: HeadBits | None = option(
        "-hb",
        "--head-bits",
        default=None,
        choices=(*map(str, HEAD_BITS), AUTO),
        parse=_head_bits,
        commands=("plan", "quantize"),
        help="Bits of the output head. 16 leaves it unquantized; auto lets it share --bpw with the decoder.  "
        "[default: 6]",
    )
    overrides: tuple[WidthOverride, ...] = option(
        "--override",
        default=(),
        repeatable=True,
        metavar="PATTERN=WHAT",
        parse=WidthOverride.parse,
        commands=("plan", "quantize"),
        help="Allow only these bits in linears whose names match: 6 exactly, 5: at least, :6 at most, 4:6 between. "
        "Repeatable; the last match counts.",
    )
    keep_fp16: tuple[str, ...] = option(
        "--keep-fp16",
        default=(),
        repeatable=True,
        metavar="PATTERN",
        commands=("plan", "quantize"),
        help="Leave these linears in float16: a whole attention block, a whole MLP ('*.0.mlp.*') or lm_head. They "
        "count in --bpw. Repeatable.",
    )
    effort: Effort = effort_option()
    cache_bits: int = option(
        "--cache-bits",
        default=16,
        choices=tuple(map(str, CACHE_BITS)),
        parse=int,
        commands=("plan", "quantize"),
        help="With --vram: precision of ExLlamaV2's context cache, in bits.",
    )
    group_size: int = option(
        "--group-size",
        default=32,
        kind="integer",
        commands=("measure", "quantize"),
        help="Number of input channels that share a bit width and a scale.",
    )
    shard_bytes: int = option(
        "-ss", "--shard-size", default=_SHARD_BYTES, kind="mebibytes", help="Maximum size of each output file, in MiB."
    )
    force: bool = option(
        "--force",
        default=False,
        kind="flag",
        help="Allow models that no reader runs, or that readers run differently.",
    )

    @property
    def head(self) -> HeadBits:
        """Bits of the output head: 6 unless others are asked for, or the whole size is the format's own."""
        return _HEAD_BITS if self.head_bits is None else self.head_bits

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        read_texts(self)
        check_head_bits(self.head)
        check_effort(self.effort)
        if self.cache_bits not in CACHE_BITS:
            raise ConfigError(
                f"cache_bits: not usable. Got {self.cache_bits}. Expected one of {CACHE_BITS}. Choose another."
            )
        if self.group_size < ROW_MULTIPLE or self.group_size % ROW_MULTIPLE:
            raise ConfigError(
                f"group_size: not usable. Got {self.group_size}. Expected a positive multiple of {ROW_MULTIPLE}."
                " Choose another."
            )
        if self.shard_bytes <= 0:
            raise ConfigError(
                f"shard_bytes: not usable. Got {self.shard_bytes}. Expected a positive number. Choose another."
            )


def _without_vram(options: Mapping[str, Any]) -> bool:
    return not options["vram"] and not options.get("html")  # a plan's page tells the memory of contexts


_NO_CACHE = Conflict("without --vram", _without_vram, ("cache_bits",), "only the memory of a GPU holds a cache")

CONFLICTS: Mapping[str, tuple[Conflict, ...]] = {
    "plan": (_NO_CACHE,),
    "quantize": (
        _NO_CACHE,
        Conflict(
            "with --measurement",
            lambda options: bool(options["measurement"]),
            ("group_size",),
            "it brings its own group size",
        ),
    ),
}
