"""What only MLX can be asked."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from ..options import FormatOptions, option, read_texts
from .plan.plan import Override

__all__ = ["MlxOptions"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxOptions(FormatOptions):
    """Options of an MLX output.

    Attributes:
        overrides: Schemes that modules may have.
        shard_bytes: Largest output file, in bytes.
    """

    overrides: tuple[Override, ...] = option(
        "--override",
        default=(),
        repeatable=True,
        metavar="PATTERN=WHAT",
        parse=Override.parse,
        commands=("plan", "quantize"),
        help="Allow only these widths in modules whose names match: '*.down_proj=6,8', '*=4g64', or 16 to leave them "
        "as they are. Repeatable; the last match counts.",
    )
    shard_bytes: int = option(
        "-ss", "--shard-size", default=5120 * _MIB, kind="mebibytes", help="Largest output file in MiB."
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        read_texts(self)
        if self.shard_bytes <= 0:
            raise ConfigError(
                f"shard_bytes: not usable. Got {self.shard_bytes}. Expected a positive number. Choose another."
            )
