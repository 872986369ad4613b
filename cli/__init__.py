"""The command line: one command a step. Commands parse, call the library and print; no maths, no state."""

from . import judge, publish, quantize, steps
from .group import cli, main

__all__ = ["cli", "judge", "main", "publish", "quantize", "steps"]
