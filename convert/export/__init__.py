"""Plans for other programs that quantize models, each to formats of its own."""
