"""Plans for other programs that make GGUF files."""
