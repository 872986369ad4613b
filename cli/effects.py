"""Options that have no effect beside others, for all commands: a table, and the one place that refuses them.

What formats say of their own options comes on top. ``--dry-run`` and ``--no-eval`` are not in the table: they leave a
part of a run out, and the rest of its command may stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..convert.options import Conflict
from ..tables import listed
from .format_options import chosen_formats, owners

__all__ = ["CONFLICTS", "refuse_without_effect"]

Options = Mapping[str, Any]


def _given(name: str) -> Callable[[Options], bool]:
    return lambda options: bool(options[name])


def _missing(name: str) -> Callable[[Options], bool]:
    return lambda options: not options[name]


def _saved_rows(options: Options) -> bool:
    return str(options["calibration"]).endswith(".safetensors")


def _is_plain(text: str | None) -> bool:
    return str(text).endswith(".txt")


def _only_page(options: Options) -> bool:
    return options["html"] is not None and all(options[name] is None for name in ("bpw", "max_size", "vram"))


def _in_engine(options: Options) -> bool:
    return str(options["engine"]) == "llama.cpp"


def _transformers(options: Options) -> bool:
    return not _in_engine(options)


def _writes_one_format(options: Options) -> bool:
    return options.get("html") is None  # a page of plans shows all formats


_TEXT = ("calibration", "column", "chat_template", "rows", "row_tokens", "seed")
_MEASURING = (*_TEXT, "damping", "moe_calibrate_all", "equalize")
_RUNNING = ("device", "offload_dir")

_SAVED_ROWS = Conflict(
    "with a saved calibration set",
    _saved_rows,
    ("column", "chat_template", "rows", "row_tokens"),
    "it already contains the sequences",
)
_PLAIN_ROWS = Conflict(
    "with a .txt file",
    lambda options: _is_plain(options["calibration"]),
    ("column", "chat_template"),
    "it has no columns",
)
_NO_TEXT = Conflict(
    "without --calibration", _missing("calibration"), ("column", "chat_template"), "the built-in text has no columns"
)

CONFLICTS: Mapping[str, tuple[Conflict, ...]] = {
    "quantize": (
        Conflict(
            "with --measurement",
            _given("measurement"),
            _MEASURING,
            "it has its own calibration text and damping",
        ),
        _SAVED_ROWS,
        _PLAIN_ROWS,
        _NO_TEXT,
        Conflict("without --vram", _missing("vram"), ("context",), "it only matters for GPU memory"),
        Conflict("without --dry-run", _missing("dry_run"), ("as_json",), "a run writes report.json instead"),
    ),
    "measure": (_SAVED_ROWS, _PLAIN_ROWS, _NO_TEXT),
    "plan": (
        Conflict(
            "without --bpw, --max-size or --vram",
            _only_page,
            ("saved", "output_format"),
            "the page shows all sizes and formats",
        ),
        Conflict("without --vram", _missing("vram"), ("context",), "it only matters for GPU memory"),
    ),
    "eval": (
        Conflict(
            "with --engine llama.cpp",
            _in_engine,
            ("tasks", "needle", "prompt", "domains", "answers", "dtype", *_RUNNING, "cache_dir", "no_cache"),
            "llama.cpp runs the files as they are, on the CPU",
        ),
        Conflict(
            "without --engine llama.cpp",
            _transformers,
            ("base", "llama_cpp"),
            "Transformers needs neither",
        ),
        Conflict("with --no-cache", _given("no_cache"), ("cache_dir",), "nothing is kept"),
        Conflict("without --text", _missing("text"), ("column",), "the built-in text has no columns"),
        Conflict("with a .txt file", lambda options: _is_plain(options["text"]), ("column",), "it has no columns"),
        Conflict(
            "with --text",
            lambda options: bool(options["text"]) and not options["needle"],
            ("seed",),
            "its rows follow each other from its start",
        ),
        Conflict(
            "without --tasks",
            _missing("tasks"),
            ("num_fewshot", "limit", "include_path", "batch_size", "apply_chat_template"),
            "no benchmarks are run",
        ),
        Conflict("without --needle", _missing("needle"), ("needle_samples",), "no needles are looked for"),
    ),
    "perplexity": (
        Conflict(
            "with --kl-divergence",
            _given("compare"),
            ("text", "window_tokens", "chunks"),
            "the base file holds the windows",
        ),
        Conflict("without --engine llama.cpp", _transformers, ("llama_cpp",), "Transformers does not need it"),
        Conflict("with --engine llama.cpp", _in_engine, _RUNNING, "llama.cpp runs the file as it is, on the CPU"),
    ),
    "dequantize": (
        Conflict(
            "with a model that is a directory",
            lambda options: Path(options["model"]).is_dir(),
            ("original",),
            "it has its tokenizer",
        ),
    ),
}
"""Conflicts of every command that has some; those of formats' own options stand with the formats."""


def refuse_without_effect(context: click.Context) -> None:
    """Refuse options that a user gave to a command though they have no effect beside the others.

    Raises:
        click.UsageError: There are some; the message names them all.
    """
    flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    for conflict in _conflicts(str(context.command.name), context.params):
        if not conflict.applies(context.params):
            continue
        idle = [
            flags[name]
            for name in conflict.options
            if name in flags and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if idle:
            have, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            raise click.UsageError(
                f"{listed(idle)} {have} no effect {conflict.when}: {conflict.reason}. Leave {them} out.", context
            )


def _conflicts(command: str, parameters: Options) -> Iterator[Conflict]:
    if command in ("plan", "quantize"):
        yield from _of_formats(command, parameters)
    if command == "measure":
        wanted = parameters.get("wanted") or ()
        others = [name for name, declared in owners(command).items() if not any(x.name in wanted for x in declared)]
        when = f"with --formats {','.join(wanted)}"
        yield Conflict(when, lambda options: bool(options["wanted"]), tuple(others), "only other formats use it")
    yield from CONFLICTS.get(command, ())


def _of_formats(command: str, parameters: Options) -> Iterator[Conflict]:
    chosen, declared = chosen_formats(parameters), owners(command)
    shown = listed([each.title for each in chosen])
    of_others: dict[str, list[str]] = {}
    for name, having in declared.items():
        if not any(each in having for each in chosen):
            of_others.setdefault(listed([each.title for each in having]), []).append(name)
    for titles, names in of_others.items():
        yield Conflict(f"with an output in {shown}", _writes_one_format, tuple(names), f"for {titles} only")
    for each in chosen:
        # Beside other formats an option may have its effect on these.
        others = [other for other in chosen if other is not each]
        for conflict in each.conflicts.get(command, ()):
            idle = [
                name
                for name in conflict.options
                if not others or (name in declared and not any(other in declared[name] for other in others))
            ]
            yield replace(conflict, options=tuple(idle))
