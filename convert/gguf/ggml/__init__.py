"""The types of ggml: their curves, and rounding to them."""
