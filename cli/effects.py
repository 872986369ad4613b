"""Options that have no effect beside others, for all commands: a table, and the one place that refuses them.

``--dry-run`` and ``--no-eval`` are not in it: they leave a part of a run out, and the rest of its command may stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

__all__ = ["MODES", "Mode", "is_gguf_output", "refuse_without_effect"]

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to use a command, and the options that have no effect then.

    Attributes:
        when: What it is called in a message, after "has no effect".
        applies: Whether a command's options ask for it.
        options: Names of the parameters without effect.
        reason: Goes on after a colon.
    """

    when: str
    applies: Callable[[Options], bool]
    options: tuple[str, ...]
    reason: str


def is_gguf_output(options: Options) -> bool:
    """Return whether the options of ``quantize`` ask for a GGUF file: by ``--format``, else by OUTPUT's ending."""
    return bool((options["output_format"] or options["output"].suffix[1:].lower()) == "gguf")


def _given(name: str) -> Callable[[Options], bool]:
    return lambda options: bool(options[name])


def _missing(name: str) -> Callable[[Options], bool]:
    return lambda options: not options[name]


def _saved_rows(options: Options) -> bool:
    return str(options["calibration"]).endswith(".safetensors")


def _is_plain(text: str | None) -> bool:
    return str(text).endswith(".txt")


def _one_file_without_card(options: Options) -> bool:
    return is_gguf_output(options) and not options["card"] and len(options["bpw"] or ()) < 2


def _only_converts(options: Options) -> bool:
    return bool(options["mixture"] and options["no_eval"])


def _only_writes(options: Options) -> bool:
    return bool(is_gguf_output(options) and options["measurement"] and options["no_feedback"] and options["no_eval"])


def _only_page(options: Options) -> bool:
    return options["html"] is not None and options["bpw"] is None and options["max_size"] is None


_TEXT = ("calibration", "column", "chat_template", "rows", "row_tokens", "seed")
_MEASURING = (*_TEXT, "group_size", "damping", "moe_calibrate_all")
_RUNNING = ("device", "offload_dir")

_SAVED_ROWS = Mode(
    "with a saved calibration set", _saved_rows, ("column", "chat_template", "rows", "row_tokens"), "it holds the rows"
)
_PLAIN_ROWS = Mode(
    "with a .txt file", lambda options: _is_plain(options["calibration"]), ("column", "chat_template"), "it is all text"
)
_NO_TEXT = Mode(
    "without --calibration", _missing("calibration"), ("column", "chat_template"), "the built-in text is plain"
)

MODES: Mapping[str, tuple[Mode, ...]] = {
    "quantize": (
        Mode(
            "with an EXL2 output",
            lambda options: not is_gguf_output(options),
            ("mixture", "imatrix", "no_feedback", "llama_cpp", "card"),
            "for GGUF only, that is OUTPUT.gguf or --format gguf",
        ),
        Mode(
            "with a GGUF output",
            is_gguf_output,
            ("head_bits", "keep_fp16", "effort", "cache_bits", "shard_size", "dry_run", "force"),
            "for EXL2 only",
        ),
        Mode(
            "with --type",
            _given("mixture"),
            ("measurement", "override", "no_feedback", *_MEASURING, "work_dir", "force_eval_text"),
            "a mixture of llama.cpp is neither measured nor planned",
        ),
        Mode("with --type", _given("mixture"), ("card", "base_model"), "write the card with `bpwise card` afterwards"),
        Mode(
            "with --measurement",
            _given("measurement"),
            _MEASURING,
            "it brings its own calibration rows, group size and damping",
        ),
        _SAVED_ROWS,
        _PLAIN_ROWS,
        _NO_TEXT,
        Mode("without --vram", _missing("vram"), ("context", "cache_bits"), "only the memory of a GPU holds a cache"),
        Mode("without --type", _missing("mixture"), ("imatrix",), "otherwise the measurement says what matters"),
        Mode("without --card", _one_file_without_card, ("base_model",), "it is named in the card"),
        Mode("with --type and --no-eval", _only_converts, _RUNNING, "nothing is run"),
        Mode("with --measurement, --no-feedback and --no-eval", _only_writes, _RUNNING, "nothing is run"),
    ),
    "measure": (_SAVED_ROWS, _PLAIN_ROWS, _NO_TEXT),
    "plan": (
        Mode(
            "with --format gguf",
            lambda options: options["output_format"] == "gguf" and not options["html"],
            ("head_bits", "keep_fp16"),
            "the head is a tensor like any other",
        ),
        Mode(
            "without --bpw or --max-size",
            _only_page,
            ("output", "output_format"),
            "the page shows all sizes and formats",
        ),
    ),
    "eval": (
        Mode(
            "with --engine llama.cpp",
            lambda options: options["engine"] == "llama.cpp",
            ("tasks", "needle", "dtype", *_RUNNING, "cache_dir", "no_cache"),
            "llama.cpp runs the files as they are, on the CPU",
        ),
        Mode(
            "without --engine llama.cpp",
            lambda options: options["engine"] != "llama.cpp",
            ("base", "llama_cpp"),
            "Transformers needs neither",
        ),
        Mode("with --no-cache", _given("no_cache"), ("cache_dir",), "nothing is kept"),
        Mode("without --text", _missing("text"), ("column",), "the built-in text is plain"),
        Mode("with a .txt file", lambda options: _is_plain(options["text"]), ("column",), "it is all text"),
        Mode(
            "with --text",
            lambda options: bool(options["text"]) and not options["needle"],
            ("seed",),
            "its rows follow each other from its start",
        ),
        Mode(
            "without --tasks",
            _missing("tasks"),
            ("num_fewshot", "limit", "include_path", "batch_size", "apply_chat_template"),
            "no benchmarks are run",
        ),
        Mode("without --needle", _missing("needle"), ("needle_samples",), "no needles are looked for"),
    ),
    "dequantize": (
        Mode(
            "with an EXL2 directory", lambda options: options["model"].is_dir(), ("original",), "it has its tokenizer"
        ),
    ),
}
"""The modes of every command that has some."""


def refuse_without_effect(context: click.Context) -> None:
    """Refuse options that a user gave to a command though they have no effect beside the others.

    Raises:
        click.UsageError: There are some; the message names them all.
    """
    flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    for mode in MODES.get(str(context.command.name), ()):
        if not mode.applies(context.params):
            continue
        idle = [
            flags[name] for name in mode.options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if idle:
            have, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            raise click.UsageError(
                f"{' and '.join(idle)} {have} no effect {mode.when}: {mode.reason}. Leave {them} out.", context
            )
