"""bpwise: measure how much each bit matters to a language model, then quantize it to exactly the asked size."""

from .version import __version__

__all__ = ["__version__"]
