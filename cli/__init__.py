"""The command line: one command a stage. Commands parse, call the library and print; no maths, no state."""

from . import judge, publish, quantize, stages
from .group import cli, main

__all__ = ["cli", "judge", "main", "publish", "quantize", "stages"]
