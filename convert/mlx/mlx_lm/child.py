"""Loads a model with mlx-lm and stores its tensors as that has them, in a process that was started for nothing else.

Nothing is quantized. The last line of what it says is JSON: the modules that mlx-lm can quantize. The process ends with
its standard input: it never outlives whoever started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

__all__ = ["CANNOT_IMPORT", "main"]

CANNOT_IMPORT = 86
"""Exit status where mlx or mlx-lm is not installed."""


def main(model: str, output: str, config: str) -> None:
    """Store the tensors of a model.

    Args:
        model: Its directory.
        output: Directory to fill.
        config: JSON object of what stands in the place of entries of its config.json, or beside them.

    Raises:
        SystemExit: With ``CANNOT_IMPORT``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    del sys.path[0]  # this folder has the name of a package that is imported here
    try:
        utils, core = import_module("mlx_lm.utils"), import_module("mlx.core")
    except ImportError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(CANNOT_IMPORT)
    core.set_default_device(core.cpu)
    loaded, _ = utils.load_model(Path(model), lazy=True, model_config=json.loads(config))
    modules = [path for path, module in loaded.named_modules() if hasattr(module, "to_quantized")]
    utils.save_model(output, loaded, donate_model=True)
    sys.stdout.write("\n" + json.dumps(sorted(modules)) + "\n")


def _end_with_parent() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock the end of the process would wait for
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
