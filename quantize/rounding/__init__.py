"""The rounding pass through a model, block by block."""
