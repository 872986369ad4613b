"""Where the rows of a GGUF file come from: found by their values, kept in metadata."""
