"""What only GGUF can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..options import Conflict, Effort, FormatOptions, check_effort, effort_option, option, read_texts
from .ggml.speed import SLOW_TYPES
from .ggml.types import TYPES
from .llama_cpp.mixtures import mixture
from .plan.plan import TypeOverride

__all__ = ["CONFLICTS", "GgufOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions(FormatOptions):
    """Options of a GGUF output.

    Attributes:
        overrides: Types that tensors must have, or may.
        backend: What will run the file: a plan does not choose types that are slow there, unless ``overrides`` ask for
            them. None chooses from all.
        feedback: Whether linears are rounded with error feedback, block after block on what the quantized blocks before
            give them; otherwise by ggml alone, as llama-quantize does, in seconds. The plan is the same.
        effort: ``high`` fits factors of the blocks' scales to the original's predictions in the end (see
            ``convert.numerics``), ``normal`` does not.
        mixture: One of llama.cpp's fixed mixtures, such as ``Q4_K_M``, instead of a target: byte for byte what
            llama-quantize makes; nothing is measured.
        imatrix: With ``mixture``: an importance matrix in either of llama.cpp's formats, or a measurement of the model.
        llama_cpp: A checkout of llama.cpp, whose converter is taken; None for the one that is fetched from PyPI.
        base: The model as an unquantized GGUF file, here or on the Hub (``ORG/NAME:BF16``); None converts it.
        split_max_size: Most bytes of tensors in one file. A larger model is written in parts, as llama.cpp's gguf-split
            does; the Hub takes no file of more than 50 GB.
        card: Whether a model card ``NAME.README.md`` is written beside the file.
    """

    overrides: tuple[TypeOverride, ...] = option(
        "--override",
        default=(),
        repeatable=True,
        metavar="PATTERN=WHAT",
        parse=TypeOverride.parse,
        commands=("plan", "quantize"),
        help="Fix the type of tensors whose names match, or the types to choose from: 'blk.0.*=Q8_0', '*=Q4_K,Q6_K'. "
        "Repeatable; the last match counts.",
    )
    backend: str | None = option(
        "--backend",
        default=None,
        choices=tuple(SLOW_TYPES),
        commands=("plan", "quantize"),
        help="Backend that will run the file: types that are slow on it are not used, except through --override.",
    )
    feedback: bool = option(
        "--no-feedback",
        default=True,
        kind="negated",
        help="Let ggml round, without error feedback: seconds, not minutes, but two to three times the KL divergence.",
    )
    effort: Effort = effort_option()
    mixture: str | None = option(
        "--type",
        default=None,
        implies=True,
        help="Make one of llama.cpp's fixed mixtures, such as Q4_K_M, exactly as llama-quantize does; no measuring.",
    )
    imatrix: Path | None = option(
        "--imatrix",
        default=None,
        kind="file",
        help="With --type: importance matrix to use.",
    )
    llama_cpp: Path | None = option(
        "--llama-cpp",
        default=None,
        kind="directory",
        recorded=False,
        commands=("measure", "quantize"),
        help="Checkout of llama.cpp to take the converter from.  [default: fetched from PyPI]",
    )
    base: Path | str | None = option(
        "--base",
        default=None,
        kind="model",
        recorded=False,
        commands=("measure", "quantize"),
        help="Unquantized GGUF file of MODEL, or ORG/NAME:BF16 on the Hub, to use instead of converting it.",
    )
    split_max_size: int = option(
        "--split-max-size",
        default=48_000_000_000,
        kind="size",
        help="Maximum size of one file. A larger model is split: NAME-00001-of-00003.gguf and so on.",
    )
    card: bool = option("--card", default=False, kind="flag", help="Also write a model card, NAME.README.md.")

    @property
    def measures(self) -> bool:
        """Whether types are chosen from a measurement: not those of a mixture."""
        return self.mixture is None

    @property
    def equalizes(self) -> bool:
        """Whether channels may be equalized: not those of a file that is given, and not for a mixture."""
        return self.measures and self.base is None

    def weighted_by(self, measurement: Path) -> GgufOptions:
        """Return the options of a mixture that is made with the importances of a measurement, unless it has others."""
        return self if self.mixture is None or self.imatrix is not None else replace(self, imatrix=measurement)

    @property
    def label(self) -> str | None:
        """The mixture."""
        return None if self.mixture is None else mixture(self.mixture).name

    @property
    def choices(self) -> tuple[TypeOverride, ...]:
        """What plans are restricted by: ``backend``, and ``overrides`` after it, as the last that matches counts."""
        slow = SLOW_TYPES[self.backend] if self.backend is not None else ()
        if not slow:
            return self.overrides
        fast = tuple(
            kind for kind in TYPES.values() if kind.name not in slow and (kind.quantized or kind.name == "F16")
        )
        return (TypeOverride("*", fast), *self.overrides)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        read_texts(self)
        if self.backend is not None and self.backend not in SLOW_TYPES:
            raise ConfigError(
                f"backend: not known. Got {self.backend!r}. Expected one of {', '.join(SLOW_TYPES)}. Choose another."
            )
        check_effort(self.effort)
        if self.effort == "high" and not (self.measures and self.feedback):
            raise ConfigError(
                "effort: high goes with error feedback only. Got it where ggml alone rounds. Leave --effort out, or "
                "--type and --no-feedback."
            )
        if self.imatrix is not None and self.mixture is None:
            raise ConfigError("imatrix: goes with a mixture only. Otherwise the measurement says what matters.")


def _given(name: str) -> Any:
    return lambda options: bool(options[name])


def _only_writes(options: Mapping[str, Any]) -> bool:
    return bool(options["measurement"] and options["no_feedback"] and options["no_eval"])


def _mixture_without_card(options: Mapping[str, Any]) -> bool:
    return bool(options["type"]) and not options["card"]


CONFLICTS: Mapping[str, tuple[Conflict, ...]] = {
    "quantize": (
        Conflict(
            "with --type",
            _given("type"),
            (
                *("override", "backend", "no_feedback", "effort"),
                *("calibration", "column", "chat_template", "rows"),
                *("row_tokens", "seed", "damping", "moe_calibrate_all", "equalize", "force_eval_text"),
            ),
            "a mixture of llama.cpp is neither measured nor planned",
        ),
        Conflict(
            "with --imatrix",
            lambda options: bool(options["type"] and options["imatrix"]),
            ("measurement",),
            "the matrix says what matters",
        ),
        Conflict("without --type", lambda options: not options["type"], ("imatrix",), "the measurement says it all"),
        Conflict("with --type and without --card", _mixture_without_card, ("base_model",), "the card names it"),
        Conflict(
            "with --type and --no-eval",
            lambda options: bool(options["type"] and options["no_eval"]),
            ("device", "offload_dir"),
            "nothing is run",
        ),
        Conflict(
            "with --measurement, --no-feedback and --no-eval", _only_writes, ("device", "offload_dir"), "nothing is run"
        ),
        Conflict("with --no-feedback", _given("no_feedback"), ("effort",), "ggml alone rounds"),
        Conflict("with --base", _given("base"), ("llama_cpp",), "nothing is converted"),
        Conflict("with --base", _given("base"), ("equalize",), "its channels are the original's"),
    )
}
