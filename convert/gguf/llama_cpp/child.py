"""Runs llama.cpp's converter as Python runs a script, in a process that was started for nothing else.

Beside running it there is what it has no options for: it may see config.json as it is instead of what Transformers
makes of it, and be told of every model that there are no layers for multi-token prediction (MTP). The process ends with
its standard input: it never outlives whoever started it.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["CANNOT_IMPORT", "NO_MTP", "RAW_CONFIG", "main"]

CANNOT_IMPORT = 86
"""Exit status that tells what the converter cannot import from what it cannot convert."""

RAW_CONFIG = "raw-config"
NO_MTP = "no-mtp"
"""Changes to ask for: config.json as it is; no layers for multi-token prediction."""

_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def main(script: str, changes: str, *arguments: str) -> None:
    """Run the converter.

    Args:
        script: Its script.
        changes: Of ``RAW_CONFIG`` and ``NO_MTP`` those that are asked for, joined by commas.
        *arguments: The script's own.

    Raises:
        SystemExit: As the script, or with ``CANNOT_IMPORT``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdin = io.StringIO()  # a script that asks something gets no answer
    # Its own folder comes first on the path, so that its gguf-py wins over an installed gguf, and not this file's.
    sys.path[0] = str(Path(script).parent)
    sys.argv = [script, *arguments]
    try:
        conversion = import_module("conversion")
        if RAW_CONFIG in changes.split(","):
            _read_raw_config(conversion.ModelBase)
        if NO_MTP in changes.split(","):
            _leave_out_mtp(conversion)
        runpy.run_path(script, run_name="__main__")
    except ImportError:
        traceback.print_exc()
        sys.exit(CANNOT_IMPORT)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock the end of the process would wait for
        pass
    os._exit(1)


def _read_raw_config(model: Any) -> None:
    # The converter falls back to the file, and renames keys of some models in it, where Transformers refuses a config.
    load = model.load_hparams

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("config.json is read as it is")

    def load_hparams(*arguments: Any, **named: Any) -> Any:
        config = import_module("transformers").AutoConfig
        parse, config.from_pretrained = config.from_pretrained, refuse
        try:
            return load(*arguments, **named)
        finally:
            config.from_pretrained = parse

    model.load_hparams = staticmethod(load_hparams)


def _leave_out_mtp(conversion: Any) -> None:
    # Some classes take layers for granted, others believe a key of config.json, and only some know --no-nextn.
    load, find = conversion.ModelBase.load_hparams, conversion.get_model_class

    def load_hparams(*arguments: Any, **named: Any) -> Any:
        config = load(*arguments, **named)
        for part in (config, config.get("text_config") or {}):
            for key in _MTP_KEYS:
                part.pop(key, None)
        return config

    def get_model_class(*arguments: Any, **named: Any) -> Any:
        found = find(*arguments, **named)
        found.no_mtp = found.no_mtp or found.supports_mtp_export
        return found

    conversion.ModelBase.load_hparams = staticmethod(load_hparams)
    conversion.get_model_class = get_model_class


if __name__ == "__main__":
    main(*sys.argv[1:])
